"""Matrix products of float32 on CPUs, each with the kernel that is the fastest for its sizes.

PyTorch sends float32 products on x86 to MKL. For few rows and a large weight, such as an output
head, oneDNN's kernels, which are part of the same PyTorch, take less time; how few depends on the
processor. Where a product's reader takes it laid out by features, MKL is at its fastest with the
weight as the left factor. With AVX-512 on AMD's processors, which MKL makes no use of there, all
products but small ones are oneDNN's, in the backward pass, too (docs/measurements has figures).
Nothing here is used on GPUs.

Symbols: r rows, h input features, n output features.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_espo.model.weight_gradients import add_weight_gradient, has_buffer

# Up to this many rows oneDNN's kernel is the faster one.
_FEW_ROWS_WITH_AVX512, _FEW_ROWS = 48, 256
# Weights of fewer entries are MKL's, whose call costs some 30 microseconds less.
_LARGE_WEIGHT = 2**20
# From this many entries on the weight goes to the left where it may.
_LEFT_WEIGHT = 2**18
# Where MKL is slow: a product of as many multiplications earns the dearer call back.
_LARGE_PRODUCT = 2**20


def is_handled(*tensors: Tensor) -> bool:
    """Say whether :func:`linear` takes these tensors: float32 on a CPU.

    Args:
        *tensors: input and weight.
    """
    for tensor in tensors:
        if not tensor.is_cpu or tensor.dtype != torch.float32:
            return False
    return _has_kernel()


@cache
def _has_kernel() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@cache
def _has_avx512() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


@cache
def _is_amds() -> bool:
    """Say whether the processor is AMD's, as far as the system tells."""
    file = Path("/proc/cpuinfo")
    return file.exists() and "AuthenticAMD" in file.read_text()


def _is_onednns(multiplications: int) -> bool:
    """Say whether oneDNN makes a product of that many, whatever its form."""
    return _has_avx512() and _is_amds() and multiplications >= _LARGE_PRODUCT


def _onednn(rows: Tensor, weight: Tensor) -> Tensor:
    """Compute ``rows weight^T`` with oneDNN."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "")
    return product


def _few_rows() -> int:
    return _FEW_ROWS_WITH_AVX512 if _has_avx512() else _FEW_ROWS


def _product(hidden: Tensor, weight: Tensor, by_features: bool) -> Tensor:
    """Compute ``hidden weight^T`` of ``[..., h]`` and ``[n, h]``: ``[..., n]``; see `linear`."""
    entries = weight.numel()
    if _is_onednns(hidden.numel() * weight.size(0)):
        product = _onednn(hidden.flatten(0, -2), weight)
    elif by_features and entries >= _LEFT_WEIGHT and not _has_avx512():
        product = torch.mm(weight, hidden.flatten(0, -2).t()).t()
    elif entries >= _LARGE_WEIGHT and hidden.numel() <= weight.size(1) * _few_rows():
        product = _onednn(hidden.flatten(0, -2), weight)
    elif hidden.is_contiguous():
        return torch.nn.functional.linear(hidden, weight)
    else:
        # A weight without a gradient would be multiplied batch by batch by the function above.
        product = torch.mm(hidden.flatten(0, -2), weight.t())
    # No view for autograd: logits are worked on in place, which it forbids on a function's views.
    shaped: Tensor = torch.ops.aten._unsafe_view(product, (*hidden.shape[:-1], weight.size(0)))
    return shaped


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, by_features: bool) -> Tensor:
        # A frozen weight has no use for the input.
        ctx.save_for_backward(hidden if ctx.needs_input_grad[1] else None, weight)
        return _product(hidden, weight, by_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden, weight = ctx.saved_tensors
        of_hidden = of_weight = None
        # On other processors MKL's kernels are as fast or faster here.
        is_onednns = _is_onednns(gradient.numel() * weight.size(1))
        if ctx.needs_input_grad[0] and is_onednns:
            product = _onednn(gradient.flatten(0, -2), weight.t())
            of_hidden = product.view(*gradient.shape[:-1], weight.size(1))
        elif ctx.needs_input_grad[0]:
            of_hidden = gradient @ weight
        if ctx.needs_input_grad[1] and has_buffer(weight):
            # oneDNN's product has the type of its factors.
            own = is_onednns and weight.main_grad.dtype == gradient.dtype
            of_weight = add_weight_gradient(weight, gradient, hidden, _onednn if own else None)
        elif ctx.needs_input_grad[1]:
            of_weight = gradient.flatten(0, -2).t() @ hidden.flatten(0, -2)
        return of_hidden, of_weight, None


def linear(hidden: Tensor, weight: Tensor, by_features: bool = False) -> Tensor:
    """Multiply with a weight, as ``torch.nn.functional.linear`` does.

    The result is the same with and without gradients, to the bit: ESPO's ratio starts at 1. A
    weight with a gradient buffer of Megatron's gets its gradient there.

    Args:
        hidden: ``[..., h]``.
        weight: ``[n, h]``.
        by_features: the product may be laid out by features, the rows of each side by side, where
            that is the faster one.

    Returns:
        ``[..., n]``, with gradients to both; contiguous unless ``by_features``.
    """
    if not torch.is_grad_enabled():
        return _product(hidden, weight, by_features)
    output: Tensor = _Linear.apply(hidden, weight, by_features)
    return output
