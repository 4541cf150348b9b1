"""Forward processes: which tokens are masked, and the weight of their cross entropy.

Noise is data. A draw is a pure function of a random stream and global sample ids, made on the
host, so that every rank of a model-parallel group, and every policy that an ELBO is compared
between, masks the same tokens without communication.

Symbols: b rows, s positions, m Monte-Carlo draws, v views per draw (1, or 2 for a coupled pair).
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megatron_espo.random import Stream, randint, substream, uniform

ForwardProcess = Literal["bernoulli", "exact_count"]
ElboEstimator = Literal["coupled", "exact_count", "bernoulli"]


class Noise(NamedTuple):
    """One noised view of each row of a training batch.

    Attributes:
        mask_indices: bool ``[b, s]``, True where the model sees the mask token.
        weights: float32 ``[b]``, the factor on the row's summed cross entropy.
    """

    mask_indices: Tensor
    weights: Tensor


class ElboViews(NamedTuple):
    """The noised views behind one ELBO estimate per draw.

    Attributes:
        mask_indices: bool ``[b, m, v, s]`` over completion positions.
        weights: float32 ``[b, m, v]``; the estimate of a draw is minus the weighted sum over its
            views of the cross entropy summed over the masked positions. An empty side of a
            coupled pair has weight 0; an empty bernoulli view keeps 1 / p, times a sum of 0.
        token_weights: float32 ``[b, m, v, s]``, factors on the cross entropy of each position
            inside that sum, where they differ (diffusion/block_noise.py); None: all 1.
        predicted: bool ``[b, m, v, s]``, the masked positions that are predicted; None: all.
    """

    mask_indices: Tensor
    weights: Tensor
    token_weights: Tensor | None = None
    predicted: Tensor | None = None


def random_subset(key: Stream, sample_ids: Tensor, maskable: Tensor, sizes: Tensor) -> Tensor:
    """Draw a uniformly random subset of given size among each row's maskable positions.

    Args:
        key: random stream.
        sample_ids: int64 ``[b]``.
        maskable: bool ``[b, s]``.
        sizes: int64 ``[b]``, at most the number of maskable positions of the row.

    Returns:
        bool ``[b, s]`` with exactly ``sizes`` True entries per row.
    """
    return _smallest(uniform(key, sample_ids, maskable.size(1)), maskable, sizes)


def _smallest(order: Tensor, maskable: Tensor, sizes: Tensor) -> Tensor:
    """Mark each row's ``sizes`` smallest numbers among its maskable positions."""
    order = order.masked_fill(~maskable, 2.0)
    rank = order.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    return rank < sizes[:, None]


def bernoulli(key: Stream, sample_ids: Tensor, maskable: Tensor, epsilon: float) -> Noise:
    """Mask every maskable token with probability p = (1 - epsilon) t + epsilon, t ~ U(0, 1).

    Args:
        key: random stream.
        sample_ids: int64 ``[b]``.
        maskable: bool ``[b, s]``.
        epsilon: smallest masking probability; 0 makes the weighted sum an unbiased ELBO.

    Returns:
        The masks and the weights 1 / p (LLaDA, arXiv 2502.09992, eq. 3).
    """
    draws = uniform(key, sample_ids, maskable.size(1) + 1)
    probability = (1.0 - epsilon) * draws[:, :1] + epsilon
    mask = (draws[:, 1:] < probability) & maskable
    return Noise(mask, (1.0 / probability[:, 0]).float())


def exact_count(key: Stream, sample_ids: Tensor, maskable: Tensor) -> Noise:
    """Mask exactly l tokens, l ~ U{1..L} with L the number of maskable tokens of the row.

    Args:
        key: random stream.
        sample_ids: int64 ``[b]``.
        maskable: bool ``[b, s]``; each row has at least one True entry.

    Returns:
        The masks and the weights L / l (LLaDA, arXiv 2502.09992, eq. 14 in the form of its
        Monte-Carlo likelihood).
    """
    lengths = maskable.sum(dim=1)
    draws = uniform(key, sample_ids, maskable.size(1) + 1)
    counts = 1 + (draws[:, 0] * lengths).long().clamp_(max=lengths - 1)
    return Noise(_smallest(draws[:, 1:], maskable, counts), (lengths / counts).float())


def stratified_counts(
    key: Stream, indices: Tensor, total: int, num_mc: int, low: int, high: int
) -> Tensor:
    """Draw counts that are uniform on low..high each, and spread evenly over draws and batch.

    All ``total * num_mc`` counts sit on one integer lattice with a common random offset
    (systematic sampling): integer arithmetic keeps every marginal exactly uniform, which rounding
    a float grid does not.

    Args:
        key: random stream, common to the whole batch.
        indices: int64 ``[b]``, the rows' places in the global batch, in 0..total-1.
        total: size of the global batch that the strata cover.
        num_mc: draws per row.
        low: smallest count.
        high: largest count.

    Returns:
        int64 ``[b, num_mc]``.
    """
    span = high - low + 1
    size = span * num_mc * total
    offset = randint(key, torch.zeros(1, dtype=torch.int64), 1, 0, size - 1)
    draw = torch.arange(num_mc)[None, :]
    lattice = (offset + (indices[:, None] + draw * total) * span) % size
    return low + lattice // (num_mc * total)


def elbo_views(
    estimator: ElboEstimator,
    key: Stream,
    sample_ids: Tensor,
    indices: Tensor,
    total: int,
    length: int,
    num_mc: int,
    *,
    independent_draws: bool = False,
) -> ElboViews:
    """Draw the masks of an ELBO estimate of completions of ``length`` tokens.

    ``coupled`` is ESPO's estimator: a random subset of k ~ U{0..L} positions and its complement,
    with weights (L+1)/2k and (L+1)/2(L-k). Averaged over k, both k = 0 and k = L included, it is
    unbiased; a pair always masks exactly L positions in total.

    Args:
        estimator: which forward process.
        key: random stream of this estimate (one per rollout and inner update).
        sample_ids: int64 ``[b]`` on the host.
        indices: int64 ``[b]``, places in the global batch, for the strata.
        total: size of the global batch.
        length: completion length L.
        num_mc: number of draws m.
        independent_draws: spread the counts over the batch only, not over a row's draws, which
            are then independent of each other (products of draws need that).

    Returns:
        The views, on the host.
    """
    b = sample_ids.numel()
    maskable = torch.ones(b, length, dtype=torch.bool)
    keys = [substream(key, "mask", draw) for draw in range(num_mc)]
    if estimator == "bernoulli":
        noises = [bernoulli(k, sample_ids, maskable, epsilon=0.0) for k in keys]
        masks = torch.stack([noise.mask_indices for noise in noises], dim=1)
        return ElboViews(masks[:, :, None], torch.stack([n.weights for n in noises], 1)[..., None])
    low = 0 if estimator == "coupled" else 1
    # One lattice for all draws of a row, or one for each draw.
    draws_per_lattice = 1 if independent_draws else num_mc
    counts = torch.cat(
        [
            stratified_counts(
                substream(key, "count", i), indices, total, draws_per_lattice, low, length
            )
            for i in range(num_mc // draws_per_lattice)
        ],
        dim=1,
    )
    masks = torch.stack(
        [random_subset(k, sample_ids, maskable, counts[:, i]) for i, k in enumerate(keys)], dim=1
    )
    if estimator == "exact_count":
        return ElboViews(masks[:, :, None], (length / counts).float()[..., None])
    pair = torch.stack((counts, length - counts), dim=-1)
    weights = torch.where(pair > 0, (length + 1) / (2 * pair.clamp(min=1)), 0.0)
    return ElboViews(torch.stack((masks, ~masks), dim=2), weights.float())


def random_lengths(key: Stream, sample_ids: Tensor, lengths: Tensor, probability: float) -> Tensor:
    """Shorten a share of the rows to a uniformly random length (LLaDA pre-training).

    The tensors keep their shape; the caller hides the tail from attention and loss.

    Args:
        key: random stream.
        sample_ids: int64 ``[b]``.
        lengths: int64 ``[b]``, the rows' lengths.
        probability: share of shortened rows (0.01 in LLaDA).

    Returns:
        int64 ``[b]``, in 1..lengths.
    """
    draws = uniform(key, sample_ids, 2)
    short = 1 + (draws[:, 1] * lengths).long().clamp_(max=lengths - 1)
    return torch.where(draws[:, 0] < probability, short, lengths)
