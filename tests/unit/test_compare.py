"""The comparison of objectives: intervals, the table, and results that are kept."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.compare import SETTINGS, Run, result_of
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


@pytest.mark.parametrize("objective", SETTINGS)
def test_settings_are_those_of_the_objective(objective: str) -> None:
    espo = Run("sudoku", objective, 3e-4, 1, 4, SETTINGS[objective]).espo
    espo.validate()
