"""Matrix products of float32 on CPUs, with oneDNN's kernels where they are the faster ones.

PyTorch sends float32 products on x86 to MKL. For few rows and a large weight, such as an output
head, oneDNN's kernels, which are part of the same PyTorch, take less time (docs/performance.md has
figures); how few depends on the processor. Nothing here is used on GPUs.

Symbols: r rows, h input features, n output features.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Up to this many rows oneDNN's kernel is the faster one.
_FEW_ROWS_WITH_AVX512, _FEW_ROWS = 48, 256
# Weights of fewer entries are MKL's, whose call costs some 30 microseconds less.
_LARGE_WEIGHT = 2**20


def is_handled(*tensors: Tensor) -> bool:
    """Say whether :func:`linear` takes these tensors: float32 on a CPU.

    Args:
        *tensors: input and weight.
    """
    return _has_kernel() and all(
        tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors
    )


@cache
def _has_kernel() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@cache
def _few_rows() -> int:
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return _FEW_ROWS_WITH_AVX512 if has_avx512 else _FEW_ROWS


def _product(hidden: Tensor, weight: Tensor) -> Tensor:
    """Compute ``hidden weight^T`` of ``[..., h]`` and ``[n, h]``: ``[..., n]``, contiguous."""
    rows = hidden.flatten(0, -2)
    if rows.size(0) > _few_rows() or weight.numel() < _LARGE_WEIGHT:
        product = torch.mm(rows, weight.t())
    else:
        product = torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "")
    # No view for autograd: logits are worked on in place, which it forbids on a function's views.
    shaped: Tensor = torch.ops.aten._unsafe_view(product, (*hidden.shape[:-1], weight.size(0)))
    return shaped


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return _product(hidden, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        hidden, weight = ctx.saved_tensors
        of_hidden = of_weight = None
        # Here MKL's kernels are as fast or faster.
        if ctx.needs_input_grad[0]:
            of_hidden = gradient @ weight
        if ctx.needs_input_grad[1]:
            of_weight = gradient.flatten(0, -2).t() @ hidden.flatten(0, -2)
        return of_hidden, of_weight


def linear(hidden: Tensor, weight: Tensor) -> Tensor:
    """Multiply with a weight, as ``torch.nn.functional.linear`` does.

    The result is the same with and without gradients, to the bit: ESPO's ratio starts at 1.

    Args:
        hidden: ``[..., h]``.
        weight: ``[n, h]``.

    Returns:
        ``[..., n]``, with gradients to both.
    """
    if not torch.is_grad_enabled():
        return _product(hidden, weight)
    output: Tensor = _Linear.apply(hidden, weight)
    return output
