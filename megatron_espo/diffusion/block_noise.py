"""Forward processes of block diffusion: each block has a noise level of its own.

The likelihood of a completion is the product of its blocks', each given the clean blocks before it;
each block's bound is that of masked diffusion on its tokens alone (BD3-LM, arXiv 2503.09573,
eq. 8). A draw masks all blocks at once, each with its own level.

Symbols: b rows, s positions, n blocks, k tokens of a block, l completion length, m draws, v views
per draw.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from megatron_espo.diffusion.noise import ElboEstimator, ElboViews, ForwardProcess, elbo_views
from megatron_espo.random import Stream, substream, uniform


class BlockNoise(NamedTuple):
    """One noised view of each row, block by block.

    Attributes:
        mask_indices: bool ``[b, s]``, True where the model sees the mask token.
        weights: float32 ``[b, s]``, the factor on each token's cross entropy.
    """

    mask_indices: Tensor
    weights: Tensor


def block_noise(
    process: ForwardProcess,
    key: Stream,
    sample_ids: Tensor,
    maskable: Tensor,
    block_size: int,
    epsilon: float = 0.0,
) -> BlockNoise:
    """Mask each block's maskable tokens at a level of its own.

    The draws of a row do not depend on its width: a longer one begins with the same numbers.

    Args:
        process: ``bernoulli``, every token with probability p = (1 - epsilon) t + epsilon,
            t ~ U(0, 1), and weights 1 / p; or ``exact_count``, l ~ U{1..L} of the block's L
            maskable tokens, and weights L / l. With epsilon 0 the weighted sum of the cross
            entropies is an unbiased bound of the row either way.
        key: random stream.
        sample_ids: int64 ``[b]``.
        maskable: bool ``[b, s]``.
        block_size: tokens of a block; blocks are counted from position 0.
        epsilon: smallest masking probability.

    Returns:
        The noise.
    """
    s = maskable.size(1)
    n = -(-s // block_size)
    level = uniform(substream(key, "block"), sample_ids, n)[:, :, None]
    draws = uniform(substream(key, "token"), sample_ids, n * block_size)
    draws = draws.unflatten(1, (n, block_size))
    inside = pad(maskable, (0, n * block_size - s)).unflatten(1, (n, block_size))
    if process == "bernoulli":
        probability = (1.0 - epsilon) * level + epsilon
        mask, weights = (draws < probability) & inside, 1.0 / probability
    else:
        total = inside.sum(2, keepdim=True)
        count = (1 + (level * total).long()).clamp(max=total)
        order = draws.masked_fill(~inside, 2.0).argsort(dim=2, stable=True)
        rank = order.argsort(dim=2, stable=True)
        mask, weights = rank < count, total / count.clamp(min=1)
    weights = weights.expand_as(draws).float()
    return BlockNoise(mask.flatten(1)[:, :s], weights.flatten(1)[:, :s])


def grown_size(first: int, largest: int, factor: int, interval: int, start: int, step: int) -> int:
    """Say how many tokens a block has at a step of a run in which blocks grow.

    b(s) = min(largest, first * factor ** floor(max(0, s - start) / interval)), the schedule of
    next-block adaptation (arXiv 2512.06776, section 4).

    Args:
        first: tokens at the beginning.
        largest: tokens at the end.
        factor: of each growth.
        interval: steps from one growth to the next.
        start: steps before the first interval.
        step: optimizer steps done, s.

    Returns:
        Tokens.
    """
    size = first
    for _ in range(max(0, step - start) // interval):
        if size >= largest:
            break
        size *= factor
    return min(size, largest)


def completion_views(
    estimator: ElboEstimator,
    key: Stream,
    sample_ids: Tensor,
    indices: Tensor,
    total: int,
    length: int,
    num_mc: int,
    *,
    offsets: Tensor | None,
    block_size: int,
    independent_draws: bool = False,
) -> ElboViews:
    """Draw the masks of ELBO estimates: of whole completions, or of a block model block by block.

    Args:
        estimator: see `diffusion.noise.elbo_views`, and so the rest but these two.
        key: random stream of this estimate.
        sample_ids: int64 ``[b]``.
        indices: int64 ``[b]``, places in the global batch.
        total: size of the global batch.
        length: completion length l.
        num_mc: number of draws m.
        offsets: see :func:`block_elbo_views`; None of a model without blocks.
        block_size: see :func:`block_elbo_views`; not looked at without offsets.
        independent_draws: whether a row's draws are independent of each other.

    Returns:
        The views, on the host.
    """
    if offsets is None:
        return elbo_views(
            estimator, key, sample_ids, indices, total, length, num_mc,
            independent_draws=independent_draws,
        )  # fmt: skip
    return block_elbo_views(
        estimator, key, sample_ids, offsets, length, num_mc, block_size,
        independent_draws=independent_draws,
    )  # fmt: skip


def block_elbo_views(
    estimator: ElboEstimator,
    key: Stream,
    sample_ids: Tensor,
    offsets: Tensor,
    length: int,
    num_mc: int,
    block_size: int,
    *,
    independent_draws: bool = False,
    lengths: Tensor | None = None,
    over_blocks: bool = False,
) -> ElboViews:
    """Draw the masks of estimates of the block ELBO of completions.

    Each block of T tokens is masked as :func:`~megatron_espo.diffusion.noise.elbo_views` masks a
    completion of that length, and the estimates of the blocks add up to one of the completion.
    ``coupled``: c ~ U{0..T} of the block's tokens in one view, the others in the second one, with
    weights (T + 1) / 2c and (T + 1) / 2 (T - c).

    Args:
        estimator: which forward process.
        key: random stream of this estimate.
        sample_ids: int64 ``[b]`` on the host.
        offsets: int64 ``[b]``, below ``block_size``: places of the completion's first block that
            the prompt takes.
        length: completion length l.
        num_mc: number of draws m.
        block_size: tokens of a block k.
        independent_draws: give each draw levels of its own; else those of a block are spread evenly
            over the draws, which leaves each of them uniform.
        lengths: int64 ``[b]``, at most l: how many of its tokens each completion has; None: all.
        over_blocks: spread the levels of a completion evenly over its draws and blocks together,
            with one random offset; each level stays uniform. Not with ``independent_draws``.

    Returns:
        The views, on the host. The weights are those of tokens.
    """
    n = -(-(block_size - 1 + length) // block_size)
    columns = offsets[:, None] + torch.arange(length)
    there = torch.full((len(offsets), 1), length) if lengths is None else lengths[:, None]
    inside = torch.zeros(len(offsets), n * block_size, dtype=torch.bool)
    inside.scatter_(1, columns, torch.arange(length) < there)
    inside = inside.unflatten(1, (n, block_size))
    first = uniform(substream(key, "block"), sample_ids, n)
    if over_blocks:
        # Blocks j of n_b in draws i of m: a lattice of m n_b levels, (i n_b + j) / (m n_b) apart
        # from the offset.
        number = inside.any(dim=2).sum(dim=1, keepdim=True)
        first = (first[:, :1] + torch.arange(n) / (num_mc * number)) % 1.0
    masks, weights = [], []
    for draw in range(num_mc):
        level = (first + draw / num_mc) % 1.0
        if independent_draws:
            level = uniform(substream(key, "block", draw), sample_ids, n)
        numbers = uniform(substream(key, "token", draw), sample_ids, n * block_size)
        views = _views(estimator, level[:, :, None], numbers.view_as(inside), inside)
        masks.append(torch.stack([mask for mask, _ in views], dim=1))
        factors = [weight.expand_as(inside).float() for _, weight in views]
        weights.append(torch.stack(factors, dim=1))
    picked = columns[:, None, None].expand(-1, num_mc, masks[0].size(1), -1)
    mask, weight = (torch.stack(parts, dim=1).flatten(3) for parts in (masks, weights))
    ones = torch.ones(mask.shape[:3])
    return ElboViews(mask.gather(3, picked), ones, token_weights=weight.gather(3, picked))


def own_length_views(
    estimator: ElboEstimator, key: Stream, sample_ids: Tensor, lengths: Tensor, num_mc: int
) -> ElboViews:
    """Draw the masks of ELBO estimates of completions that have lengths of their own.

    Each is masked as :func:`~megatron_espo.diffusion.noise.elbo_views` masks one of its length,
    with counts that are spread evenly over its own draws; what the others are does not matter.

    Args:
        estimator: which forward process.
        key: random stream of this estimate.
        sample_ids: int64 ``[b]`` on the host.
        lengths: int64 ``[b]``, at least 1.
        num_mc: number of draws m.

    Returns:
        The views over as many tokens as the longest has, on the host.
    """
    width = int(lengths.max())
    whole = torch.zeros_like(lengths)
    # All of a completion is one block.
    views = block_elbo_views(
        estimator, key, sample_ids, whole, width, num_mc, width, lengths=lengths
    )
    assert views.token_weights is not None
    return ElboViews(views.mask_indices, views.token_weights[..., 0])


def _views(
    estimator: ElboEstimator, level: Tensor, numbers: Tensor, inside: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Make the masks ``[b, n, k]`` of one draw, and the weights of their blocks ``[b, n, 1]``."""
    if estimator == "bernoulli":
        return [((numbers < level) & inside, 1.0 / level)]
    total = inside.sum(2, keepdim=True)
    low = 0 if estimator == "coupled" else 1
    count = (low + (level * (total + 1 - low)).long()).clamp(max=total)
    order = numbers.masked_fill(~inside, 2.0).argsort(dim=2, stable=True)
    mask = order.argsort(dim=2, stable=True) < count
    if estimator == "exact_count":
        return [(mask, total / count.clamp(min=1))]
    sides = ((mask, count), (inside & ~mask, total - count))
    return [
        (side, torch.where(c > 0, (total + 1) / (2 * c.clamp(min=1)), 0.0)) for side, c in sides
    ]
