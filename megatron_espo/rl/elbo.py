"""ELBOs of completions under a model, in any tensor/pipeline layout."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_espo.diffusion.estimators import elbo_draws
from megatron_espo.diffusion.noise import ElboEstimator, ElboViews, elbo_views
from megatron_espo.errors import UserError
from megatron_espo.model.handle import DiffusionModel
from megatron_espo.model.head import masked_cross_entropy, view_cross_entropy
from megatron_espo.parallel.layout import broadcast_from_last_stage
from megatron_espo.passes.batch import ViewBatch, pack_sequences, view_batches
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

    Raises:
        UserError: tokens of the model come block by block.
    """
    sums = torch.zeros(views.weights.numel())
    evaluate_views(sums, batches, model)
    return elbo_draws(sums.view_as(views.weights), views.weights)


def evaluate_views(
    values: Tensor, batches: list[ViewBatch], model: DiffusionModel, per_token: bool = False
) -> None:
    """Compute the cross entropy of each view, without gradients.

    Args:
        values: float32 ``[n*m*v]`` on the host, or ``[n*m*v, l]``, see :func:`put_in_order`.
        batches: micro-batches of some or all views.
        model: the model.
        per_token: of each masked token, 0 for others, in place of their sum.

    Raises:
        UserError: tokens of the model come block by block.
    """
    if model.blocks is not None:
        raise UserError(
            "an ELBO of a model whose tokens come block by block (--attention-mask) is not "
            "written yet; use a model with full attention."
        )
    results = forward_only(
        model.chunks,
        [batch.batch for batch in batches],
        (masked_cross_entropy if per_token else view_cross_entropy)(model.layout.tp),
        model.logit_shift,
        model.layout,
    )
    put_in_order(values, results, batches, model)


def put_in_order(
    values: Tensor, results: Sequence[Tensor], batches: Sequence[ViewBatch], model: DiffusionModel
) -> None:
    """Put what the last stage knows of each view at the view's place, on every rank.

    Args:
        values: float32 ``[n*m*v, ...]`` on the host; views that no micro-batch holds stay as they
            are.
        results: float32 ``[R, ...]`` per micro-batch, on the last stage; not read elsewhere.
        batches: the micro-batches.
        model: the model.
    """
    index = torch.cat([batch.view_index for batch in batches])
    if model.layout.is_last_stage:
        known = torch.cat(list(results))
    else:
        known = torch.empty((len(index), *values.shape[1:]), device=model.device)
    values[index] = broadcast_from_last_stage(known, model.layout).cpu()


def _largest_divisor(total: int, at_most: int) -> int:
    return next(size for size in range(min(total, at_most), 0, -1) if total % size == 0)
