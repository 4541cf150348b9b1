"""The demo's script at its smallest: every stage runs, and what it leaves agrees."""

import json
import subprocess
from pathlib import Path

import pytest
from interpreter import python
from test_end_to_end import ENVIRONMENT, ROOT

from megatron_espo.checkpoint.tracker import checkpoint_folder
from megatron_espo.startup.stored import stored_arguments

pytestmark = pytest.mark.slow

SCRIPTS = ("pretrain_tiny.sh", "run_espo_tiny.sh", "adapt_tiny.sh")


def demo(out: Path, *flags: str, ranks: int = 2) -> str:
    done = subprocess.run(
        ["examples/run_espo_tiny.sh", "sudoku", "--out", str(out), *flags], cwd=ROOT,
        env={**ENVIRONMENT, "PYTHON": python(), "SMOKE": "1", "RANKS": str(ranks)},
        text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def completions(run: Path, name: str) -> list[list[int]]:
    lines = (run / "evaluation" / name / "completions.jsonl").read_text().splitlines()
    made = sorted((json.loads(line) for line in lines), key=lambda c: c["problem"])
    return [completion["token_ids"] for completion in made]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "run"
    printed = demo(out)
    for label in ("before", "after ESPO", "the same, from Hugging Face", "control"):
        assert f"\n{label}" in printed
    return out


def test_demo_leaves_a_table_a_picture_and_a_hugging_face_folder(run: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    assert {result["num_problems"] for result in results.values()} == {20}
    assert results["hf"]["reward"] == results["espo"]["reward"]
    assert completions(run, "hf") == completions(run, "espo")
    # So little training changes no greedy token yet, but how sure the model is of them.
    sure = {name: result["confidence"] for name, result in results.items()}
    assert sure["hf"] == pytest.approx(sure["espo"], rel=1e-6)
    assert abs(sure["espo"] / sure["base"] - 1) > 1e-4
    assert json.loads((run / "hf/config.json").read_text())["architectures"] == ["LLaDAModelLM"]
    assert (run / "curves.png").stat().st_size > 1000


def test_demo_starts_from_the_base_of_another_run(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "second"
    # One rank completes the problems that two completed.
    demo(out, "--base", str(run), "--no-control", "--", "--rollout-block-length", "8", ranks=1)
    assert completions(out, "base") == completions(run, "base")
    assert {path.name for path in (out / "evaluation").iterdir()} == {"base", "espo", "hf"}


def test_demo_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    for flags, message in (
        (["--positions", "none"], "--positions none is unknown"),
        (["--shape"], "unknown argument --shape"),
        (["--base", str(tmp_path)], "holds no fine-tuned model"),
    ):
        done = subprocess.run(
            ["examples/run_espo_tiny.sh", "--out", str(tmp_path / "out"), *flags],
            cwd=ROOT, env=ENVIRONMENT, text=True, capture_output=True, check=False,
        )  # fmt: skip
        assert done.returncode == 2 and message in done.stderr
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_a_script_leaves_what_it_has_not_made(tmp_path: Path, script: str, kind: str) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    out = {"folder": folder, "file": folder / "thesis.txt", "link": tmp_path / "link"}[kind]
    if kind == "link":
        out.symlink_to(folder)
    done = subprocess.run(
        ["bash", f"examples/{script}", "--out", str(out)], cwd=ROOT,
        env={**ENVIRONMENT, "PYTHON": "/bin/false"}, text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and f"error: --out {out} is not empty and" in done.stderr
    assert (folder / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_replaces_what_it_made(tmp_path: Path, script: str) -> None:
    """Python is a program that fails: it comes no further than to its folder."""
    command = ["bash", f"examples/{script}", "--out", str(tmp_path / "out")]
    environment = {**ENVIRONMENT, "PYTHON": "/bin/false"}
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False)
        assert done.returncode == 1 and not (tmp_path / "out" / "left").exists()
        (tmp_path / "out" / "left").touch()


def test_an_autoregressive_model_is_adapted_beside_one_from_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "text").mkdir()
    for number in range(40):
        (tmp_path / f"text/{number}.txt").write_text(f"{number} cats sat on the mat. " * 20)
    done = subprocess.run(
        ["bash", "examples/adapt_tiny.sh", "--text", str(tmp_path / "text"), "--out", str(out)],
        cwd=ROOT, env={**ENVIRONMENT, "PYTHON": python(), "SMOKE": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    results = json.loads((out / "results.json").read_text())
    rows = {"autoregressive": 8, "adapted": 24, "nothing-b": 16, "nothing-ab": 24}
    rows["nothing-ab-next"] = 24
    assert {name: result["rows"] for name, result in results.items()} == rows
    for name, result in results.items():
        assert 1 < result["loss"] < 7, name
        args = stored_arguments(checkpoint_folder(str(out / name)))
        size = 1 if name == "autoregressive" else 8
        assert (args.attention_mask, args.block_size) == ("context-causal", size)
        sampled = (out / f"sample-{name}.txt").read_text()
        assert all(prompt in sampled for prompt in ("The ", "def ", "Masked diffusion "))
    assert results["adapted"]["next_token_loss"] < results["autoregressive"]["next_token_loss"]
    for log in ("adapted", "as-it-is"):
        loaded = f"successfully loaded checkpoint from {out}/autoregressive"
        assert loaded in (out / f"{log}.log").read_text()
