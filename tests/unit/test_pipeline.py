"""Passes without gradients through pipeline stages: one call of the schedule per run of a shape."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_espo.passes import pipeline
from megatron_espo.passes.pipeline import RowBatch, forward_only


def batch(b: int, s: int, name: int) -> RowBatch:
    none = torch.zeros(0, dtype=torch.int64)
    return RowBatch(torch.full((b, s), name), torch.full((b,), s), none, none)


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("new_weights", [False, True])
def test_each_run_of_a_shape_is_one_call_and_only_the_first_has_new_weights(
    chunks: int, new_weights: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def schedule(**call: Any) -> list[Tensor]:
        iterator = call["data_iterator"][-1] if chunks > 1 else call["data_iterator"]
        batches = list(iterator)
        assert len(batches) == call["num_microbatches"]
        shape = call["micro_batch_size"], call["seq_length"]
        assert all(tuple(one.tokens.shape) == shape for one in batches)
        calls.append((*shape, len(batches), call["first_val_step"]))
        return [one.tokens[0, 0] for one in batches]

    monkeypatch.setattr(pipeline, "get_forward_backward_func", lambda: schedule)
    layout: Any = SimpleNamespace(pp_size=2, experts=None)
    model: Any = [object()] * chunks
    shapes = [(2, 9), (2, 9), (2, 9), (2, 7), (1, 7)]
    batches = [batch(*shape, name) for name, shape in enumerate(shapes)]
    found = forward_only(
        model, batches, lambda logits, _: logits, logit_shift=False, layout=layout,
        new_weights=new_weights,
    )  # fmt: skip
    assert [int(one) for one in found] == [0, 1, 2, 3, 4]
    # Virtual stages fill their rounds of two.
    numbers = [4, 2, 2] if chunks > 1 else [3, 1, 1]
    assert calls == [
        (2, 9, numbers[0], new_weights), (2, 7, numbers[1], False), (1, 7, numbers[2], False),
    ]  # fmt: skip
