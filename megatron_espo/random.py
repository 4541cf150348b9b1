"""Counter-based random numbers: the same key gives the same bits on every rank and device.

Every draw that decides a mask or a token is a pure function of a *stream* (run seed, purpose,
rollout or epoch, inner update, ...) and, row by row, of a global sample id. Nothing here reads or
writes a process-wide generator, so masks and tokens do not depend on the layout, on the
micro-batch size or on how often a run was resumed.

The generator is Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011). A stream's name is hashed to the 64-bit key; the 128-bit counter holds the position in
the row and the sample id.
"""

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW32 = 0xFFFFFFFF


class Stream(NamedTuple):
    """The 64-bit Philox key of one family of draws."""

    low: int
    high: int


def stream(seed: int, purpose: str, *indices: int) -> Stream:
    """Name a family of draws.

    Args:
        seed: the run's seed.
        purpose: what the draws decide, for example ``"elbo-mask"``; purposes never share bits.
        indices: what else tells this family apart (rollout, inner update, draw, ...).

    Returns:
        The key of the family, equal for equal arguments on every machine.
    """
    # repr() quotes the name, so no name can look like a shorter one followed by an index.
    return _key(f"{int(seed)}/{purpose!r}/" + "/".join(str(int(index)) for index in indices))


def substream(key: Stream, purpose: str, index: int = 0) -> Stream:
    """Split a family of draws: parts with different names or indices share no bits."""
    return _key(f"{key.low}:{key.high}/{purpose!r}/{int(index)}")


def _key(text: str) -> Stream:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return Stream(int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little"))


def philox(counter: Tensor, key: Stream) -> Tensor:
    """Apply ten Philox-4x32 rounds.

    Args:
        counter: int64 ``[..., 4]``, each entry an unsigned 32-bit word.
        key: the stream.

    Returns:
        int64 ``[..., 4]`` of unsigned 32-bit words.
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW32, (k1 + _KEY_STEPS[1]) & _LOW32
    return torch.stack((c0, c1, c2, c3), dim=-1)


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """Return the high and low 32-bit words of a product; int64 cannot hold it in one piece."""
    low_part = (word & 0xFFFF) * multiplier
    high_part = (word >> 16) * multiplier + (low_part >> 16)
    return high_part >> 16, ((high_part & 0xFFFF) << 16) | (low_part & 0xFFFF)


def uniform(key: Stream, sample_ids: Tensor, count: int, starts: Tensor | None = None) -> Tensor:
    """Draw uniform numbers in the open interval (0, 1), one row per sample.

    Args:
        key: the stream.
        sample_ids: int64 ``[b]``, the global ids (non-negative) that the rows belong to.
        count: numbers per row. A longer row starts with the same numbers.
        starts: int64 ``[b]``, even numbers: how many numbers of each row to leave out before its
            first. None: none.

    Returns:
        float64 ``[b, count]`` on the device of ``sample_ids``, with 52 random bits each.
    """
    pairs = (count + 1) // 2
    rows = sample_ids[:, None]
    position = torch.arange(pairs, device=sample_ids.device)[None, :].expand(len(rows), pairs)
    if starts is not None:
        position = position + starts[:, None] // 2
    zero = torch.zeros_like(position)
    counter = torch.stack((position, zero, (rows & _LOW32) + zero, (rows >> 32) + zero), dim=-1)
    words = philox(counter, key)
    # 26 + 26 bits, centred in their cell: neither 0 nor 1 can come out.
    high, low = words[..., 0::2] >> 6, words[..., 1::2] >> 6
    numbers = ((high << 26) | low).double().add_(0.5).mul_(2.0**-52)
    return numbers.reshape(len(rows), 2 * pairs)[:, :count]


def randint(key: Stream, sample_ids: Tensor, count: int, low: int, high: int) -> Tensor:
    """Draw whole numbers from ``low`` to ``high``, both included.

    Args:
        key: the stream.
        sample_ids: int64 ``[b]``.
        count: numbers per row.
        low: smallest value.
        high: largest value.

    Returns:
        int64 ``[b, count]``. The bias of mapping 52 bits is below (high - low) * 2**-52.
    """
    span = high - low + 1
    return low + (uniform(key, sample_ids, count) * span).long().clamp_(max=span - 1)


def permutation(key: Stream, length: int) -> Tensor:
    """Draw a uniformly random order of ``range(length)``.

    Args:
        key: the stream.
        length: number of items.

    Returns:
        int64 ``[length]`` on the CPU.
    """
    numbers = uniform(key, torch.zeros(1, dtype=torch.int64), length)[0]
    return numbers.argsort(stable=True)
