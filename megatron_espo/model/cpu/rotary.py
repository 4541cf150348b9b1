"""Rotary position embedding of plain PyTorch layers, in few operations.

Megatron's version without its fused kernel takes cosines and sines of the angles in every layer,
for queries and keys each, and then a dozen operations on whole tensors. Here they are taken once
for each table of angles, and the rotation is one function with three operations either way.

Symbols: w positions, b rows, heads of this rank, d head size.
"""

from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor
from torch.autograd.function import once_differentiable


class RotatingSelfAttention(SelfAttention):
    """Megatron's self-attention with this rotation in place of the unfused one."""

    _angles: Tensor | None = None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        rotary_pos_emb: Any = None,
        **settings: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; see Megatron's Attention.

        Args:
            hidden_states: ``[w, b, h]``.
            attention_mask: bool ``[b, 1, 1, s]``.
            *args: as in Megatron's.
            rotary_pos_emb: angles ``[w, 1 or b, 1, d]``, or None without rotary positions.
            **settings: as in Megatron's.

        Returns:
            The projected output ``[w, b, h]`` and its bias.
        """
        if self._is_handled(rotary_pos_emb):
            # Into the dictionary itself: a module's own assignment looks for parameters first.
            self.__dict__["_angles"], rotary_pos_emb = rotary_pos_emb, None
        try:
            output: tuple[Tensor, Tensor | None] = super().forward(
                hidden_states, attention_mask, *args, rotary_pos_emb=rotary_pos_emb, **settings
            )
        finally:
            self.__dict__["_angles"] = None
        return output

    def _is_handled(self, angles: Any) -> bool:
        return (
            isinstance(angles, Tensor)
            and angles.size(-1) == self.hidden_size_per_attention_head
            and not self.config.apply_rope_fusion
            and not self.config.rotary_interleaved
            and self._yarn_concentration_factor == 1.0
        )

    def get_query_key_value_tensors(self, *args: Any, **settings: Any) -> tuple[Any, ...]:
        """Project; queries and keys are rotated where :meth:`forward` left that to this method.

        Args:
            *args: as in Megatron's.
            **settings: as in Megatron's.

        Returns:
            Queries, keys, values ``[w, b, heads, d]`` and whatever else Megatron's returns.
        """
        query, key, *rest = super().get_query_key_value_tensors(*args, **settings)
        if self._angles is not None:
            cosines, sines = _waves(self._angles, query.dtype)
            query, key = (rotate(part, cosines, sines) for part in (query, key))
        return query, key, *rest


def _waves(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Take cosines ``[w, ., 1, d]`` and sines of the first half ``[w, ., 1, d / 2]``, once.

    Megatron keeps the tables of angles of the lengths that it has seen; what is computed from a
    table stays with it.
    """
    kept: dict[torch.dtype, tuple[Tensor, Tensor]] = getattr(angles, "_waves", {})
    if dtype not in kept:
        sines = angles[..., : angles.size(-1) // 2].sin()
        kept[dtype] = (angles.cos().to(dtype), sines.to(dtype))
        angles._waves = kept  # type: ignore[attr-defined]
    return kept[dtype]


def _rotated(parts: Tensor, cosines: Tensor, sines: Tensor, sign: int) -> Tensor:
    half = sines.size(-1)
    rotated = parts * cosines
    rotated[..., :half].addcmul_(parts[..., half:], sines, value=-sign)
    rotated[..., half:].addcmul_(parts[..., :half], sines, value=sign)
    return rotated


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parts: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        return _rotated(parts, cosines, sines, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cosines, sines = ctx.saved_tensors
        return _rotated(gradient, cosines, sines, -1), None, None


def rotate(parts: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate the first half of each head's entries with the second half (RoFormer, 2104.09864).

    Args:
        parts: queries or keys, ``[w, b, heads, d]``.
        cosines: of the angles, ``[w, 1 or b, 1, d]``.
        sines: of the first half of the angles, ``[w, 1 or b, 1, d / 2]``.

    Returns:
        ``[w, b, heads, d]``, with the gradient to ``parts``; the same with and without one.
    """
    if not torch.is_grad_enabled():
        return _rotated(parts, cosines, sines, 1)
    rotated: Tensor = _Rotate.apply(parts, cosines, sines)
    return rotated
