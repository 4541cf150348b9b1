"""Several tasks in one run: their problems, shares, scores, and what is reported of each."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_espo.config import EspoConfig
from megatron_espo.data.tokenizer import byte_tokenizer, special_ids
from megatron_espo.errors import UserError
from megatron_espo.evaluation import problems
from megatron_espo.evaluation.problems import Share, TaskData
from megatron_espo.monitor.metrics import Columns
from megatron_espo.rewards.workers import RewardWorkers
from megatron_espo.rl.prompts import prompts_of_rollout, task_draws
from megatron_espo.rl.scalars import Clock, console_line, rollout_scalars
from megatron_espo.tasks import Blend, countdown, load_task
from megatron_espo.tasks.base import Example, Score
from megatron_espo.tasks.blend import Part

SPELLED = "sudoku:2,countdown"
PUZZLE, SOLUTION = "1234341221430021", "1234341221434321"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three sudokus and five countdowns."""
    folder = tmp_path_factory.mktemp("blend")
    records: dict[str, list[dict[str, Any]]] = {
        "sudoku": [{"puzzle": PUZZLE, "solution": SOLUTION, "style": "bare"}] * 3,
        "countdown": [{"numbers": [4, 9 + n], "target": 13 + n, "style": "bare"} for n in range(5)],
    }
    paths = {}
    for name, lines in records.items():
        paths[name] = folder / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps(line) + "\n" for line in lines))
    return paths


def spelled(files: dict[str, Path]) -> str:
    return ",".join(f"{name}={path}" for name, path in files.items())


def load(files: dict[str, Path], count: int = 0, **settings: Any) -> TaskData:
    tokenizer = byte_tokenizer()
    ids = special_ids(tokenizer)
    args = Namespace(
        seq_length=64, rollout_completion_length=16, prompt_special_tokens="refuse",
        mask_token_id=ids.mask_token_id, stop_token_ids=list(ids.stop_token_ids),
    )  # fmt: skip
    data = problems.load_task_data(
        load_task(SPELLED), spelled(files), tokenizer, args, count, **settings
    )
    assert data is not None
    return data


def test_problems_know_their_task_and_are_scored_by_it(files: dict[str, Path]) -> None:
    blend = load_task(SPELLED)
    assert isinstance(blend, Blend)
    assert {n: p.weight for n, p in blend.parts.items()} == {"sudoku": 2.0, "countdown": 1.0}
    data = load(files, training=True)
    assert list(data.shares) == [Share("sudoku", 2.0, 0, 3), Share("countdown", 1.0, 3, 5)]
    assert data.examples == blend.read(spelled(files))
    alone = countdown.read(files["countdown"])
    # As plain values, which a reward worker is sent.
    assert json.loads(json.dumps(data.examples[4].answer))["answer"] == alone[1].answer
    assert data.examples[4].prompt == alone[1].prompt
    assert data.encoded[4] == tuple(str(alone[1].prompt).encode())
    right = blend.score(data.examples[4], "4+10")
    assert (right.correct, right.task) == (True, "countdown")
    assert blend.score(data.examples[0], "4+10").task == "sudoku"
    assert blend.score(data.examples[0], "4+10").reward < 1.0
    few = load(files, count=2)
    assert [share.size for share in few.shares] == [2, 2] and len(few.examples) == 4


def test_workers_score_several_tasks(files: dict[str, Path]) -> None:
    blend = load_task(SPELLED)
    workers = RewardWorkers(blend, SPELLED, 1, 60.0)
    try:
        examples = load(files).examples
        assert problems.blend_of(workers) is blend and problems.blend_of(countdown) is None
        for place, text in ((4, "4+10"), (0, SOLUTION)):
            assert workers.score(examples[place], text) == blend.score(examples[place], text)
    finally:
        workers.close()


class _Hangs:
    name = "hangs"

    def read(self, path: Any) -> list[Example]:
        return []

    def score(self, example: Example, completion: str) -> Score:
        raise NotImplementedError


def test_what_no_worker_scores_still_counts_for_its_task(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = RewardWorkers(Blend([Part("hangs", 1.0, _Hangs())]), "hangs,x", 1, 1.0)

    def late(number: int) -> Any:
        raise TimeoutError

    monkeypatch.setattr(workers, "_worker", late)
    try:
        score = workers.score(Example("p", {"task": "hangs", "answer": {}}), "text")
    finally:
        workers.close()
    assert (score.reward, score.task) == (0.0, "hangs")


SHARES = [Share("a", 3.0, 0, 4), Share("b", 1.0, 4, 6)]
EXAMPLES = [Example(f"p{i}", {"number": i}) for i in range(10)]
ENCODED = [(i,) for i in range(10)]


def numbers(rollouts: range, per_rollout: int, seed: int = 1) -> list[int]:
    return [
        prompt.example.answer["number"]
        for rollout in rollouts
        for prompt in prompts_of_rollout(rollout, per_rollout, EXAMPLES, ENCODED, seed, SHARES)
    ]


def test_groups_are_drawn_by_weight_and_each_task_has_its_own_epochs() -> None:
    count = 4000
    draws = task_draws(count, SHARES, 1)
    # Three in four, to five deviations of as many draws.
    assert abs((draws == 0).double().mean().item() - 0.75) < 5 * (0.75 * 0.25 / count) ** 0.5
    assert torch.equal(task_draws(100, SHARES, 1), draws[:100])
    assert not torch.equal(task_draws(100, SHARES, 2), draws[:100])
    drawn = numbers(range(50), 8)
    assert [int(n >= 4) for n in drawn] == draws[:400].tolist()
    for first, size in ((0, 4), (4, 6)):
        own = [n for n in drawn if first <= n < first + size]
        epochs = [own[i : i + size] for i in range(0, len(own) - size + 1, size)]
        assert len(epochs) > 10
        assert all(sorted(epoch) == list(range(first, first + size)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 5


def test_a_rollout_of_several_tasks_is_a_function_of_its_number_and_the_seed() -> None:
    whole = numbers(range(10), 8)
    assert numbers(range(9, 10), 8) == whole[72:]
    assert numbers(range(40), 2) == numbers(range(5), 16) == whole
    assert numbers(range(10), 8, seed=2) != whole


def test_rewards_and_shares_are_reported_by_task() -> None:
    columns: Columns = {
        name: torch.tensor(values, dtype=torch.float64).numpy()
        for name, values in {
            "reward": [1.0, 0.5, 0.0, 0.1],
            "correct": [1.0, 0.0, 0.0, 0.0],
            "reward of a": [1.0, 0.5, 0.0],
            "correct of a": [1.0, 0.0, 0.0],
            "reward of b": [0.1],
            "correct of b": [0.0],
            "metric/a/format": [1.0, 0.0, 0.5],
            "no_spread": [0.0],
            "identical": [0.0],
            "length": [1.0],
            "nfe": [1.0],
            "committed": [1.0],
            "confidence": [1.0],
        }.items()
    }
    clock = Clock()
    clock.seconds["rollout"] = 1.0
    espo = EspoConfig(prompts_per_rollout=2, group_size=2)
    scalars = rollout_scalars(columns, "a+b", espo, 8, clock)
    tags = {tag: v for tag, v in scalars.items() if tag.startswith("reward/by_task/")}
    assert tags == {
        "reward/by_task/a/mean": 0.5,
        "reward/by_task/a/correct": pytest.approx(1 / 3),
        "reward/by_task/a/share": 0.75,
        "reward/by_task/b/mean": 0.1,
        "reward/by_task/b/correct": 0.0,
        "reward/by_task/b/share": 0.25,
    }
    assert scalars["reward/a/format"] == 0.5 and scalars["reward/mean"] == 0.4
    policy = dict.fromkeys(
        ["policy/ratio/min", "policy/ratio/max", "policy/kl_per_token", "policy/grad_norm"], 1.0
    )
    assert "correct 25.0% (a 33.3%, b 0.0%) | " in console_line(1, 2, scalars | policy, "1s")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sudoku:0,countdown", "give tasks with positive weights"),
        ("sudoku:-1,countdown", "give tasks with positive weights"),
        ("sudoku:nan,countdown", "give tasks with positive weights"),
        ("sudoku,", "give tasks with positive weights"),
        ("sudoku,sudoku:2", "two tasks are called sudoku"),
        ("sudoku,chess", "--espo-task chess: no such task"),
        ("sudoku,no_module:attribute", "no_module:attribute: no such task"),
    ],
)
def test_tasks_that_make_no_blend_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_task(text, flag="--espo-task")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("problems.jsonl", "with several tasks, give each its file: sudoku=FILE,countdown=FILE"),
        ("sudoku=a,chess=b", "with several tasks, give each its file"),
        ("sudoku=,countdown=b", "with several tasks, give each its file"),
        ("sudoku=a,sudoku=b", "names sudoku twice"),
        ("sudoku=a", "names no file for countdown; add countdown=FILE"),
    ],
)
def test_files_that_do_not_fit_the_tasks_are_refused(text: str, message: str) -> None:
    blend = load_task(SPELLED)
    assert isinstance(blend, Blend)
    with pytest.raises(UserError, match=f"--espo-train-data {text}: {message}"):
        blend.files(text, "--espo-train-data", every_task=True)
    # Held-out problems of some tasks will do.
    assert blend.files("countdown=b=c", "--espo-eval-data") == {"countdown": "b=c"}
