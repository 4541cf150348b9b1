"""What a run reports: statistics over ranks, durations, TensorBoard entries."""

from typing import Any

import numpy as np
import pytest
import torch

from megatron_espo.monitor import metrics, progress
from megatron_espo.monitor.metrics import gather_columns, statistics
from megatron_espo.monitor.progress import Progress, format_duration
from megatron_espo.monitor.tensorboard import write_scalars
from megatron_espo.parallel.layout import Layout
from megatron_espo.rl.samples_table import write_samples
from megatron_espo.rl.types import Rollout
from megatron_espo.tasks.base import Score


class ThreeRanks:
    """Stands for a data-parallel group of three."""

    def size(self) -> int:
        return 3


class Writer:
    """Records what would go to TensorBoard."""

    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []
        self.texts: list[tuple[str, str, int]] = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def add_text(self, name: str, text: str, step: int) -> None:
        self.texts.append((name, text, step))


def layout(dp: Any) -> Layout:
    return Layout(tp=dp, pp=dp, dp=dp, cp=dp, mp=dp)


def test_statistics_are_mean_minimum_and_maximum() -> None:
    columns = {"reward": np.array([0.5, -1.0, 4.0, 0.5])}
    assert statistics(columns, "reward") == {
        "reward/mean": 1.0,
        "reward/min": -1.0,
        "reward/max": 4.0,
    }
    assert statistics(columns, "reward", "a/b") == {
        "a/b/mean": 1.0,
        "a/b/min": -1.0,
        "a/b/max": 4.0,
    }
    assert all(type(value) is float for value in statistics(columns, "reward").values())


def test_columns_of_one_rank_pass_through_in_float64(one_rank) -> None:
    # A sum in float32 would lose the 1.
    columns = gather_columns({"b": [2.0**24, 1.0], "a": [3]}, layout(one_rank))
    assert list(columns) == ["a", "b"]
    assert columns["a"].dtype == columns["b"].dtype == np.float64
    assert columns["b"].sum() == 2**24 + 1


def test_columns_join_in_rank_order_and_ranks_may_lack_some(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ranks = [{"reward": [1.0, 2.0]}, {"reward": [3.0], "bonus": [0.5]}, {"reward": []}]
    group = ThreeRanks()

    def all_gather_object(parts: list[Any], own: dict[str, Any], group: Any) -> None:
        assert own == ranks[1] and group is layout(group).dp
        parts[:] = ranks

    monkeypatch.setattr(metrics.dist, "all_gather_object", all_gather_object)
    columns = gather_columns(ranks[1], layout(group))
    assert {name: values.tolist() for name, values in columns.items()} == {
        "bonus": [0.5],
        "reward": [1.0, 2.0, 3.0],
    }
    # However completions are split, the statistics are those of all of them.
    whole = {"reward": np.array([1.0, 2.0, 3.0])}
    assert statistics(columns, "reward") == statistics(whole, "reward")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (45.4, "45s"),
        (59.6, "1m00s"),
        (200, "3m20s"),
        (3599.6, "1h00m"),
        (7500, "2h05m"),
        (90061, "25h01m"),
    ],
)
def test_durations_read_like_a_clock(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_time_left_follows_the_pace_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    clock = Progress(first=40, total=100)  # resumed: 40 steps took no time here
    now += 30.0
    assert clock.time_left(45) == "5m30s"  # 6 s a step, 55 to go
    assert clock.time_left(100) == "0s"
    assert clock.time_left(40) == "30m00s"  # nothing done yet: no division by zero


def test_scalars_are_written_by_name_and_only_where_there_is_a_writer() -> None:
    writer = Writer()
    write_scalars(writer, {"a": 1.0, "b": 2.0}, 7)
    assert writer.scalars == [("a", 1.0, 7), ("b", 2.0, 7)]
    write_scalars(None, {"a": 1.0}, 7)


def rollout(rewards: list[float], texts: list[str]) -> Rollout:
    values = torch.tensor(rewards, dtype=torch.float64)
    fields = dict.fromkeys(Rollout.__dataclass_fields__)
    made = {
        "rewards": values,
        "advantages": values - 0.5,
        "texts": texts,
        "scores": [Score(reward, reward > 0.8, {}) for reward in rewards],
        "completion_lengths": torch.arange(len(texts)) + 7,
    }
    return Rollout(**{**fields, **made})


@pytest.mark.parametrize(
    ("count", "shown"), [(1, "d"), (2, "db"), (3, "dcb"), (4, "dcab"), (9, "dcab")]
)
def test_sample_table_shows_the_best_and_the_worst_once(count: int, shown: str) -> None:
    writer = Writer()
    made = rollout([0.3, 0.1, 0.5, 0.9], list("abcd"))
    write_samples(writer, made, list("PQRS"), 5, count)
    ((name, table, step),) = writer.texts
    assert (name, step) == ("samples", 5)
    rows = table.split("\n")
    header = "| reward | correct | advantage | tokens | prompt | completion |"
    assert rows[:2] == [header, "|---|---|---|---|---|---|"]
    assert "".join(row.split(" | ")[5][0] for row in rows[2:]) == shown
    assert rows[2] == "| 0.900 | yes | +0.400 | 10 | S | d |"


def test_sample_table_keeps_its_shape_for_any_text() -> None:
    writer = Writer()
    write_samples(writer, rollout([1.0, 0.0], ["a|b\nc", ""]), ["x\n\ny", "|"], 1, 2)
    rows = writer.texts[0][1].split("\n")
    assert rows[2] == "| 1.000 | yes | +0.500 | 7 | x<br><br>y | a&#124;b<br>c |"
    assert rows[3] == "| 0.000 | no | -0.500 | 8 | &#124; | *(empty)* |"


def test_no_samples_are_written_unless_asked_for() -> None:
    writer = Writer()
    write_samples(writer, rollout([1.0], ["a"]), ["p"], 1, 0)
    write_samples(None, rollout([1.0], ["a"]), ["p"], 1, 4)
    assert writer.texts == []
