"""Gated feed-forward part of plain PyTorch layers, in few operations.

Megatron's version without its fused kernel adds a zero to the linear half and keeps four tensors of
the inner width for the backward pass; its fused one needs a compiler at run time on CPUs. Here
SwiGLU is one function that keeps its input alone.

Symbols: w positions, b rows, h hidden size, f inner width of this rank.
"""

from typing import Any

import torch
from megatron.core.transformer.mlp import MLP
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


class GatedFeedForward(MLP):
    """Megatron's MLP with this SwiGLU in place of the unfused one."""

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **settings: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Apply both projections and what is between them; see Megatron's MLP.

        Args:
            hidden_states: ``[w, b, h]``.
            per_token_scale: as in Megatron's.
            **settings: as in Megatron's.

        Returns:
            ``[w, b, h]`` and its bias.
        """
        if per_token_scale is not None or not self._is_handled():
            whole: tuple[Tensor, Tensor | None] = super().forward(
                hidden_states, per_token_scale, **settings
            )
            return whole
        parts, _ = self.linear_fc1(hidden_states)
        output, bias = self.linear_fc2(swiglu(parts))
        return output, bias

    def _is_handled(self) -> bool:
        config = self.config
        return (
            config.gated_linear_unit
            and self.activation_func is functional.silu
            and not config.add_bias_linear
            and not config.bias_activation_fusion
            and not config.use_te_activation_func
            and config.activation_func_clamp_value is None
            and not config.glu_linear_offset
        )


def _swiglu(parts: Tensor) -> Tensor:
    gate, linear = parts.chunk(2, dim=-1)
    return functional.silu(gate).mul_(linear)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parts: Tensor) -> Tensor:
        ctx.save_for_backward(parts)
        return _swiglu(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (parts,) = ctx.saved_tensors
        gate, linear = parts.chunk(2, dim=-1)
        # Like the input in memory, whichever way that is laid out.
        of_parts = torch.empty_like(parts)
        of_gate, of_linear = of_parts.chunk(2, dim=-1)
        torch.mul(gradient, functional.silu(gate), out=of_linear)
        torch.ops.aten.silu_backward.grad_input(gradient * linear, gate, grad_input=of_gate)
        return of_parts


def swiglu(parts: Tensor) -> Tensor:
    """Multiply the linear half with the gate's SiLU (GLU variants, arXiv 2002.05202).

    Args:
        parts: ``[..., 2 f]``, gates before linear parts.

    Returns:
        ``[..., f]``, with the gradient to ``parts``; the same with and without one.
    """
    if not torch.is_grad_enabled():
        return _swiglu(parts)
    product: Tensor = _SwiGLU.apply(parts)
    return product
