"""Products on CPUs agree with double precision, forward and backward."""

import pytest
import torch

from megatron_espo.model import weight_gradients
from megatron_espo.model.cpu import matmul

DTYPE = torch.float64


@pytest.fixture(params=[True, False], ids=["amd", "other"], autouse=True)
def _processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the rules of either kind of processors with AVX-512, and call small products large."""
    monkeypatch.setattr(matmul, "_has_avx512", lambda: True)
    monkeypatch.setattr(matmul, "_is_amds", lambda: request.param)
    monkeypatch.setattr(matmul, "_LARGE_PRODUCT", 2**14)


@pytest.mark.parametrize("shape", [(3,), (7, 2), (1, 1), (17, 1), (40, 3), (150, 2)])
@pytest.mark.parametrize("outputs", [12, 5000])
def test_linear_and_its_gradients(shape: tuple[int, ...], outputs: int) -> None:
    """Few rows and more, small weights and large ones; the logits may be overwritten in place."""
    torch.manual_seed(1)
    hidden = torch.randn(*shape, 220, requires_grad=True)
    weight = torch.randn(outputs, 220, requires_grad=True)
    upstream = torch.randn(*shape, outputs)
    output = matmul.linear(hidden, weight)
    assert output.is_contiguous()
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
        # Sums of up to 5,000 terms: some units in the last place of the largest sum.
        assert (found - expected).abs().max() < 5e-6 * expected.abs().max()


@pytest.mark.parametrize("rows", [3, 33, 150])
def test_forward_is_the_same_with_and_without_gradients(rows: int) -> None:
    """Old and new ELBOs of unchanged weights are equal to the bit: the ratio starts at 1.

    Whether the weight could get a gradient and how the rows lie in memory changes nothing.
    """
    for hidden in (torch.randn(rows, 2, 512), torch.randn(2, rows, 512).transpose(0, 1)):
        for outputs in (512, 4096):
            weight = torch.randn(outputs, 512, requires_grad=True)
            with torch.no_grad():
                plain = matmul.linear(hidden, weight.detach())
            assert torch.equal(plain, matmul.linear(hidden, weight))
            assert torch.equal(plain, matmul.linear(hidden.contiguous(), weight))


@pytest.mark.parametrize("rows", [1, 3, 33, 600])
def test_product_laid_out_by_features(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of each feature lie side by side where the weight is large; gradients are right."""
    torch.manual_seed(1)
    monkeypatch.setattr(matmul, "_has_avx512", lambda: False)
    hidden = torch.randn(rows, 2, 64, requires_grad=True)
    weight = torch.randn(4096, 64, requires_grad=True)
    output = matmul.linear(hidden, weight, by_features=True)
    assert output.stride() == (2, 1, 2 * rows)
    upstream = torch.randn(rows, 2, 4096)
    output.backward(upstream)
    with torch.no_grad():
        assert torch.equal(matmul.linear(hidden, weight, by_features=True), output)
        small = matmul.linear(hidden, weight[:4095], by_features=True)
    assert small.is_contiguous()
    exact = hidden.detach().to(DTYPE) @ weight.detach().to(DTYPE).t()
    assert (output - exact).abs().max() < 5e-6 * exact.abs().max()
    for found, expected in (
        (hidden.grad, upstream.to(DTYPE) @ weight.detach().to(DTYPE)),
        (weight.grad, torch.einsum("rbn,rbh->nh", upstream.to(DTYPE), hidden.detach().to(DTYPE))),
    ):
        assert found is not None
        assert (found - expected).abs().max() < 5e-6 * expected.abs().max()


def test_gradient_is_added_to_the_buffer_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_gradients, "_BLOCK_ON_CPU", 100)
    weight, hidden = torch.randn(250, 64, requires_grad=True), torch.randn(7, 3, 64)
    weight.main_grad = before = torch.randn(250, 64)  # type: ignore[attr-defined]
    expected = before.to(DTYPE) + torch.ones(250, 21, dtype=DTYPE) @ hidden.flatten(0, 1).to(DTYPE)
    matmul.linear(hidden, weight).sum().backward()
    assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]
    assert (before - expected).abs().max() < 5e-6 * expected.abs().max()


def test_frozen_weight_gets_no_gradient() -> None:
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(6, 8)
    matmul.linear(hidden, weight).sum().backward()
    torch.testing.assert_close(hidden.grad, weight.sum(0).expand(5, 8))
    assert weight.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_are_left_to_pytorch(dtype: torch.dtype) -> None:
    assert matmul.is_handled(torch.ones(1), torch.ones(1))
    assert not matmul.is_handled(torch.ones(1, dtype=dtype), torch.ones(1))
    assert not matmul.is_handled(torch.ones(1), torch.ones(1, dtype=dtype))
