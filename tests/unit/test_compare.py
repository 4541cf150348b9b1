"""The comparison of objectives: intervals, the table, and results that are kept."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save

from benchmarks import compare, compare_bases
from benchmarks.compare import SETTINGS, Run, result_of
from benchmarks.compare_bases import base_record, record_base
from benchmarks.compare_report import paired_interval, table, write_table
from megatron_espo.errors import UserError


def result(objective: str, seed: int, after: float) -> dict[str, Any]:
    run = Run("sudoku", objective, 3e-4, seed, 4, SETTINGS[objective])
    return {
        "run": asdict(run), "test": [0.1, after], "views": 2, "passes": 8.0,
        "seconds": {"all": 60.0},
    }  # fmt: skip


def test_the_interval_is_that_of_a_paired_t_test() -> None:
    differences = [1.5, -2.0, 4.0, 0.25]
    found = paired_interval(differences)
    assert found is not None
    assert found[0] - found[1] == pytest.approx(-3.04553, abs=2e-3)  # scipy.stats.ttest_1samp
    assert found[0] + found[1] == pytest.approx(4.92053, abs=2e-3)
    assert paired_interval([1.0]) is None


def test_runs_are_compared_seed_by_seed(tmp_path: Path) -> None:
    """A seed that only one of two has changes its mean and not the difference."""
    results = [result("espo", 1, 0.4), result("espo", 2, 0.5), result("espo", 3, 0.9)]
    results += [result("wd1", 2, 0.48), result("wd1", 1, 0.36)]
    lines = table(results)
    assert [line.split(" | ")[3:6] for line in lines[2:]] == [
        ["10.0%", "**60.0%**", ""],
        ["10.0%", "**42.0%**", "-3.0 ± 12.7"],
    ]
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- compare sudoku: begin -->\n<!-- compare sudoku: end -->\nafter\n")
    write_table(page, "sudoku", results)
    write_table(page, "sudoku", results)
    assert page.read_text().splitlines()[2:-2] == lines
    with pytest.raises(UserError, match="<!-- compare countdown: begin -->"):
        write_table(page, "countdown", results)


def test_a_result_is_taken_for_its_own_run_alone(tmp_path: Path) -> None:
    run = Run("sudoku", "espo", 3e-4, 1, 4, SETTINGS["espo"])
    known = {"run": asdict(run), "validation": [0.1, 0.2]}
    (tmp_path / f"{run.name}.json").write_text(json.dumps(known))
    options = argparse.Namespace(results=tmp_path, report_only=True)
    assert result_of(run, options) == known
    assert result_of(Run("sudoku", "espo", 1e-4, 1, 4, SETTINGS["espo"]), options) is None
    with pytest.raises(UserError, match="is of other settings"):
        result_of(Run("sudoku", "espo", 3e-4, 1, 8, SETTINGS["espo"]), options)


def checkpoint(base: Path, weight: float, moment: float) -> None:
    root = base / "base"
    tensors = {"layer.weight": torch.tensor([1.0, weight]), "optimizer.m": torch.tensor([moment])}
    save(tensors, checkpoint_id=root / "iter_0000003", no_dist=True)
    (root / "latest_checkpointed_iteration.txt").write_text("3")


def test_a_base_is_known_by_every_bit_of_its_weights(tmp_path: Path) -> None:
    bases = [tmp_path / str(number) for number in range(3)]
    for base, weight, moment in zip(bases, (2.0, 2.0, 2.0000002), (5.0, 6.0, 5.0), strict=True):
        checkpoint(base, weight, moment)
    record_base(bases[0])
    records = [base_record(base) for base in bases]
    assert records[0]["weights"] == records[1]["weights"] != records[2]["weights"]
    assert records[0]["cpu"] and records[1]["cpu"] is None
    (bases[2] / "made.json").write_text((bases[0] / "made.json").read_text())
    assert base_record(bases[2])["cpu"] is None  # the record is of other weights


def test_runs_of_two_bases_are_not_compared() -> None:
    """A digest decides; of results without one, the accuracy of the base."""
    old, other = result("espo", 1, 0.4), result("wd1", 1, 0.5)
    new = {"base": {"weights": "a" * 32, "cpu": "x"}}
    table([old, other, old | new])
    table([old | new, other | new, result("espo", 2, 0.4)])
    for pair in (
        [old | new, other | {"base": {"weights": "b" * 32, "cpu": "x"}}],
        [old, other | {"test": [0.12, 0.5]}],
        [old | new, other | {"test": [0.12, 0.5]}],
    ):
        with pytest.raises(UserError, match=r"Seed 1: espo .* and wd1 .* different bases"):
            table(pair)


def test_a_seed_from_elsewhere_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Seed 1 has two of three rates from another processor: seed 2 runs at the better of them."""
    out, results = tmp_path / "out", tmp_path / "results"
    asked: list[str] = []

    def make(run: Run, base: Path, *_: object) -> dict[str, Any]:
        asked.append(run.name)
        return result(run.objective, run.seed, 0.5) | {
            "run": asdict(run), "base": base_record(base), "machine": {"cpu": "here"},
        }  # fmt: skip

    def base_of(task: str, seed: int, out: Path, _: int) -> Path:
        base = compare.base_folder(task, seed, out)
        if not compare.is_made(base):
            asked.append(base.name)
            checkpoint(base, float(seed), 0.0)
            record_base(base)
        return base

    monkeypatch.setattr(compare, "make", make)
    monkeypatch.setattr(compare, "base_of", base_of)
    monkeypatch.setattr(compare, "tested", lambda *_: 0.1)
    monkeypatch.setattr(compare_bases, "machine", lambda: {"cpu": "here"})
    results.mkdir()
    for rate, accuracy in ((1e-4, 0.3), (3e-4, 0.2)):
        run = Run("sudoku", "espo", rate, 1, 32, SETTINGS["espo"])
        known = {"run": asdict(run), "validation": [0.1, accuracy], "machine": {"cpu": "there"}}
        (results / f"{run.name}.json").write_text(
            json.dumps(result("espo", 1, 0.4) | known | {"test": [0.17, 0.4]})
        )
    arguments = ["--out", str(out), "--results", str(results), "--objectives", "espo", "--seeds"]
    compare.main([*arguments, "2", "1"])
    assert asked == ["base-sudoku-2", "sudoku-espo-0.0001-2"]
    shown = capsys.readouterr().out
    assert "sudoku-espo-0.001-1: left out; results of its seed started from a base" in shown
    assert "| espo | 0.0001 | 2 |" in shown

    # A base of seed 1 that is here is asked what it is: this one gives 10%, theirs gave 17%.
    base_of("sudoku", 1, out, 1)
    compare.main([*arguments, "1"])
    assert "base-sudoku-1 holds another one" in capsys.readouterr().out
    monkeypatch.setattr(compare, "tested", lambda *_: 0.17)
    run = Run("sudoku", "wd1", 1e-3, 1, 32, SETTINGS["wd1"])
    options = argparse.Namespace(results=results, report_only=False, out=out, ranks=1)
    assert result_of(run, options) and asked[-1] == run.name
    # The other seed's results have digests, which accuracy does not overrule.
    checkpoint(out / "base-sudoku-2", 7.0, 0.0)
    assert result_of(Run("sudoku", "wd1", 1e-3, 2, 32, SETTINGS["wd1"]), options) is None


@pytest.mark.parametrize("objective", SETTINGS)
def test_settings_are_those_of_the_objective(objective: str) -> None:
    espo = Run("sudoku", objective, 3e-4, 1, 4, SETTINGS[objective]).espo
    espo.validate()
