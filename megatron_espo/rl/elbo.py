"""ELBOs of completions under a model, in any tensor/pipeline layout."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_espo.diffusion.block_noise import completion_views
from megatron_espo.diffusion.estimators import elbo_draws
from megatron_espo.diffusion.noise import ElboEstimator, ElboViews
from megatron_espo.model.handle import DiffusionModel
from megatron_espo.model.head import masked_cross_entropy, view_cross_entropy
from megatron_espo.parallel.layout import broadcast_from_last_stage
from megatron_espo.passes.batch import Sequences, ViewBatch, pack_sequences, view_batches
from megatron_espo.passes.block_views import block_view_batches
from megatron_espo.passes.pipeline import forward_only
from megatron_espo.random import Stream, stream


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
    n = len(completions)
    indices = torch.arange(n)
    ids = indices if sample_ids is None else sample_ids
    sequences = pack_sequences(prompts, completions, model.pad_token_id, model.shapes)
    key = stream(seed, purpose)
    views = draw_views(model, sequences, estimator, key, ids, indices, n, num_mc)
    rows = _rows_of_pass(model, views, rows_per_batch)
    draws = elbo_of_views(model, cut_views(model, sequences, views, rows), views)
    return Elbo(draws.mean(dim=1), draws)


def draw_views(
    model: DiffusionModel,
    sequences: Sequences,
    estimator: ElboEstimator,
    key: Stream,
    sample_ids: Tensor,
    indices: Tensor,
    total: int,
    num_mc: int,
    *,
    independent_draws: bool = False,
) -> ElboViews:
    """Draw the masks of ELBO estimates: of whole completions, or of a block model block by block.

    Args:
        model: the model.
        sequences: n prompts and completions.
        estimator: see ``diffusion.noise.elbo_views``, and so the rest.
        key: random stream of this estimate.
        sample_ids: int64 ``[n]``.
        indices: int64 ``[n]``, places in the global batch.
        total: size of the global batch.
        num_mc: number of draws m.
        independent_draws: whether a row's draws are independent of each other.

    Returns:
        The views, on the host.
    """
    return completion_views(
        estimator,
        key,
        sample_ids,
        indices,
        total,
        sequences.completion_length,
        num_mc,
        offsets=block_offsets(model, sequences),
        block_size=0 if model.blocks is None else model.blocks.size,
        independent_draws=independent_draws,
    )


def block_offsets(model: DiffusionModel, sequences: Sequences) -> Tensor | None:
    """Say how many places of each completion's first block its prompt takes: int64 ``[n]``.

    Args:
        model: the model.
        sequences: n prompts and completions.

    Returns:
        The numbers; None where tokens do not come block by block.
    """
    return None if model.blocks is None else sequences.prompt_lengths % model.blocks.size


def cut_views(
    model: DiffusionModel,
    sequences: Sequences,
    views: ElboViews,
    rows_per_batch: int,
    chosen: Tensor | None = None,
    prompt_masks: Tensor | None = None,
) -> list[ViewBatch]:
    """Cut views into micro-batches for a model.

    Args:
        model: the model.
        sequences: the sequences.
        views: of :func:`draw_views`.
        rows_per_batch: views of a micro-batch; must divide their number.
        chosen: int64 ``[k]``, the sequences to take; None takes all.
        prompt_masks: see :func:`view_batches`; None of a model with blocks.

    Returns:
        The micro-batches, on the host.
    """
    asked = (sequences, views, model.mask_token_id, model.vocab_size, rows_per_batch)
    same_width = model.layout.pp_size > 1
    if model.blocks is None:
        return view_batches(*asked, same_width=same_width, chosen=chosen, prompt_masks=prompt_masks)
    shift = model.logit_shift
    return block_view_batches(*asked, model.blocks, shift, same_width=same_width, chosen=chosen)


def elbo_of_views(model: DiffusionModel, batches: list[ViewBatch], views: ElboViews) -> Tensor:
    """Evaluate the ELBO draws of noised views, without gradients.

    Args:
        model: the model.
        batches: all views, cut into micro-batches.
        views: the weights they were cut from.

    Returns:
        float32 ``[n, m]`` on the host.
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
    """
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


def _rows_of_pass(model: DiffusionModel, views: ElboViews, at_most: int) -> int:
    """Choose how many views pass together; in blocks all of a sequence, which share a row."""
    per_sequence = views.weights[0].numel()
    if model.blocks is None or at_most < per_sequence:
        return _largest_divisor(views.weights.numel(), at_most)
    return per_sequence * _largest_divisor(len(views.weights), at_most // per_sequence)


def _largest_divisor(total: int, at_most: int) -> int:
    return next(size for size in range(min(total, at_most), 0, -1) if total % size == 0)
