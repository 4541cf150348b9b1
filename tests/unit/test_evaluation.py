"""Evaluation: intervals and pass@k against enumeration, files of a killed run, protocols."""

import argparse
import itertools
import json
import math
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_espo.checkpoint.fingerprint import folder_fingerprint
from megatron_espo.config import RolloutConfig
from megatron_espo.evaluation import run as evaluation_run
from megatron_espo.evaluation.completing import Scored
from megatron_espo.evaluation.problems import TaskData
from megatron_espo.evaluation.protocol import (
    Protocol,
    add_protocol_arguments,
    read_protocol,
)
from megatron_espo.evaluation.run import evaluate
from megatron_espo.evaluation.statistics import (
    Record,
    markdown_table,
    pass_at_k,
    summarize,
    wilson_interval,
)
from megatron_espo.evaluation.store import CompletionStore
from megatron_espo.model.handle import DiffusionModel
from megatron_espo.parallel.layout import Layout
from megatron_espo.tasks.base import Example, Score


@pytest.mark.parametrize(("n", "c"), [(1, 0), (1, 1), (4, 0), (4, 1), (5, 3), (6, 6)])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(n: int, c: int) -> None:
    samples = [True] * c + [False] * (n - c)
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(samples, k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize("k", [0, 4])
def test_pass_at_k_refuses_more_tries_than_samples(k: int) -> None:
    with pytest.raises(ValueError, match=f"pass@{k} needs"):
        pass_at_k(3, 1, k)


@pytest.mark.parametrize(("successes", "count"), [(0, 7), (7, 7), (1, 10), (339, 500), (2.5, 9)])
def test_wilson_interval_holds_the_rates_that_a_score_test_accepts(
    successes: float, count: int
) -> None:
    low, high = wilson_interval(successes, count, z=1.96)
    rate = successes / count
    # Its ends solve |rate - p| = z sqrt(p (1 - p) / n) by definition.
    for end in (low, high):
        if 0 < end < 1:
            assert abs(rate - end) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / count))
    assert 0 <= low <= rate <= high <= 1 and high > low


def record(problem: int, sample: int = 0, correct: bool = True, **fields: Any) -> Record:
    made = Record(
        length=16, problem=problem, sample=sample, prompt="p", completion="ä\nb", token_ids=[1, 2],
        reward=float(correct), correct=correct, metrics={"m": float(problem)}, num_tokens=2,
        num_evaluations=8, num_committed=16, confidence=0.5, seconds=0.25,
    )  # fmt: skip
    return replace(made, **fields)


def test_summary_of_several_samples_per_problem() -> None:
    records = [
        record(p, s, correct) for p, row in enumerate([(True, False), (False, False), (True, True)])
        for s, correct in enumerate(row)
    ]  # fmt: skip
    summary = summarize(records[::-1], ks=(1, 2))
    assert summary.accuracy == pytest.approx(0.5) and summary.reward == pytest.approx(0.5)
    assert summary.pass_at_k == {1: pytest.approx(0.5), 2: pytest.approx(2 / 3)}
    # Three problems are three trials, not six.
    assert (summary.accuracy_low, summary.accuracy_high) == wilson_interval(1.5, 3)
    assert (summary.num_problems, summary.num_samples, summary.num_evaluations) == (3, 2, 8)
    assert (summary.tokens_per_step, summary.confidence) == (2.0, 0.5)
    assert summary.tokens_per_second == pytest.approx(12 / 1.5)
    assert summary.metrics == {"m": pytest.approx(1.0)}
    table = markdown_table([summary]).splitlines()
    cells = dict(zip(table[0].split(" | "), table[2].split(" | "), strict=True))
    assert cells["accuracy"] == "50.0%" and cells["pass@2 |"] == "66.7% |"


SETTINGS = {"task": "t", "lengths": {"16": {"denoising_steps": 8}}}


def test_store_gives_back_what_was_written_and_drops_a_torn_line(tmp_path: Path) -> None:
    store = CompletionStore(tmp_path / "a/b", SETTINGS)
    store.append([record(0), record(1)])
    with pytest.raises(ValueError, match="another evaluation is writing there"):
        CompletionStore(tmp_path / "a/b", SETTINGS)
    store.append([record(2)])
    store.close()
    path = tmp_path / "a/b/completions.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    store = CompletionStore(tmp_path / "a/b", SETTINGS)
    assert store.records == {r.key: r for r in (record(0), record(1))}
    store.append([record(2)])
    store.close()
    assert path.read_bytes() == whole


def test_store_refuses_other_settings_and_takes_more_lengths(tmp_path: Path) -> None:
    CompletionStore(tmp_path, SETTINGS).close()
    with pytest.raises(ValueError, match=r"another task \(t there, u here\)"):
        CompletionStore(tmp_path, {**SETTINGS, "task": "u"})
    changed = {"16": {"denoising_steps": 16}}
    with pytest.raises(ValueError, match="another denoising_steps of length 16"):
        CompletionStore(tmp_path, {**SETTINGS, "lengths": changed})
    CompletionStore(tmp_path, {**SETTINGS, "lengths": {"32": {}}}).close()
    CompletionStore(tmp_path, SETTINGS).close()
    lengths = json.loads((tmp_path / "settings.json").read_text())["lengths"]
    assert lengths == {**SETTINGS["lengths"], "32": {}}
    with pytest.raises(ValueError, match="another model"):
        CompletionStore(tmp_path, {**SETTINGS, "model": "e5"})
    (tmp_path / "completions.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"completions\.jsonl:1: is no completion"):
        CompletionStore(tmp_path, SETTINGS)


def test_store_takes_more_problems_and_refuses_other_prompts(tmp_path: Path) -> None:
    CompletionStore(tmp_path, {"prompts": {"0": "a", "10": "b"}}).close()
    CompletionStore(tmp_path, {"prompts": {"0": "a", "2": "c"}}).close()
    with pytest.raises(ValueError, match="another prompt of problem 10; choose another folder"):
        CompletionStore(tmp_path, {"prompts": {"0": "a", "2": "c", "10": "d"}})
    kept = json.loads((tmp_path / "settings.json").read_text())["prompts"]
    assert kept == {"0": "a", "2": "c", "10": "b"}


def test_a_folder_that_was_written_anew_is_another_model(tmp_path: Path) -> None:
    for name, content in (("config.json", b"{}"), ("__0_0.distcp", b"weights")):
        (tmp_path / name).write_bytes(content)
    first = folder_fingerprint(tmp_path)
    # What lies in folders is not the model: ESPO's state, the reference policy.
    (tmp_path / "espo").mkdir()
    (tmp_path / "espo" / "state.pt").write_bytes(b"state")
    shutil.copytree(tmp_path, tmp_path.with_name("copy"))
    assert folder_fingerprint(tmp_path) == first == folder_fingerprint(tmp_path.with_name("copy"))
    time.sleep(0.02)
    (tmp_path / "__0_0.distcp").write_bytes(b"WEIGHTS")
    assert folder_fingerprint(tmp_path) != first


def read(flags: str) -> Protocol:
    parser = argparse.ArgumentParser()
    add_protocol_arguments(parser)
    options, rest = parser.parse_known_args(flags.split())
    return read_protocol(options, RolloutConfig(completion_length=64), rest)


def test_published_protocol_is_greedy_with_blocks_of_32_and_a_step_for_two_tokens() -> None:
    protocol = read("--eval-lengths 16 128 256 512")
    shapes = {n: (c.block_length, c.denoising_steps) for n, c in protocol.configs.items()}
    assert shapes == {16: (16, 8), 128: (32, 64), 256: (32, 128), 512: (32, 256)}
    assert {c.temperature for c in protocol.configs.values()} == {0.0}
    assert all(c.completion_length == n for n, c in protocol.configs.items())
    plain = read("")
    assert plain.configs == {64: RolloutConfig(completion_length=64, temperature=0.0)}
    assert plain.ks == ()
    assert read("--eval-num-samples 4 --eval-temperature 0.8").ks == (1, 4)


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ("--eval-lengths 15", "--eval-lengths 15 is not a multiple of --eval-tokens-per-step 2"),
        ("--eval-num-samples 2", "set --eval-temperature"),
        ("--eval-num-samples 0", "at least 1"),
        ("--eval-pass-at-k 3", "raise --eval-num-samples"),
        ("--rollout-temperature 1", "--eval-temperature"),
        ("--rollout-top-p 0.9", "--rollout-top-p has no effect on a greedy evaluation"),
        ("--rollout-top-k=5 --eval-temperature 0", "--rollout-top-k"),
        ("--eval-lengths 32 --rollout-denoising-steps=8", "--rollout-denoising-steps follows"),
    ],
)
def test_bad_protocol_is_named(flags: str, part: str) -> None:
    with pytest.raises(ValueError, match=part):
        read(flags)


class Words:
    """Stands for a tokenizer."""

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Replace the sampler by one that is right on even problems; lists what it was asked."""
    asked: list[tuple[int, int, int]] = []

    def complete(model, task, examples, encoded, items, tokenizer, config, seed) -> Scored:
        asked.extend((config.completion_length, *item) for item in items)
        if len(asked) > 12:
            raise KeyboardInterrupt
        n = len(items)
        return Scored(
            torch.zeros(n, config.completion_length, dtype=torch.int64),
            ["x"] * n,
            [Score(1.0, problem % 2 == 0, {}) for problem, _ in items],
            torch.full((n,), 3),
            torch.full((n,), config.denoising_steps),
            torch.full((n,), config.completion_length),
            torch.full((n,), 0.5),
        )

    monkeypatch.setattr(evaluation_run, "complete_problems", complete)
    return asked


def test_killed_evaluation_samples_only_what_is_missing(
    one_rank, sampled: list[tuple[int, int, int]], tmp_path: Path
) -> None:
    group = one_rank
    model = DiffusionModel((), 0, 0, (), 0, 9, False, 1, torch.device("cpu"),
                           Layout(group, group, group, group, group))  # fmt: skip
    data = TaskData([Example("", {})] * 5, [(1, 2)] * 5)
    rollout = RolloutConfig(micro_batch_size=2, temperature=1.0)
    protocol = Protocol(
        {n: replace(rollout, completion_length=n, denoising_steps=n // 2) for n in (16, 32)},
        2,
        (2,),
    )

    def work() -> list[Any]:
        return evaluate(model, Any, data, Words(), protocol, 1,  # type: ignore[arg-type]
                        lambda: CompletionStore(tmp_path, SETTINGS), lambda line: None)  # fmt: skip

    with pytest.raises(KeyboardInterrupt):
        work()
    # Two of the second length were in hand when it was killed.
    assert sampled[:12] == [(16, p, s) for s in (0, 1) for p in range(5)] + [(32, 0, 0), (32, 1, 0)]
    lost = len(sampled) - 12
    sampled.clear()
    summaries = work()
    assert sampled == [(32, p, s) for s in (0, 1) for p in range(5)][2:] and lost == 2
    assert [s.length for s in summaries] == [16, 32]
    assert all(s.accuracy == pytest.approx(3 / 5) and s.num_samples == 2 for s in summaries)
    lines = (tmp_path / "completions.jsonl").read_text().splitlines()
    assert len(lines) == 20 and json.loads(lines[0])["prompt"] == "1 2"
    sampled.clear()
    assert work() == summaries and not sampled
