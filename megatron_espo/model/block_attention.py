"""Attention of rows that hold noisy copies before the clean tokens, without keys that none sees.

PyTorch's fused kernels compute what a mask hides. So the positions are cut into segments of whole
blocks: the queries of a segment are given the clean keys up to its end and, where they are noisy,
the noisy keys of their copy and segment. What is left of the mask is made once for all layers.

On GPUs flex_attention skips what a mask hides by itself; on CPUs it has no backward pass. Where it
fails, the segments take its place.

Symbols: K noisy copies, L positions, b rows, g key/value heads of this rank, d head size.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from megatron_espo.console import say
from megatron_espo.passes.block_mask import BlockAttention


class _Masks(NamedTuple):
    """Additive masks of a segment: of noisy queries, whose keys are clean ones first, and clean."""

    noisy: Tensor
    clean: Tensor


# By a pass's mask, with which they go.
_prepared = WeakTensorKeyDictionary()


def attend_to_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    blocks: BlockAttention,
    scale: float | None,
    dropout: float,
) -> Tensor:
    """Attend with the kernel that the device has; arguments of :func:`attend_in_parts`."""
    global _skips
    if query.is_cuda and dropout == 0.0 and _skips:
        try:
            return attend_sparsely(query, key, value, attention_mask, blocks, scale, _compiled())
        except Exception as error:  # its compiler's errors have no common class
            _skips = False
            say(
                f"flex_attention fails here ({type(error).__name__}); block attention goes on with "
                "PyTorch's fused kernel, which computes more."
            )
    return attend_in_parts(query, key, value, attention_mask, blocks, scale, dropout)


# Whether flex_attention has not failed yet.
_skips = True


@cache
def _compiled() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def attend_sparsely(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    blocks: BlockAttention,
    scale: float | None,
    kernel: Callable[..., Tensor],
) -> Tensor:
    """Attend with flex_attention, whose block mask is made once in a pass.

    Args:
        query: as in :func:`attend_in_parts`, and so the next ones.
        key: likewise.
        value: likewise.
        attention_mask: likewise.
        blocks: likewise.
        scale: likewise.
        kernel: ``flex_attention``, compiled or not.

    Returns:
        ``[(K + 1) L, b, heads * d]``.
    """
    output = kernel(
        query.permute(1, 2, 0, 3),
        key,
        value,
        block_mask=_block_mask(attention_mask, blocks),
        scale=scale,
        enable_gqa=query.size(2) != key.size(1),
    )
    return output.permute(2, 0, 1, 3).flatten(2)


def _block_mask(hidden: Tensor, blocks: BlockAttention) -> Any:
    """Make flex_attention's mask of a pass: which tiles to compute, and what of them to hide."""
    from torch.nn.attention.flex_attention import create_block_mask

    known = _prepared.setdefault(hidden, {})
    if "flex" not in known:
        width = hidden.size(3)
        length = width // (blocks.copies + 1)
        # A clean token in the row's last place sees all that is no padding, of either kind.
        visible = (~hidden[:, 0, -1, -length:]).sum(dim=1)

        def seen(b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return blocks.sees(q, k, length) & (k % length < visible[b])

        rows = hidden.size(0)
        known["flex"] = create_block_mask(seen, rows, None, width, width, device=hidden.device)
    return known["flex"]


def attend_in_parts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    blocks: BlockAttention,
    scale: float | None,
    dropout: float,
) -> Tensor:
    """Attend from noisy copies and clean tokens, segment by segment.

    Args:
        query: ``[(K + 1) L, b, heads, d]``.
        key: ``[b, g, (K + 1) L, d]``.
        value: likewise.
        attention_mask: bool ``[b or 1, 1, (K + 1) L, (K + 1) L]``, that of ``blocks``.
        blocks: the attention, with K copies.
        scale: factor of the scores; 1 / sqrt(d) if None.
        dropout: share of the attention weights that are dropped.

    Returns:
        ``[(K + 1) L, b, heads * d]``.
    """
    copies = blocks.copies
    length = query.size(0) // (copies + 1)
    repeats = query.size(2) // key.size(1)
    if repeats > 1:
        key, value = (part.repeat_interleave(repeats, dim=1) for part in (key, value))
    # The gradients of slices would each be as large as what they are slices of.
    queries = query.permute(1, 2, 0, 3).split(length, dim=2)
    keys, values = key.split(length, dim=2), value.split(length, dim=2)
    segments = blocks.segments(length)
    masks = _masks(attention_mask, blocks, query.dtype)
    outputs: list[Tensor] = []
    for copy in range(copies + 1):
        for (start, end), mask in zip(segments, masks, strict=True):
            seen = [(keys[copies][:, :, :end], values[copies][:, :, :end])]
            if copy < copies:
                seen.append((keys[copy][:, :, start:end], values[copy][:, :, start:end]))
            k, v = (torch.cat(parts, dim=2) for parts in zip(*seen, strict=True))
            output = torch.nn.functional.scaled_dot_product_attention(
                queries[copy][:, :, start:end],
                k,
                v,
                attn_mask=mask.clean if copy == copies else mask.noisy,
                dropout_p=dropout,
                scale=scale,
            )
            outputs.append(output.permute(2, 0, 1, 3).flatten(2))
    return torch.cat(outputs)


def _masks(hidden: Tensor, blocks: BlockAttention, dtype: torch.dtype) -> list[_Masks]:
    """Make the masks of all segments out of that of whole rows, once in a pass."""
    known = _prepared.setdefault(hidden, {})
    if dtype not in known:
        length = hidden.size(3) // (blocks.copies + 1)
        first = blocks.copies * length
        found = []
        for start, end in blocks.segments(length):
            rows, own = hidden[:, :, start:end], hidden[:, :, first + start : first + end]
            noisy = torch.cat((rows[..., first : first + end], rows[..., start:end]), dim=3)
            clean = own[..., first : first + end]
            zero = torch.zeros((), dtype=dtype, device=hidden.device)
            found.append(_Masks(*(zero.masked_fill(part, -torch.inf) for part in (noisy, clean))))
        known[dtype] = found
    masks: list[_Masks] = known[dtype]
    return masks
