"""Products on CPUs agree with double precision, forward and backward."""

import pytest
import torch

from megatron_espo.parallel import products

DTYPE = torch.float64


@pytest.mark.parametrize("rows", [1, 2, 16, 17, 40])
@pytest.mark.parametrize("outputs", [24, 5000])
def test_wide_product(rows: int, outputs: int) -> None:
    """Few rows, more rows, narrow and wide heads; the result can be overwritten in place."""
    hidden, weight = torch.randn(rows, 48), torch.randn(outputs, 48)
    with torch.no_grad():
        logits = products.wide_product(hidden, weight)
    expected = hidden.to(DTYPE) @ weight.to(DTYPE).t()
    torch.testing.assert_close(logits.to(DTYPE), expected, rtol=1e-5, atol=1e-4)
    assert logits.is_contiguous()
    logits -= logits.clone()
    assert not logits.any()


@pytest.mark.parametrize("shape", [(3,), (7, 2), (1, 1)])
def test_linear_and_its_gradients(shape: tuple[int, ...]) -> None:
    hidden = torch.randn(*shape, 20, requires_grad=True)
    weight = torch.randn(12, 20, requires_grad=True)
    upstream = torch.randn(*shape, 12)
    output = products.linear(hidden, weight)
    output.backward(upstream)

    exact_hidden = hidden.detach().to(DTYPE).requires_grad_()
    exact_weight = weight.detach().to(DTYPE).requires_grad_()
    exact = torch.nn.functional.linear(exact_hidden, exact_weight)
    exact.backward(upstream.to(DTYPE))
    for found, expected in (
        (output, exact),
        (hidden.grad, exact_hidden.grad),
        (weight.grad, exact_weight.grad),
    ):
        assert found is not None and expected is not None
        torch.testing.assert_close(found.to(DTYPE), expected, rtol=1e-5, atol=1e-5)


def test_forward_is_the_same_with_and_without_gradients() -> None:
    """Old and new ELBOs of unchanged weights are equal to the bit: the ratio starts at 1."""
    hidden, weight = torch.randn(33, 2, 64), torch.randn(96, 64, requires_grad=True)
    with torch.no_grad():
        plain = products.linear(hidden, weight)
    assert torch.equal(plain, products.linear(hidden, weight))


def test_frozen_weight_gets_no_gradient() -> None:
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(6, 8)
    products.linear(hidden, weight).sum().backward()
    torch.testing.assert_close(hidden.grad, weight.sum(0).expand(5, 8))
    assert weight.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_are_left_to_pytorch(dtype: torch.dtype) -> None:
    assert not products.is_handled(torch.ones(1, dtype=dtype), torch.ones(1))
