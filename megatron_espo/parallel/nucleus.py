"""The most likely tokens of rows whose vocabulary is split over ranks, found without gathering it.

Top-k keeps the k most likely tokens, top-p (nucleus sampling, arXiv 1904.09751) the smallest set of
most likely tokens whose probability is at least p. Both are a beginning of the same order, by
logit and then by token id, so that what is kept is said by the logit of its last token and by how
many tokens of just that logit are in it. Ranks look for that logit together, digit by digit of the
float32s in their order (a radix select): a round adds up, per row, the entries of each digit.

Probabilities are added as whole numbers, so that the order of adding is no matter: all layouts
keep the same tokens where their logits are the same.

Symbols: r rows, n vocabulary entries of this rank, d values of a digit.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_espo.parallel.layout import stack_over_ranks

_BITS = 8
_DIGITS = 2**_BITS
# The weight of a row's most likely token. Sums over 2^22 entries fit into an int64.
_ONE = 2.0**40
_NO_LIMIT = 2**62
# Entries that are looked at together, which bounds what a round needs beside the logits.
_ENTRIES = 2**22


class _Limits(NamedTuple):
    """What is still to be kept of each row: int64 ``[r]`` each."""

    mass: Tensor
    tokens: Tensor


def keep_likeliest(
    logits: Tensor, temperature: float, top_p: float, top_k: int, group: dist.ProcessGroup
) -> None:
    """Set the logits of all tokens but the most likely ones to -inf, in place.

    Args:
        logits: float32 ``[r, n]``; -inf for tokens that there are not.
        temperature: positive; divides the logits before probabilities are taken.
        top_p: probability to keep; 1 keeps all.
        top_k: tokens to keep; 0 keeps all. With both, a token must be kept by either.
        group: tensor-parallel group.
    """
    tops = stack_over_ranks(logits.amax(dim=-1), group).amax(0)
    prefix = torch.zeros(len(tops), dtype=torch.int64, device=logits.device)
    limits = _Limits(
        torch.full_like(prefix, _NO_LIMIT), torch.full_like(prefix, top_k or _NO_LIMIT)
    )
    for shift in range(32 - _BITS, -1, -_BITS):
        own = _sums_by_digit(logits, tops, temperature, prefix, shift)
        ranks = stack_over_ranks(own, group)
        sums = ranks.sum(0)
        if shift == 32 - _BITS and top_p < 1.0:
            mass = (top_p * sums[0].sum(-1).double()).ceil().long()
            limits = limits._replace(mass=mass.clamp(min=1))
        digit, limits = _last_digit(sums, limits)
        prefix = prefix * _DIGITS + digit
    # Of tokens with the last one's logit so many as are needed; the first ones, whose ranks may be
    # others.
    tied = ranks.gather(-1, digit.expand(*ranks.shape[:2], -1)[..., None])[..., 0]
    of_all = tied.sum(0)
    each = (of_all[0] // of_all[1].clamp(min=1)).clamp(min=1)
    needed = torch.minimum((limits.mass + each - 1) // each, limits.tokens).clamp(min=1)
    mine = needed - tied[: group.rank(), 1].sum(0)
    for rows in _parts(logits):
        keys = _keys(logits[rows])
        equal = keys == prefix[rows, None]
        taken = equal & (equal.cumsum(-1) <= mine[rows, None])
        logits[rows].masked_fill_((keys <= prefix[rows, None]) & ~taken, -torch.inf)


def _sums_by_digit(
    logits: Tensor, tops: Tensor, temperature: float, prefix: Tensor, shift: int
) -> Tensor:
    """Add up this rank's entries by a digit of their keys, of those with the digits before it.

    Returns:
        int64 ``[2, r, d]``: their weights, and how many they are.
    """
    found = prefix.new_zeros(2, len(tops), _DIGITS + 1)
    for rows in _parts(logits):
        part = logits[rows]
        keys = _keys(part)
        digits = (keys >> shift) & (_DIGITS - 1)
        others = (keys >> (shift + _BITS)) != prefix[rows, None]
        digits.masked_fill_(others, _DIGITS)
        weights = ((part - tops[rows, None]) / temperature).exp_().double().mul_(_ONE).long()
        found[0, rows].scatter_add_(1, digits, weights)
        found[1, rows].scatter_add_(1, digits, torch.ones_like(weights))
    return found[..., :_DIGITS]


def _last_digit(sums: Tensor, limits: _Limits) -> tuple[Tensor, _Limits]:
    """Find, from the largest digit down, where there is enough.

    Args:
        sums: int64 ``[2, r, d]`` of all ranks.
        limits: what is to be kept.

    Returns:
        The digit, int64 ``[r]``, and what is to be kept of the entries that have it.
    """
    reached = sums.flip(-1).cumsum(-1)
    enough = (reached[0] >= limits.mass[:, None]) | (reached[1] >= limits.tokens[:, None])
    # Where nothing limits, everything is kept: the search ends at the smallest there is.
    there = reached[1] == reached[1, :, -1:]
    place = (enough | there).int().argmax(-1, keepdim=True)
    before = reached - sums.flip(-1)
    mass, count = (before[i].gather(-1, place)[:, 0] for i in (0, 1))
    return _DIGITS - 1 - place[:, 0], _Limits(limits.mass - mass, limits.tokens - count)


def _parts(logits: Tensor) -> Iterator[slice]:
    """Cut the rows into parts of a bounded number of entries."""
    rows, columns = logits.shape
    step = max(_ENTRIES // columns, 1)
    yield from (slice(start, start + step) for start in range(0, rows, step))


def _keys(numbers: Tensor) -> Tensor:
    """Number the float32s in their order from 0 to 2^32: int64; -0 and 0 have one number."""
    bits = numbers.view(torch.int32).long()
    return torch.where(bits >= 0, bits + 2**31, -bits)
