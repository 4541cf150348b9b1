"""Few shapes of micro-batches, and little padding, whatever the prompts' lengths."""

import argparse
import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_espo.config import RolloutConfig
from megatron_espo.diffusion.noise import elbo_views
from megatron_espo.generation import sampler
from megatron_espo.generation.cut import PASS, Cut, cut
from megatron_espo.model.handle import DiffusionModel
from megatron_espo.passes.batch import pack_sequences, view_batches
from megatron_espo.passes.shapes import Shapes, few_widths, round_up
from megatron_espo.random import stream
from megatron_espo.startup import setup

pytestmark = pytest.mark.slow

LENGTH, LONGEST, MASK, STOP, ROWS = 256, 656, 3, 4, 24


@settings(max_examples=200, deadline=None)
@given(
    shortest=st.integers(1, 4000), longest=st.integers(1, 4000), multiple=st.integers(1, 64),
    needed=st.integers(1, 5000), most=st.integers(1, 80),
)  # fmt: skip
def test_shapes_hold_the_rows_and_are_few(
    shortest: int, longest: int, multiple: int, needed: int, most: int
) -> None:
    widths = few_widths(shortest, longest, multiple)
    shapes = Shapes(multiple, widths)
    assert len(widths) <= 16 and max(widths) >= longest
    width, sampled = shapes.width(needed), shapes.sampled_width(needed)
    assert needed <= width <= sampled and width % multiple == sampled % multiple == 0
    if shortest <= needed <= longest:
        # Within one ratio of what is needed, or two, but for rounding.
        assert width <= needed * (longest / shortest) ** (1 / 16) + multiple + 1
        assert sampled <= needed * (longest / shortest) ** (2 / 16) + 2 * multiple + 1
        assert width in widths and sampled in widths
    sizes = shapes.sampled_rows(most)
    assert max(sizes) == most and len(set(sizes)) == len(sizes)
    reached = {shapes.sampled_width(length) for length in range(1, max(longest, shortest) + 1)}
    assert len(sizes) * len(reached & set(widths)) <= 32


def least_cost(lengths: list[int], most: int, shapes: Shapes) -> int:
    """The cheapest of all ways to cut rows into runs and give each run a shape."""
    if not lengths:
        return 0
    return min(
        size * shapes.sampled_width(lengths[0]) + PASS + least_cost(lengths[taken:], most, shapes)
        for size in shapes.sampled_rows(most)
        for taken in range(1, min(size, len(lengths)) + 1)
    )


def time_of(cuts: list[Cut], stages: int) -> int:
    costs = [one.rows * one.positions + PASS for one in cuts]
    return sum(costs) + (stages - 1) * max(costs)


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(LENGTH + 1, LONGEST + 50), min_size=1, max_size=4),
    most=st.integers(1, 20), stages=st.integers(2, 4),
)  # fmt: skip
def test_a_step_is_cut_into_the_passes_that_take_the_least_time(
    lengths: list[int], most: int, stages: int
) -> None:
    lengths = sorted(lengths, reverse=True)
    shapes = Shapes(2, few_widths(LENGTH + 1, LONGEST, 2))
    cuts = cut(lengths, most, shapes)
    assert time_of(cuts, 1) == least_cost(lengths, most, shapes)
    assert time_of(cut(lengths, most, shapes, stages), stages) <= time_of(cuts, stages)


def test_pipeline_stages_get_smaller_passes() -> None:
    shapes = Shapes(2, few_widths(LENGTH + 1, LONGEST, 2))
    lengths = [400] * 24
    assert [one.rows for one in cut(lengths, 24, shapes)] == [24]
    assert {one.rows for one in cut(lengths, 24, shapes, 2)} == {3}


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(LENGTH + 1, LONGEST + 50), min_size=1, max_size=99),
    most=st.integers(1, 40), stages=st.integers(1, 4), virtual=st.booleans(),
)  # fmt: skip
def test_the_passes_of_a_step_hold_its_rows_once(
    lengths: list[int], most: int, stages: int, virtual: bool
) -> None:
    lengths = sorted(lengths, reverse=True)
    shapes = Shapes(2, few_widths(LENGTH + 1, LONGEST, 2))
    together = stages if virtual else 1
    cuts = cut(lengths, most, shapes, stages, together)
    assert [row for one in cuts for row in range(one.start, one.stop)] == list(range(len(lengths)))
    for one in cuts:
        assert one.rows in shapes.sampled_rows(most) and 0 < one.stop - one.start <= one.rows
        assert one.positions >= lengths[one.start]
        assert one.positions in {shapes.sampled_width(length) for length in lengths}
    # Virtual stages work in rounds; only the last one may be filled up.
    runs = [len(list(run)) for _, run in itertools.groupby(cuts, lambda one: one[2:])]
    assert all(run % together == 0 for run in runs[:-1])


@given(needed=st.integers(1, 5000), multiple=st.integers(1, 64))
def test_without_widths_shapes_are_exact(needed: int, multiple: int) -> None:
    assert Shapes(multiple).width(needed) == round_up(needed, multiple)


def mixed_lengths(n: int, seed: int) -> list[int]:
    """Prompt lengths as of gsm8k: 50 to 400 tokens, most of them short."""
    draws = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    return (120 * (0.45 * draws).exp()).clamp(50, LONGEST - LENGTH).long().tolist()


class Passes:
    """Stands for the model: notes the shapes of its passes and draws tokens from a generator."""

    def __init__(self, stop: float) -> None:
        self.generator, self.stop = torch.Generator().manual_seed(5), stop
        self.shapes: list[tuple[int, int]] = []

    def __call__(self, chunks: Any, batches: Any, *_: Any, **__: Any) -> list[Tensor]:
        found = []
        for batch in batches:
            self.shapes.append(tuple(batch.tokens.shape))
            r = batch.payload.numel()
            draws = torch.rand(4, r, generator=self.generator, dtype=torch.float64)
            draws[0] = torch.where(draws[0] < self.stop, STOP, 9)
            found.append(draws)
        return found


def model(pp_size: int, few: bool, widths: tuple[int, ...] = ()) -> DiffusionModel:
    layout: Any = SimpleNamespace(pp_size=pp_size, is_last_stage=True, experts=None)
    widths = widths or (few_widths(LENGTH + 1, LONGEST, 2) if few else ())
    cpu = torch.device("cpu")
    return DiffusionModel((), MASK, 0, (STOP,), STOP, 300, False, 2, cpu, layout, widths)


CASES = {
    "steps": RolloutConfig(LENGTH, 32, 16, micro_batch_size=ROWS),
    "early stop": RolloutConfig(LENGTH, 32, 16, micro_batch_size=ROWS, early_stop=True),
    "threshold": RolloutConfig(LENGTH, 32, threshold=0.8, early_stop=True, micro_batch_size=ROWS),
}


def sampled(
    config: RolloutConfig,
    pp_size: int,
    n: int,
    few: bool,
    patch: pytest.MonkeyPatch,
    widths: tuple[int, ...] = (),
) -> tuple[int, float]:
    """Sample a run's rollouts of n completions, in groups of eight; shapes and share of padding."""
    passes, positions = Passes(stop=0.004), 0.0
    patch.setattr(sampler, "forward_only", passes)
    patch.setattr(sampler, "broadcast_from_last_stage", lambda values, _: values)
    for rollout in range(8):
        lengths = [length for length in mixed_lengths(n // 8, rollout) for _ in range(8)]
        result = sampler.generate(
            model(pp_size, few, widths), [[7] * length for length in lengths], torch.arange(n),
            config, rollout, "test",
        )  # fmt: skip
        widest = torch.tensor(lengths) + config.completion_length
        positions += float((result.num_evaluations * widest).sum())
    computed = sum(rows * width for rows, width in passes.shapes)
    return len(set(passes.shapes)), 1 - positions / computed


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("n", "pp_size"), [(96, 1), (24, 1), (24, 2)])
def test_a_run_samples_in_few_shapes_with_little_padding(
    name: str, n: int, pp_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = sampled(CASES[name], pp_size, n, False, monkeypatch)
    few = sampled(CASES[name], pp_size, n, True, monkeypatch)
    assert few[0] <= 32 and few[1] < 0.12
    if (name, n) == ("steps", 96):
        assert exact[1] < 0.06


@pytest.mark.parametrize(
    ("name", "n", "rows"), [("early stop", 96, 24), ("threshold", 96, 24), ("threshold", 24, 64)]
)
def test_widths_lie_between_the_prompts_of_the_data(
    name: str, n: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short completions beside long rows: up to --seq-length the widths would lie far apart."""
    length = 128
    monkeypatch.setattr(setup, "keeps_graphs", lambda _: True)
    monkeypatch.setattr(setup, "pad_multiple", lambda _: 2)
    args = argparse.Namespace(seq_length=length + 400, rollout_completion_length=length)
    data = [[7] * prompt for seed in range(60) for prompt in mixed_lengths(12, seed)]
    widths = setup.few_shapes(args, data)
    config = replace(CASES[name], completion_length=length, micro_batch_size=rows)
    shapes, padding = sampled(config, 1, n, True, monkeypatch, widths)
    assert shapes <= 32 and padding < 0.12
    if name == "early stop":
        assert sampled(config, 1, n, True, monkeypatch, setup.few_shapes(args))[1] > 0.12


def test_widths_hold_the_rows_of_all_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an evaluation at several lengths, and no wider than --seq-length."""
    monkeypatch.setattr(setup, "keeps_graphs", lambda _: True)
    monkeypatch.setattr(setup, "pad_multiple", lambda _: 4)
    args = argparse.Namespace(seq_length=656, rollout_completion_length=256)
    prompts = [[7] * 30, [7] * 90]
    assert setup.few_shapes(args, prompts) == few_widths(286, 346, 4)
    assert setup.few_shapes(args, prompts, [64, 256]) == few_widths(94, 346, 4)
    assert max(setup.few_shapes(args, [[7] * 500])) == 656


def test_updates_of_a_run_have_few_shapes_with_little_padding() -> None:
    shapes, positions = [], 0
    for rollout in range(12):
        lengths = mixed_lengths(48, rollout)
        ids = torch.arange(48)
        views = elbo_views("coupled", stream(1, "test"), ids, ids, 48, LENGTH, 1)
        packed = pack_sequences(
            [[7] * length for length in lengths],
            torch.zeros(48, LENGTH, dtype=torch.int64), 0, model(1, few=True).shapes,
        )  # fmt: skip
        batches = view_batches(packed, views, MASK, 300, 4, same_width=False)
        shapes += [tuple(view.batch.tokens.shape) for view in batches]
        positions += 2 * (sum(lengths) + 48 * LENGTH)
    computed = sum(rows * width for rows, width in shapes)
    assert len(set(shapes)) <= 16
    assert 1 - positions / computed < 0.12


@pytest.mark.parametrize(
    ("cuda", "layers", "cp_size", "few"),
    [
        (True, "transformer_engine", 1, True),
        (False, "transformer_engine", 1, False),
        (True, "local", 1, False),
        (True, "transformer_engine", 2, False),
    ],
)
def test_shapes_are_few_where_attention_keeps_graphs(
    cuda: bool, layers: str, cp_size: int, few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup.device, "has_cuda", lambda: cuda)
    args = argparse.Namespace(
        transformer_impl=layers, context_parallel_size=cp_size, fp8=None, sequence_parallel=True,
        tensor_model_parallel_size=2, rollout_micro_batch_size=24, seq_length=LONGEST,
        rollout_completion_length=LENGTH,
    )  # fmt: skip
    expected = few_widths(LENGTH + 1, LONGEST, 2) if few else ()
    assert setup.few_shapes(args) == expected
