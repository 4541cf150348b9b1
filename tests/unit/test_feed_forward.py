"""SwiGLU agrees with double precision, forward and backward, in either layout."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megatron_espo.model.cpu.feed_forward import swiglu

ROWS, F = 7, 5


def parts_of(dtype: torch.dtype, by_features: bool) -> Tensor:
    """Gates and linear parts as a projection gives them, ``[r, 1, 2 f]``."""
    generator = torch.Generator().manual_seed(1)
    parts = 3 * torch.randn(ROWS, 1, 2 * F, generator=generator, dtype=torch.float64).to(dtype)
    return parts.flatten(0, 1).t().contiguous().t()[:, None] if by_features else parts


@pytest.mark.parametrize("by_features", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)]
)
def test_swiglu_and_its_gradient(by_features: bool, dtype: torch.dtype, tolerance: float) -> None:
    ours = parts_of(dtype, by_features).requires_grad_()
    exact = parts_of(torch.float64, False).to(dtype).double().requires_grad_()
    gate, linear = exact[..., :F], exact[..., F:]
    expected = gate / (1 + (-gate).exp()) * linear
    product = swiglu(ours)
    upstream = torch.randn(ROWS, 1, F, generator=torch.Generator().manual_seed(2)).to(dtype)
    product.backward(upstream)
    expected.backward(upstream.double())
    assert product.dtype == dtype and ours.grad is not None and exact.grad is not None
    assert product.stride() == functional.silu(ours.detach()[..., :F]).stride()
    for found, right in ((product, expected), (ours.grad, exact.grad)):
        assert (found - right).abs().max() <= tolerance * right.abs().max()


def test_swiglu_is_the_same_with_and_without_gradients() -> None:
    """Old and new ELBOs of unchanged weights are equal to the bit: the ratio starts at 1."""
    parts = parts_of(torch.float32, False)
    before = parts.clone()
    with torch.no_grad():
        plain = swiglu(parts)
    assert torch.equal(plain, swiglu(parts.clone().requires_grad_()))
    assert torch.equal(parts, before)


def test_swiglu_keeps_only_its_input_for_the_backward_pass() -> None:
    kept: list[Tensor] = []
    parts = parts_of(torch.float32, False).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        swiglu(parts)
    assert [tensor.data_ptr() for tensor in kept] == [parts.data_ptr()]
