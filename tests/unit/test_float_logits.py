"""An output head in half precision whose logits are not rounded."""

import pytest
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_espo.model import float_logits, weight_gradients
from megatron_espo.model.cpu import matmul
from megatron_espo.model.float_logits import use_float_logits
from megatron_espo.parallel.vocab import cross_entropy

R, H, N = 6, 64, 50


def make_head(group: object, dtype: torch.dtype) -> ColumnParallelLinear:
    config = TransformerConfig(
        num_layers=1, hidden_size=H, num_attention_heads=1, params_dtype=dtype,
        use_cpu_initialization=True,
    )  # fmt: skip
    torch.manual_seed(3)
    return ColumnParallelLinear(
        H, N, config=config, init_method=lambda w: torch.nn.init.normal_(w, std=0.5), bias=False,
        tp_group=group,
    )  # fmt: skip


def hidden_states(dtype: torch.dtype) -> Tensor:
    states = torch.randn(R, 1, H, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return states.to(dtype).requires_grad_()


def run(head: ColumnParallelLinear, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, and the gradients of a fixed function of them to hidden states and weights."""
    states = hidden_states(dtype)
    logits = head(states)[0]
    factor = torch.randn(R, 1, N, generator=torch.Generator().manual_seed(5))
    (logits.float() * factor).sum().backward()
    assert states.grad is not None
    return logits.detach(), states.grad, head.weight.grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_are_float32_and_the_gradient_is_megatrons(
    one_rank: object, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(float_logits, "_BLOCK", 16)  # N is not a multiple
    plain, ours = make_head(one_rank, dtype), make_head(one_rank, dtype)
    use_float_logits(ours)
    rounded, *gradients = run(plain, dtype)
    logits, *our_gradients = run(ours, dtype)
    assert (rounded.dtype, logits.dtype) == (dtype, torch.float32)
    exact = hidden_states(dtype).detach().double() @ plain.weight.detach().double().t()
    assert logits.shape == exact.shape == (R, 1, N)
    torch.testing.assert_close(logits.double(), exact, rtol=1e-6, atol=1e-5)
    assert (rounded.double() - exact).abs().max() > 1e-3
    for their, our in zip(gradients, our_gradients, strict=True):
        assert our.dtype == dtype and torch.equal(our, their)


def test_fused_weight_gradient_is_added_in_float32(
    one_rank: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_gradients, "_BLOCK", 16)  # N is not a multiple
    plain, ours = make_head(one_rank, torch.bfloat16), make_head(one_rank, torch.bfloat16)
    use_float_logits(plain)
    use_float_logits(ours, fused=True)
    before = torch.randn(N, H, generator=torch.Generator().manual_seed(6))
    weight = ours.weight
    weight.main_grad, weight.grad_added_to_main_grad = before.clone(), False
    logits, states, rounded = run(plain, torch.bfloat16)
    our_logits, our_states, _ = run(ours, torch.bfloat16)
    assert torch.equal(our_logits, logits) and torch.equal(our_states, states)
    assert weight.grad_added_to_main_grad
    # What autograd gets takes no memory, and is not written to.
    assert weight.grad.data_ptr() == weight.data_ptr() and torch.equal(weight, plain.weight)
    factor = torch.randn(R, 1, N, generator=torch.Generator().manual_seed(5)).bfloat16()
    exact = (
        factor.double().flatten(0, 1).t() @ hidden_states(torch.bfloat16).detach().double()[:, 0]
    )
    added = weight.main_grad.double() - before.double()
    assert (added - exact).abs().max() / exact.abs().max() < 1e-6
    assert (rounded.double() - exact).abs().max() / exact.abs().max() > 1e-4


def test_fused_heads_leave_gradients_to_autograd_without_a_buffer_of_their_own(
    one_rank: object,
) -> None:
    plain = make_head(one_rank, torch.bfloat16)
    use_float_logits(plain)
    _, _, wanted = run(plain, torch.bfloat16)
    for tied in (False, True):
        ours = make_head(one_rank, torch.bfloat16)
        use_float_logits(ours, fused=True)
        if tied:
            ours.weight.main_grad, ours.weight.zero_out_wgrad = torch.zeros(N, H), True
        _, _, found = run(ours, torch.bfloat16)
        assert torch.equal(found, wanted)
        assert not tied or not ours.weight.main_grad.any()


def test_gradient_is_that_of_double_precision_up_to_the_weights_type(one_rank: object) -> None:
    head = make_head(one_rank, torch.bfloat16)
    use_float_logits(head)
    _, states, weights = run(head, torch.bfloat16)
    exact_head = head.weight.detach().double().requires_grad_()
    exact_states = hidden_states(torch.bfloat16).detach().double().requires_grad_()
    factor = torch.randn(R, 1, N, generator=torch.Generator().manual_seed(5)).double()
    (exact_states @ exact_head.t() * factor).sum().backward()
    for ours, exact in ((states, exact_states.grad), (weights, exact_head.grad)):
        assert exact is not None
        assert ((ours.double() - exact).abs().max() / exact.abs().max()) < 2**-7


def test_heads_in_float32_have_the_product_of_the_layers(one_rank: object) -> None:
    plain, ours = make_head(one_rank, torch.float32), make_head(one_rank, torch.float32)
    use_float_logits(ours)
    rounded, *gradients = run(plain, torch.float32)
    logits, *our_gradients = run(ours, torch.float32)
    states = hidden_states(torch.float32).detach()
    assert torch.equal(logits, matmul.linear(states, ours.weight.detach()))
    torch.testing.assert_close(logits, rounded)
    for their, our in zip(gradients, our_gradients, strict=True):
        assert torch.equal(their, our)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_may_be_overwritten(one_rank: object, dtype: torch.dtype) -> None:
    """Megatron's cross entropy turns a view of them into its gradient, in place."""
    head = make_head(one_rank, dtype)
    use_float_logits(head)
    logits = head(hidden_states(dtype))[0].squeeze(1)
    cross_entropy(logits, torch.arange(R), N, one_rank).sum().backward()
    assert head.weight.grad.abs().sum() > 0
