"""Logits in float32 where the model computes in half precision.

A logit of 20 lies 0.125 from the next one in bf16. Policies are compared through differences of
log-probabilities that are far smaller (ESPO's published clip ranges per token begin at 3e-4), and
the matrix product adds up in float32 anyway: its result is kept as it is instead of being rounded.
docs/fp8.md says what that is worth.

Symbols: r rows, h hidden size, n vocabulary entries of this rank.
"""

import inspect
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    LinearWithGradAccumulationAndAsyncCommunication,
)
from torch import Tensor

from megatron_espo.model.cpu.linear import multiply
from megatron_espo.model.weight_gradients import add_weight_gradient, has_buffer

# What Megatron's autograd function takes, by position, after the context, input and weight.
# Versions differ: 0.20 has an output_dtype.
_OPTIONS = tuple(
    inspect.signature(LinearWithGradAccumulationAndAsyncCommunication.forward).parameters
)[3:]
# Vocabulary entries whose weights are held in float32 at a time where the device has no product
# of half-precision matrices with a float32 result.
_BLOCK = 4096


def float_product(hidden: Tensor, weight: Tensor) -> Tensor:
    """Multiply matrices of half precision into float32, without a gradient.

    Args:
        hidden: bf16 or fp16 ``[..., h]``.
        weight: ``[n, h]`` of the same type.

    Returns:
        float32 ``[..., n]``.
    """
    # No view: what follows works in place, which autograd forbids on views from a function.
    logits = hidden.new_empty(*hidden.shape[:-1], weight.size(0), dtype=torch.float32)
    rows, out = hidden.flatten(0, -2), logits.view(-1, weight.size(0))
    if rows.is_cuda:
        torch.mm(rows, weight.t(), out_dtype=torch.float32, out=out)
    else:
        rows = rows.float()
        for part, place in zip(weight.split(_BLOCK), out.split(_BLOCK, dim=1), strict=True):
            place.copy_(rows @ part.float().t())
    return logits


class _FloatLogits(LinearWithGradAccumulationAndAsyncCommunication):
    """Megatron's product of a column-parallel layer with a float32 result.

    The backward pass is Megatron's, with its sum over the tensor-parallel ranks and its fused
    accumulation; the gradient comes to it rounded to the weights' type, as it does from a head
    whose logits are cast to float32.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, *options: Any) -> Tensor:
        # On no rows: all that Megatron notes down for the backward pass, without its product.
        LinearWithGradAccumulationAndAsyncCommunication.forward(ctx, hidden[:0], weight, *options)
        ctx.save_for_backward(hidden, weight)
        return float_product(hidden, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        _, weight = ctx.saved_tensors
        return LinearWithGradAccumulationAndAsyncCommunication.backward(
            ctx, gradient.to(weight.dtype)
        )


class _FusedFloatLogits(_FloatLogits):
    """The same whose weight gradient is added to Megatron's buffer in float32, without apex."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        hidden, weight = ctx.saved_tensors
        if not (ctx.needs_input_grad[1] and has_buffer(weight)):
            return _FloatLogits.backward(ctx, gradient)
        gradient = gradient.to(weight.dtype)
        of_hidden, waiting = gradient @ weight, None
        if ctx.allreduce_dgrad:
            waiting = dist.all_reduce(of_hidden, group=ctx.tp_group, async_op=True)
        of_weight = add_weight_gradient(weight, gradient, hidden)
        if waiting is not None:
            waiting.wait()
        return of_hidden, of_weight, *(None for _ in _OPTIONS)


class _FrozenFloatLogits(torch.autograd.Function):
    """The same for a weight that is not trained: neither its gradient nor the input is kept."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, *options: Any) -> Tensor:
        named = dict(zip(_OPTIONS, options, strict=True))
        ctx.save_for_backward(weight)
        ctx.group = named["tp_group"] if named["allreduce_dgrad"] else None
        return float_product(hidden, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        of_hidden = gradient.to(weight.dtype) @ weight
        if ctx.group is not None:
            dist.all_reduce(of_hidden, group=ctx.group)
        return of_hidden, None, *(None for _ in _OPTIONS)


def use_float_logits(head: ColumnParallelLinear, fused: bool = False) -> None:
    """Let an output head give float32 logits for weights in half precision.

    Args:
        head: the head, without a bias; one in float32 gets the product of the other layers.
        fused: whether its weight gradient is added to Megatron's buffer where it is computed.
    """
    plain, product = head._forward_impl, _FusedFloatLogits if fused else _FloatLogits

    def forward(input: Tensor, weight: Tensor, **options: Any) -> Any:
        # Weights in parts on several ranks (--tensor-parallel-num-weight-shards) are gathered in
        # Megatron's own product.
        if weight.dtype == torch.float32 or options["gtp_remat_size"] != 1:
            return multiply(plain, input, weight, **options)
        assert options["bias"] is None and not options["sequence_parallel"]
        function = product if weight.requires_grad else _FrozenFloatLogits
        return function.apply(input, weight, *(options[name] for name in _OPTIONS))

    head._forward_impl = forward
