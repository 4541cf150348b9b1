"""Notebooks run from their first cell to their last."""

import json
import sys
from pathlib import Path

import pytest
from interpreter import python

from megatron_espo.startup.setup import start_anew

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def first_steps(printed: str, folder: Path) -> None:
    assert printed.count("evaluations, confidence") == 3 and printed.count("nats") == 9
    assert (folder / "runs/first-steps/denoising.gif").stat().st_size > 1000


def own_objective(printed: str, folder: Path) -> None:
    lines = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line}
    # Beyond the clip range ESPO pushes no more; the penalty pushes back.
    assert lines["ESPO"][-1] == "0.00" and float(lines["smooth"][-1]) == pytest.approx(
        0.69, abs=0.02
    )
    assert lines["ESPO"][4] == lines["smooth"][4] == "1.00"
    assert sum(line.startswith("rollout ") for line in printed.splitlines()) == 2
    assert "policy/grad_norm" in lines
    assert (folder / "runs/own-objective/push.png").stat().st_size > 1000


CHECKS = {"first_steps": first_steps, "own_objective": own_objective}


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_run(
    path: Path, one_rank: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Without Jupyter: a cell is a program, and all share their names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", python())  # what a notebook starts
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    names: dict[str, object] = {}
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells), "clear the outputs"
    for number, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), names)
    start_anew()
    CHECKS[path.stem](capsys.readouterr().out, tmp_path)
