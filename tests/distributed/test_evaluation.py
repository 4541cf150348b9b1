"""An evaluation gives the same completions and the same table in every layout, resumed or not."""

import json
import os
import shutil
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from conftest import Built, build_layout
from layouts import CASES

from megatron_espo.config import RolloutConfig
from megatron_espo.data.tokenizer import byte_tokenizer
from megatron_espo.errors import UserError
from megatron_espo.evaluation.completing import evaluate_task
from megatron_espo.evaluation.problems import TaskData
from megatron_espo.evaluation.protocol import Protocol
from megatron_espo.evaluation.run import evaluate
from megatron_espo.evaluation.statistics import Summary, markdown_table
from megatron_espo.evaluation.store import COMPLETIONS, CompletionStore
from megatron_espo.tasks.base import Example, Score

LAYOUTS = ["dp 4", "tp 2, dp 2", "pp 2, dp 2", "cp 2, dp 2", "tp 2, pp 2",
           "tp 2, cp 2, sequence parallel", "pp 2 with 2 virtual stages, dp 2"]  # fmt: skip
PROBLEMS = 7  # no multiple of anything: ranks have shares of different size
PROTOCOL = Protocol(
    {
        8: RolloutConfig(8, 8, 4, 1.0, micro_batch_size=2),
        16: RolloutConfig(16, 8, 8, 0.7, "random", micro_batch_size=3),
    },
    num_samples=2,
    ks=(1, 2),
)
TASK = SimpleNamespace(
    name="length",
    score=lambda example, text: Score(
        len(text) / 16 + example.answer["n"], len(text) % 2 == 0, {"spaces": float(text.count(" "))}
    ),
)
DATA = TaskData(
    [Example(f"{n} and", {"n": n}) for n in range(PROBLEMS)],
    [tuple(range(65, 70 + n)) for n in range(PROBLEMS)],
)


def evaluated(built: Built, folder: str) -> tuple[list[dict[str, Any]], list[Summary]]:
    """Evaluate into a folder; its records without their times, and the summaries."""
    for chunk in built.model.chunks:
        chunk.eval()
    # One token in six ends a completion, so that texts differ in length.
    model = replace(built.model, stop_token_ids=tuple(range(0, 250, 6)))
    lines: list[str] = []
    summaries = evaluate(
        model, TASK, DATA, byte_tokenizer(), PROTOCOL, 3,
        lambda: CompletionStore(folder, {"lengths": {}}), lines.append,
    )  # fmt: skip
    assert bool(summaries) == (dist.get_rank() == dist.get_world_size() - 1)
    dist.barrier()
    with open(os.path.join(folder, COMPLETIONS), encoding="utf-8") as file:
        records = sorted(
            map(json.loads, file), key=lambda r: (r["length"], r["problem"], r["sample"])
        )
    for record in records:
        del record["seconds"]
    return records, summaries


def without_speed(table: str) -> list[list[str]]:
    rows = [line.split("|")[1:-1] for line in table.splitlines()]
    column = [cell.strip() for cell in rows[0]].index("tokens/s")
    return [row[:column] + row[column + 1 :] for row in rows]


@pytest.fixture(scope="module")
def expected(
    tokenizer_folder: str, checkpoints: dict[bool, str], shared_folder: str
) -> tuple[list[dict[str, Any]], list[list[str]], str]:
    """What one rank gives: records, table, folder."""
    flags = ("--pretrained-checkpoint", checkpoints[False])
    solo = build_layout(tokenizer_folder, 1, 1, flags, solo=True)
    folder = os.path.join(shared_folder, "evaluation-solo")
    records, summaries = evaluated(solo, folder)
    box = [markdown_table(summaries) if summaries else ""]
    dist.broadcast_object_list(box, dist.get_world_size() - 1)
    assert len(records) == len(PROTOCOL.configs) * PROBLEMS * 2
    assert len({record["completion"] for record in records}) > PROBLEMS
    return records, without_speed(box[0]), folder


@pytest.mark.parametrize("name", LAYOUTS, ids=lambda name: name.replace(" ", "-"))
def test_evaluation_does_not_depend_on_layout(
    name: str,
    expected: tuple[list[dict[str, Any]], list[list[str]], str],
    tokenizer_folder: str,
    checkpoints: dict[bool, str],
    shared_folder: str,
) -> None:
    case = CASES[name]
    flags = ("--pretrained-checkpoint", checkpoints[False], *case.flags)
    built = build_layout(
        tokenizer_folder, case.tp, case.pp, (*flags, "--context-parallel-size", str(case.cp))
    )
    records, table, solo_folder = expected
    for begun in (0, 17):
        folder = os.path.join(shared_folder, f"evaluation-{LAYOUTS.index(name)}-{begun}")
        if begun and dist.get_rank() == 0:  # one rank began it and was killed
            shutil.copytree(solo_folder, folder)
            with open(os.path.join(folder, COMPLETIONS), "r+", encoding="utf-8") as file:
                lines = file.readlines()[:begun]
                file.seek(0)
                file.truncate()
                file.writelines([*lines, lines[0][:20]])
        dist.barrier()
        found, summaries = evaluated(built, folder)
        assert len(found) == len(records)
        for ours, theirs in zip(found, records, strict=True):
            confidence = theirs["confidence"]
            assert ours.pop("confidence") == pytest.approx(confidence, rel=1e-5)
            assert ours == {k: v for k, v in theirs.items() if k != "confidence"}
        if summaries:
            assert without_speed(markdown_table(summaries)) == table


@pytest.mark.parametrize("name", ["dp 4", "tp 2, dp 2", "cp 2, dp 2"])
def test_a_score_that_cannot_be_used_is_one_sentence_on_every_rank(
    name: str, tokenizer_folder: str, checkpoints: dict[bool, str]
) -> None:
    case = CASES[name]
    flags = ("--pretrained-checkpoint", checkpoints[False], *case.flags)
    built = build_layout(
        tokenizer_folder, case.tp, case.pp, (*flags, "--context-parallel-size", str(case.cp))
    )
    for chunk in built.model.chunks:
        chunk.eval()
    # One problem of seven: one data-parallel rank meets it.
    task = SimpleNamespace(
        name="odd",
        score=lambda e, text: Score(float("nan" if e.answer["n"] == 3 else 1), True, {}),
    )
    config = PROTOCOL.configs[8]
    for run in (
        lambda: evaluate(built.model, task, DATA, byte_tokenizer(), PROTOCOL, 3),
        lambda: evaluate_task(
            built.model, task, DATA.examples, DATA.encoded, byte_tokenizer(), config, 3
        ),
    ):
        with pytest.raises(UserError) as caught:
            run()
        said = str(caught.value)
        assert said == (
            'task odd, record {"n": 3}: the reward is nan (float); make it a finite number'
        )
    dist.barrier()
