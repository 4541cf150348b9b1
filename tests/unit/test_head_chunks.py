"""An output head in chunks: the values and gradients of the whole one, and never all logits."""

from functools import partial
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from test_float_logits import H, N, R, hidden_states, make_head
from torch import Tensor

from megatron_espo.adapters.adapter import Adapter, Packing
from megatron_espo.adapters.attach import _adapted
from megatron_espo.model.float_logits import use_float_logits
from megatron_espo.parallel.vocab import cross_entropy
from megatron_espo.passes.head import ByRows, HeadInput, select_rows

VOCAB = N - 3
TARGETS = torch.tensor([0, 7, VOCAB - 1, 3, 11, 20])


class Seen:
    """Counts the rows whose logits a function is given."""

    def __init__(self, group: Any) -> None:
        self.rows: list[int] = []
        self._losses = partial(cross_entropy, vocab_size=VOCAB, group=group)

    def __call__(self, logits: Tensor, targets: Tensor, payload: Any) -> Tensor:
        self.rows.append(logits.size(0))
        assert logits.dtype == torch.float32
        return self._losses(logits, targets)


def select(
    head: Any, states: Tensor, payload: Any, function: Any, weight: Tensor | None = None
) -> Tensor:
    context = (HeadInput(R, None, None, payload), function)
    return select_rows(
        hidden_states=states, output_layer=head, output_weight=weight, context=context,
        scale_logits=lambda x: x,
    )  # fmt: skip


def with_adapter(head: ColumnParallelLinear, group: Any) -> None:
    adapter = Adapter(
        ("lm_head",), Packing({"lm_head": N}, 1, H, True), 4, 2.0, head.weight.dtype,
        head.weight.device, group, False,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(8)
    for parameter in adapter.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    head.weight.requires_grad_(False)
    head.adapter = adapter
    head.__class__ = _adapted(type(head), False)


def losses_and_gradients(
    head: ColumnParallelLinear,
    group: Any,
    chunk: int | None,
    output_weight: Tensor | None = None,
) -> tuple[dict[str, Tensor], list[int]]:
    """Losses, gradients of a function of them by name, and rows of logits in order of calls."""
    weight = head.weight if output_weight is None else output_weight
    head.chunk_rows, seen = chunk, Seen(group)
    states = hidden_states(head.weight.dtype)
    calls: list[Tensor] = []
    for parameter in {weight, *head.parameters()}:
        parameter.grad = None
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(calls.append)
    function = ByRows(seen, lambda payload: payload, lambda losses, _: losses.square())
    found = select(head, states, TARGETS, function, output_weight)
    found.sum().backward()
    named = {"states": states, **dict(head.named_parameters()), "used weight": weight}
    result = {n: p.grad for n, p in named.items() if p.grad is not None}
    # Megatron's hooks count the gradients of a micro-batch: one for each parameter.
    trained = {id(p) for p in named.values() if p.grad is not None and p is not states}
    assert len(calls) == len(trained) and {id(p) for p in calls} == trained
    return {"losses": found.detach(), **result}, seen.rows


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype, name
        difference = (ours[name].double() - expected.double()).abs().max()
        assert difference <= tolerance * expected.double().abs().max(), name
        assert expected.abs().max() > 0, name


@pytest.mark.parametrize("kind", ["plain", "tied", "adapter"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 4])
def test_chunks_give_the_losses_and_gradients_of_the_whole_head(
    one_rank: Any, kind: str, dtype: torch.dtype, chunk: int
) -> None:
    results = []
    for rows in (None, chunk):
        head = make_head(one_rank, dtype)
        use_float_logits(head, fused=True)
        weight = torch.nn.Parameter(head.weight.detach() * 0.5) if kind == "tied" else None
        if kind == "adapter":
            with_adapter(head, one_rank)
        results.append(losses_and_gradients(head, one_rank, rows, weight))
    (whole, at_once), (parts, seen) = results
    assert at_once == [R] and max(seen) == chunk and sum(seen) == 2 * R
    # Gradients of bf16 are rounded once in either case, after another order of adding.
    assert_same(parts, whole, 1e-5 if dtype == torch.float32 else 2**-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_add_the_weights_gradient_to_the_buffer(one_rank: Any, dtype: torch.dtype) -> None:
    wanted, _ = losses_and_gradients(make_float(one_rank), one_rank, None)
    head = make_head(one_rank, dtype)
    use_float_logits(head, fused=True)
    before = torch.randn(N, H, generator=torch.Generator().manual_seed(6))
    head.weight.main_grad = before.clone()
    head.weight.grad_added_to_main_grad = False
    found, _ = losses_and_gradients(head, one_rank, 4)
    assert head.weight.grad_added_to_main_grad
    assert found["used weight"].data_ptr() == head.weight.data_ptr()  # takes no memory
    added = head.weight.main_grad - before
    scale = wanted["used weight"].abs().max()
    assert (added - wanted["used weight"]).abs().max() < (
        1e-5 if dtype == torch.float32 else 2e-2
    ) * scale


def make_float(group: Any) -> ColumnParallelLinear:
    head = make_head(group, torch.float32)
    use_float_logits(head)
    return head


def test_copies_of_rows_stay_together_without_gradients(one_rank: Any) -> None:
    """As guidance wants it: a row's logits with the prompt beside those without."""
    head = make_float(one_rank)
    states, values = hidden_states(torch.float32).detach(), torch.arange(R // 2)
    seen: list[int] = []

    def difference(logits: Tensor, values: Tensor, payload: Any) -> Tensor:
        seen.append(logits.size(0))
        first, second = logits.chunk(2)
        return torch.stack(((first - second).sum(1), values.float()))

    function = ByRows(difference, lambda payload: payload, lambda found, _: found, copies=2)
    results = []
    for chunk in (None, 4, 1):
        head.chunk_rows = chunk
        with torch.no_grad():
            results.append(select(head, states, values, function))
    assert seen == [R, 4, 2, 2, 2, 2] and results[0].shape == (2, R // 2)
    for found in results[1:]:
        torch.testing.assert_close(found, results[0])


def test_functions_of_all_logits_get_them_at_once(one_rank: Any) -> None:
    head = make_float(one_rank)
    head.chunk_rows = 2
    logits = select(head, hidden_states(torch.float32), None, lambda logits, _: logits)
    assert logits.shape == (R, N)
