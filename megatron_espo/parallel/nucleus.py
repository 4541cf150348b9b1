"""The most likely tokens of rows whose vocabulary is split over ranks, found without gathering it.

Top-k keeps the k most likely tokens, top-p (nucleus sampling, arXiv 1904.09751) the smallest set of
most likely tokens whose probability is at least p. Both are a beginning of the same order, by
logit and then by token id, so that what is kept is said by the logit of its last token and by how
many tokens of just that logit are in it. Ranks look for that logit together, by bisection over the
numbers that a float32 can be: each step adds up, per row, what lies above a number.

Symbols: r rows, n vocabulary entries of this rank.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_espo.parallel.layout import stack_over_ranks

# Every float32 between the smallest and the largest is met by so many halvings.
_HALVINGS = 32
# Entries that one step of the search looks at together, which bounds what it needs beside them.
_ENTRIES = 2**24


def keep_likeliest(
    logits: Tensor, temperature: float, top_p: float, top_k: int, group: dist.ProcessGroup
) -> None:
    """Set the logits of all tokens but the most likely ones to -inf, in place.

    Beside the logits there is one tensor of their size.

    Args:
        logits: float32 ``[r, n]``; -inf for tokens that there are not.
        temperature: positive; divides the logits before probabilities are taken.
        top_p: probability to keep; 1 keeps all.
        top_k: tokens to keep; 0 keeps all. With both, a token must be kept by either.
        group: tensor-parallel group.
    """
    tops = stack_over_ranks(logits.amax(dim=-1), group).amax(0)
    weights = ((logits - tops[:, None]) / temperature).exp_()
    whole = stack_over_ranks(weights.sum(dim=-1, dtype=torch.float64), group).sum(0)
    # Infinities are never reached and never bind.
    mass = top_p * whole if top_p < 1.0 else torch.full_like(whole, torch.inf)
    count = torch.full_like(whole, top_k or torch.inf)

    low = _to_order(torch.full_like(tops, torch.finfo(torch.float32).min))
    high = _to_order(tops)
    for _ in range(_HALVINGS):  # the largest number from which on there is enough
        middle = (low + high + 1).div(2, rounding_mode="floor")
        sums = _sums(logits, weights, _from_order(middle), torch.ge)
        found = stack_over_ranks(sums, group).sum(0)
        enough = (found[0] >= mass) | (found[1] >= count)
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle - 1)

    last = _from_order(low)
    above = stack_over_ranks(_sums(logits, weights, last, torch.gt), group).sum(0)
    equal = stack_over_ranks(_sums(logits, weights, last, torch.eq), group)
    each = equal[:, 0].sum(0) / equal[:, 1].sum(0).clamp(min=1.0)
    # Of tokens with the last one's logit so many as are needed; the first ones, whose ranks may be
    # others.
    needed = torch.minimum(((mass - above[0]) / each).ceil(), count - above[1]).clamp(min=1.0)
    mine = needed - equal[: group.rank(), 1].sum(0)
    for rows in _parts(logits):
        tied = logits[rows] == last[rows, None]
        taken = tied & (tied.cumsum(-1) <= mine[rows, None])
        below = logits[rows] <= last[rows, None]
        logits[rows].masked_fill_(below & ~taken, -torch.inf)


def _sums(
    logits: Tensor, weights: Tensor, bound: Tensor, holds: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Add up the entries for which a comparison with their row's bound holds.

    Returns:
        float64 ``[2, r]``: their weights, and how many they are.
    """
    found = weights.new_empty(2, len(weights), dtype=torch.float64)
    for rows in _parts(logits):
        chosen = holds(logits[rows], bound[rows, None])
        found[0, rows] = torch.where(chosen, weights[rows], 0.0).sum(-1, dtype=torch.float64)
        found[1, rows] = chosen.sum(-1).double()
    return found


def _parts(logits: Tensor) -> list[slice]:
    """Cut the rows into parts of a bounded number of entries."""
    rows, columns = logits.shape
    step = max(_ENTRIES // columns, 1)
    return [slice(start, start + step) for start in range(0, rows, step)]


def _to_order(numbers: Tensor) -> Tensor:
    """Number the float32s in their order, int64; 0 is zero."""
    bits = numbers.view(torch.int32).long()
    return torch.where(bits >= 0, bits, -(bits + 2**31))


def _from_order(places: Tensor) -> Tensor:
    """Give the float32s of such numbers; the inverse of :func:`_to_order`."""
    bits = torch.where(places >= 0, places, -places - 2**31)
    return bits.int().view(torch.float32)
