"""ELBOs of completions under a model, in any tensor/pipeline layout."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_espo.diffusion.estimators import elbo_draws
from megatron_espo.diffusion.noise import ElboEstimator, ElboViews, elbo_views
from megatron_espo.model.handle import DiffusionModel
from megatron_espo.model.head import masked_cross_entropy
from megatron_espo.parallel.layout import broadcast_from_last_stage
from megatron_espo.passes.batch import MaskedTargets, ViewBatch, pack_sequences, view_batches
from megatron_espo.passes.pipeline import forward_only
from megatron_espo.random import stream


class Elbo(NamedTuple):
    """ELBO estimates in nats per sequence, equal on all ranks of the model-parallel group.

    Attributes:
        elbo: float32 ``[n]``, the mean over draws.
        draws: float32 ``[n, m]``.
    """

    elbo: Tensor
    draws: Tensor


def estimate_elbo(
    model: DiffusionModel,
    prompts: Sequence[Sequence[int]],
    completions: Tensor,
    *,
    estimator: ElboEstimator = "coupled",
    num_mc: int = 2,
    seed: int = 0,
    purpose: str = "elbo",
    sample_ids: Tensor | None = None,
    rows_per_batch: int = 32,
) -> Elbo:
    """Estimate log p(completion | prompt) from below, without gradients.

    Args:
        model: the model; switch it to evaluation mode first.
        prompts: n prompts as token ids, the same on all ranks of the model-parallel group.
        completions: int64 ``[n, l]``, end-of-sequence padding included.
        estimator: forward process (see diffusion.noise).
        num_mc: Monte-Carlo draws m.
        seed: seed of the masks.
        purpose: name of these draws; the same name and ids mask the same tokens again.
        sample_ids: int64 ``[n]``, global ids; 0..n-1 if None.
        rows_per_batch: rows per model pass at most.

    Returns:
        One number per sequence, and the draws behind it.
    """
    n, length = completions.shape
    indices = torch.arange(n)
    ids = indices if sample_ids is None else sample_ids
    views = elbo_views(estimator, stream(seed, purpose), ids, indices, n, length, num_mc)
    sequences = pack_sequences(prompts, completions, model.pad_token_id, model.shapes)
    rows = _largest_divisor(views.weights.numel(), rows_per_batch)
    batches = view_batches(
        sequences,
        views,
        model.mask_token_id,
        model.vocab_size,
        rows,
        same_width=model.layout.pp_size > 1,
    )
    draws = elbo_of_views(model, batches, views)
    return Elbo(draws.mean(dim=1), draws)


def elbo_of_views(model: DiffusionModel, batches: list[ViewBatch], views: ElboViews) -> Tensor:
    """Evaluate the ELBO draws of noised views, without gradients.

    Args:
        model: the model.
        batches: all views, cut into micro-batches.
        views: the weights they were cut from.

    Returns:
        float32 ``[n, m]`` on the host.
    """
    results = forward_only(
        model.chunks,
        [batch.batch for batch in batches],
        partial(view_cross_entropy, tp_group=model.layout.tp),
        model.logit_shift,
        model.layout,
    )
    sums = in_order_of_views(results, batches, model).view_as(views.weights)
    return elbo_draws(sums, views.weights)


def in_order_of_views(
    results: Sequence[Tensor], batches: Sequence[ViewBatch], model: DiffusionModel
) -> Tensor:
    """Put what the last stage knows of each view in the views' order, on every rank.

    Args:
        results: float32 ``[R]`` per micro-batch, on the last stage; not read elsewhere.
        batches: the micro-batches.
        model: the model.

    Returns:
        float32 ``[n*m*v]`` on the host.
    """
    index = torch.cat([batch.view_index for batch in batches])
    if model.layout.is_last_stage:
        known = torch.cat(list(results))
    else:
        known = torch.empty(len(index), device=model.device)
    values = torch.empty(len(index))
    values[index] = broadcast_from_last_stage(known, model.layout).cpu()
    return values


def view_cross_entropy(
    logits: Tensor, payload: MaskedTargets, *, tp_group: torch.distributed.ProcessGroup
) -> Tensor:
    """Sum the cross entropy of each view: float32 ``[R]`` with gradient."""
    return masked_cross_entropy(logits, payload, tp_group=tp_group).sum(dim=1)


def _largest_divisor(total: int, at_most: int) -> int:
    return next(size for size in range(min(total, at_most), 0, -1) if total % size == 0)
