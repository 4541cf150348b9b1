"""The sampler's rows: random numbers of several steps drawn at once are those of each step."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_espo.config import RolloutConfig
from megatron_espo.generation.rows import lay_out_rows
from megatron_espo.passes.shapes import Shapes
from megatron_espo.random import stream, uniform
from megatron_espo.rl.update import check_gradient


def test_numbers_of_a_step_do_not_depend_on_when_they_are_drawn() -> None:
    """Rows at steps and in blocks of their own, beyond what is drawn at once."""
    model: Any = SimpleNamespace(shapes=Shapes(), pad_token_id=0, mask_token_id=9, blocks=None)
    config, ids = RolloutConfig(12, 4, 120), torch.tensor([7, 2**40, 3])
    rows = lay_out_rows(model, [[1], [1, 2], [1, 2, 3]], ids, config, num_steps=40)
    assert rows.numbers.size(1) < 40 - 16
    for turn in range(60):
        # The second row starts late, the third is in another block after some steps.
        index = torch.tensor([row for row, start in ((0, 0), (1, 5), (2, 0)) if turn >= start])
        if turn == 21:
            rows.enter_next_block(torch.tensor([2]))
        found = rows.noise(index, 17, "test")
        for row, numbers in zip(index.tolist(), found, strict=True):
            step = int(rows.step[row])
            key = stream(17, "token/test", int(rows.block[row]))
            whole = uniform(key, rows.sample_ids[row : row + 1], (step + 1) * 8)
            assert torch.equal(numbers.flatten(), whole[0, step * 8 :])
        rows.step[index] += 1
    assert rows.block.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("norm", "succeeded", "named"),
    [(float("nan"), True, "nan"), (float("inf"), True, "inf"), (None, False, "inf or nan")],
)
def test_a_gradient_that_is_not_finite_is_named(
    norm: float | None, succeeded: bool, named: str
) -> None:
    with pytest.raises(RuntimeError, match=f"optimizer step 3 is {named};"):
        check_gradient(norm, succeeded, 3)
    check_gradient(0.0, True, 3)
