"""Notebooks run from their first cell to their last."""

import json
from pathlib import Path

import pytest

from megatron_espo.startup.setup import start_anew

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_run(
    path: Path, one_rank: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Without Jupyter: a cell is a program, and all share their names."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells), "clear the outputs"
    for number, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), names)
    start_anew()
    printed = capsys.readouterr().out
    assert printed.count("evaluations, confidence") == 3 and printed.count("nats") == 9
    assert (tmp_path / "runs/first-steps/denoising.gif").stat().st_size > 1000
