"""The picture of a run: scalars as written, panels fed by a real run, clear errors."""

import json
import subprocess
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from interpreter import python
from torch.utils.tensorboard import SummaryWriter

from megatron_espo.monitor.curves import read_scalars, run_names
from megatron_espo.monitor.pictures import PANELS, draw_demo, draw_runs, limits, panels_of

ROOT = Path(__file__).parents[2]


def write_events(folder: Path, scalars: dict[str, list[float]]) -> None:
    with SummaryWriter(str(folder)) as writer:
        for name, values in scalars.items():
            for step, value in enumerate(values):
                writer.add_scalar(name, value, 2 * step)


def test_scalars_are_read_back_with_their_steps(tmp_path: Path) -> None:
    # More points than TensorBoard keeps by default, none of which may be dropped.
    values = [index / 8 for index in range(15000)]
    write_events(tmp_path, {"reward/mean": values, "eval/accuracy": [0.25, 0.5]})
    curves = read_scalars(tmp_path)
    assert curves["reward/mean"] == (list(range(0, 30000, 2)), values)
    assert curves["eval/accuracy"] == ([0, 2], [0.25, 0.5])


def test_a_folder_without_scalars_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path}.*no TensorBoard scalars"):
        read_scalars(tmp_path)


def test_picture_changes_with_every_curve(tmp_path: Path) -> None:
    names = [name for _, _, labels in PANELS for name in labels]
    curves = {name: ([0, 1], [0.5, 0.25]) for name in names}

    def picture(curves: dict) -> np.ndarray:
        draw_runs({"a": curves}, "a run", tmp_path / "curves.png")
        return matplotlib.image.imread(tmp_path / "curves.png")

    def panels(image: np.ndarray) -> list[np.ndarray]:
        """Cut the picture into its nine panels, without the heading."""
        rows = np.array_split(image[40:], 3)
        return [part for row in rows for part in np.array_split(row, 3, axis=1)]

    whole = picture(curves)
    assert (whole == picture(curves)).all()
    for place in range(max(len(labels) for _, _, labels in PANELS)):
        # The curve at this place in every panel at once: each panel must look different.
        chosen = [list(labels)[place] if place < len(labels) else None for *_, labels in PANELS]
        changed = {name: ([0, 1], [0.5, 0.75]) for name in chosen if name is not None}
        pieces = zip(panels(whole), panels(picture({**curves, **changed})), strict=True)
        for name, (before, after) in zip(chosen, pieces, strict=True):
            assert (before != after).any() == (name is not None), name
    picture({})  # A run that was killed early still has a picture.


def test_picture_of_several_runs_changes_with_each(tmp_path: Path) -> None:
    runs = {run: {"reward/mean": ([0, 1, 2], [0.1, 0.2, 0.3])} for run in "abc"}

    def picture(runs: dict) -> bytes:
        draw_runs(runs, "runs", tmp_path / "curves.png")
        return matplotlib.image.imread(tmp_path / "curves.png").tobytes()

    whole = picture(runs)
    for run in runs:
        assert picture({**runs, run: {"reward/mean": ([0, 1, 2], [0.1, 0.9, 0.3])}}) != whole


def test_own_metrics_have_a_panel_of_their_own(tmp_path: Path) -> None:
    curves = {"reward/mean": ([0, 2], [0.0, 1.0]), "reward/zero_std_groups": ([0], [0.5])}
    assert panels_of({"a": curves}) == list(PANELS)
    own = {"reward/format": ([0, 2], [0.1, 0.2]), "reward/gsm8k/steps": ([0], [3.0])}
    *rest, last = panels_of({"a": curves | own, "b": curves})
    assert rest == list(PANELS)
    assert last.labels == {"reward/format": "format", "reward/gsm8k/steps": "gsm8k/steps"}
    for folder, runs in (("one", {"a": curves | own}), ("two", {"a": curves | own, "b": own})):
        draw_runs(runs, "own", tmp_path / f"{folder}.png")
        assert (tmp_path / f"{folder}.png").stat().st_size > 1000


def test_a_quantity_has_one_colour_in_all_panels() -> None:
    from megatron_espo.monitor.pictures import _style

    for pair in (
        ("reward/mean", "eval/reward"),
        ("reward/correct", "eval/accuracy"),
        ("policy/ratio/max", "policy/ratio/mean"),
        ("time/rollout", "performance/rollout_tokens_per_second"),
    ):
        assert _style(pair[0], 0)["color"] == _style(pair[1], 3)["color"]
    named = [label for panel in PANELS for label in panel.labels]
    assert len(named) == len(set(named))


def test_one_spike_does_not_flatten_a_panel() -> None:
    calm = [1.0 + 0.01 * (i % 5) for i in range(40)]
    low, high = limits([[*calm, 50.0, float("nan"), -7.0]])
    assert 0.9 < low < 1.0 and 1.04 < high < 1.1
    # Few points are all shown, and so is what belongs to the curve.
    assert limits([[1.0, 1.0, 50.0]])[1] > 50.0
    low, high = limits([[float(i) for i in range(100)]])
    assert low < 0.0 and high > 99.0
    low, high = limits([[16.0] * 30])
    assert low < 16.0 < high
    assert limits([[float("nan")]]) == (0.0, 1.0)


def test_picture_of_demos_shows_every_number(tmp_path: Path) -> None:
    tests = {"seed 1": {"before": 0.1, "control": 0.2, "after ESPO": 0.5}}
    runs = {"seed 1": {"eval/accuracy": ([0, 8, 16], [0.1, 0.3, 0.5])}}

    def picture(tests: dict, runs: dict) -> bytes:
        draw_demo(tests, runs, tmp_path / "demo.png")
        return matplotlib.image.imread(tmp_path / "demo.png").tobytes()

    whole = picture(tests, runs)
    assert whole == picture(tests, runs)
    for name in tests["seed 1"]:
        assert picture({"seed 1": {**tests["seed 1"], name: 0.4}}, runs) != whole
    assert picture(tests, {"seed 1": {"eval/accuracy": ([0, 8, 16], [0.1, 0.2, 0.5])}}) != whole


def test_runs_are_named_by_what_tells_them_apart() -> None:
    assert run_names([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    assert run_names([Path("/x/1/a"), Path("/x/2/a")]) == ["1/a", "2/a"]
    with pytest.raises(ValueError, match="/x/a: is given twice"):
        run_names([Path("/x/a"), Path("/x/a")])


def plot_run(*folders: Path) -> subprocess.CompletedProcess[str]:
    command = [python(), "tools/plot_run.py", *map(str, folders)]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)


def test_tool_prints_the_table_of_a_demo(tmp_path: Path) -> None:
    write_events(tmp_path / "tensorboard/espo", {"reward/mean": [0.25, 0.5]})
    base = {"accuracy": 0.125, "reward": 0.5, "num_problems": 40}
    espo = {"accuracy": 0.625, "reward": 0.75, "num_problems": 40}
    (tmp_path / "test-base.log").write_text(f"noise\n{json.dumps(base)}\n")
    (tmp_path / "test-espo.log").write_text(f"{json.dumps(base)}\n{json.dumps(espo)}\nnoise\n")
    done = plot_run(tmp_path)
    assert done.returncode == 0
    rows = {line[:30].strip(): line[30:].split() for line in done.stdout.splitlines() if line}
    assert rows["before (fine-tuned base)"] == ["12.5%", "0.500", "40"]
    assert rows["after ESPO"] == ["62.5%", "0.750", "40"]
    assert "control (more SFT)" not in rows
    assert (tmp_path / "curves.png").stat().st_size > 1000
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored == {"base": base, "espo": espo, "hf": None, "control": None}


def test_tool_compares_runs(tmp_path: Path) -> None:
    for run in ("one", "two"):
        write_events(tmp_path / run / "tensorboard", {"reward/mean": [0.25, 0.5]})
    done = plot_run(tmp_path / "one", tmp_path / "two", Path("--out"), tmp_path / "both.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "both.png").stat().st_size > 1000


def test_tool_draws_demos_and_says_which_are_none(tmp_path: Path) -> None:
    write_events(tmp_path / "run/tensorboard", {"eval/accuracy": [0.25, 0.5]})
    picture = tmp_path / "demo.png"
    done = plot_run(tmp_path / "run", Path("--demo"), Path("--out"), picture)
    assert done.returncode == 2 and "a demo that has been tested" in done.stderr
    row = json.dumps({"accuracy": 0.5, "reward": 0.5, "num_problems": 40})
    (tmp_path / "run/test-espo.log").write_text(row)
    done = plot_run(tmp_path / "run", Path("--demo"), Path("--out"), picture)
    assert done.returncode == 0 and picture.stat().st_size > 1000, done.stderr


def test_tool_names_a_folder_without_a_run(tmp_path: Path) -> None:
    done = plot_run(tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path}") and done.stderr.count("\n") == 1
