"""tools/prepare_data.py: complete files, disjoint problems, one sentence and exit code 2."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from interpreter import python

from megatron_espo.command_line import status_of
from megatron_espo.commands import prepare_data
from megatron_espo.errors import UserError
from megatron_espo.tasks import BUILT_IN
from megatron_espo.tasks.base import split_of

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "prepare_data.py"
FILES = ("train", "validation", "test", "demonstrations")
COUNTS = ["--train", "30", "--validation", "7", "--test", "5", "--demonstrations", "20"]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return prepare_data


def prompts(name: str, path: Path) -> list[object]:
    if path.stem == "demonstrations":
        return [json.loads(line)["prompt"] for line in path.read_text().splitlines()]
    return [example.prompt for example in BUILT_IN[name].read(path)]


@pytest.mark.parametrize("name", ["sudoku", "countdown"])
def test_files_have_the_asked_counts_and_share_no_problem(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    out = tmp_path / "deep" / "data"
    assert status_of(tool.main, [name, "--out", str(out), "--seed", "3", *COUNTS]) == 0
    assert sorted(path.name for path in out.iterdir()) == sorted(f"{f}.jsonl" for f in FILES)
    found = {stem: prompts(name, out / f"{stem}.jsonl") for stem in FILES}
    assert [len(found[stem]) for stem in FILES] == [30, 7, 5, 20]
    assert len({prompt for part in found.values() for prompt in part}) == 62
    report = capsys.readouterr().out
    for stem, count in zip(FILES, (30, 7, 5, 20), strict=True):
        assert f"{out / stem}.jsonl: {count} lines of {name}" in report


def test_a_tasks_settings_and_several_demonstrations_of_a_problem(
    tool: ModuleType, tmp_path: Path
) -> None:
    argv = ["countdown", "--out", str(tmp_path), "--train", "9", "--demonstrations", "20"]
    argv += ["--demonstrations-each", "3", "--task-args", "max_number=7", "operators=-+"]
    assert status_of(tool.main, [*argv, "num_numbers=2", "--noise", "0"]) == 0
    train = [json.loads(line) for line in (tmp_path / "train.jsonl").open()]
    assert all(len(r["numbers"]) == 2 and max(r["numbers"]) <= 7 for r in train)
    assert {sign for r in train for sign in r["solution"] if not sign.isdigit()} == {"+", "-"}
    lines = [json.loads(line)["prompt"] for line in (tmp_path / "demonstrations.jsonl").open()]
    assert len(lines) == 20 and len(set(lines)) == 7
    assert lines[:7] == lines[7:14] and lines[14:] == lines[:6]


def test_demonstrations_come_from_the_train_split_and_follow_the_noise(
    tool: ModuleType, tmp_path: Path
) -> None:
    for noise in ("0", "1"):
        argv = ["sudoku", "--out", str(tmp_path), "--demonstrations", "60", "--noise", noise]
        assert status_of(tool.main, argv) == 0
        assert [path.name for path in tmp_path.iterdir()] == ["demonstrations.jsonl"]
        lines = [json.loads(line) for line in (tmp_path / "demonstrations.jsonl").open()]
        assert all(line.keys() == {"prompt", "completion"} for line in lines)
        assert {split_of(line["prompt"]) for line in lines} == {"train"}
        solutions = [r["solution"] for r in BUILT_IN["sudoku"].generate(60, 0, "train")]
        exact = sum(
            line["completion"] == right for line, right in zip(lines, solutions, strict=True)
        )
        assert exact == 60 if noise == "0" else exact < 10


def test_seed_decides_every_byte(tool: ModuleType, tmp_path: Path) -> None:
    for folder, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        tool.main(["countdown", "--out", str(tmp_path / folder), "--seed", seed, *COUNTS])
    for stem in FILES:
        one, same, other = (tmp_path / f / f"{stem}.jsonl" for f in "abc")
        assert one.read_bytes() == same.read_bytes() != other.read_bytes()


def test_failure_leaves_earlier_files_as_they_were(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert status_of(tool.main, ["sudoku", "--out", str(tmp_path), *COUNTS]) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*_: object) -> str:
        raise UserError("demonstration failed")

    monkeypatch.setattr(BUILT_IN["sudoku"], "demonstrate", fail)
    assert status_of(tool.main, ["sudoku", "--out", str(tmp_path), "--seed", "9", *COUNTS]) == 2
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_check_counts_a_good_file_and_names_the_bad_line(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"numbers": [44, 19, 35], "target": 98}\n' * 3)
    assert status_of(tool.main, ["countdown", "--check", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: 3 examples of countdown\n"
    path.write_text('{"numbers": [44, 19, 35], "target": 98}\n{"numbers": [44]}\n')
    assert status_of(tool.main, ["countdown", "--check", str(path)]) == 2
    assert f"{path}:2: key 'target' is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["sudku", "--out", "OUT", "--train", "1"], "TASK sudku: no such task"),
        (["sudoku", "--out", "OUT"], "nothing to write; give one of --train"),
        (["sudoku", "--out", "OUT", "--train", "-1"], "--train is -1"),
        (["sudoku", "--out", "OUT", "--demonstrations", "-1"], "--demonstrations is -1"),
        (["sudoku", "--out", "OUT", "--train", "1", "--noise", "1.5"], "--noise is 1.5"),
        (["sudoku", "--out", "OUT", "--train", "1", "--noise", "nan"], "--noise is nan"),
        (
            ["countdown", "--out", "OUT", "--train", "1", "--task-args", "max_numbers=3"],
            "--task-args max_numbers=3: generate() of countdown has max_number, num_numbers,",
        ),
        (
            ["countdown", "--out", "OUT", "--train", "1", "--task-args", "max_number=x"],
            "'x' is no int",
        ),
        (
            ["countdown", "--out", "OUT", "--train", "1", "--task-args", "operators=%"],
            "operators '%'",
        ),
        (
            ["sudoku", "--out", "OUT", "--demonstrations", "1", "--demonstrations-each", "0"],
            "--demonstrations-each is 0",
        ),
        (["sudoku", "--check", "OUT/none.jsonl"], "none.jsonl: cannot be read"),
        (["sudoku", "--out", "OUT/file/deeper", "--train", "1"], "Not a directory; choose"),
        (["plain_task", "--out", "OUT", "--train", "1"], "task plain has no generate()"),
        (["plain_task:rich", "--out", "OUT", "--demonstrations", "1"], "has no demonstrate()"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    tool: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    message: str,
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "plain_task.py").write_text(
        "from types import SimpleNamespace\n"
        "from megatron_espo.tasks import Example\n"
        "name = 'plain'\n"
        "def read(path): return [Example('p', {})]\n"
        "def score(example, completion): raise NotImplementedError\n"
        "def generate(count, seed, split): return [{}] * count\n"
        "rich = SimpleNamespace(name='rich', read=read, score=score, generate=generate)\n"
        "del generate\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "plain_task", raising=False)
    before = sorted(tmp_path.iterdir())
    assert status_of(tool.main, [argument.replace("OUT", str(tmp_path)) for argument in argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert [p for p in sorted(tmp_path.iterdir()) if p.name != "__pycache__"] == before


OWN_TASK = """
import json
from random import Random
from megatron_espo.tasks.base import Example, Score, read_jsonl

name = "own"

def read(path):
    return read_jsonl(path, {"n": int}, lambda r: Example(f"What is {r['n']}?", dict(r)))

def score(example, completion):
    return Score(0.0, False, {})

def generate(count, seed, split):
    rng = Random(seed)  # forgets the split, and repeats itself
    return [{"n": rng.randrange(MOST)} for _ in range(count)]

def demonstrate(record, rng, noise):
    return str(record["n"])
"""


def test_own_problems_that_generate_gives_to_several_splits_stay_in_one(
    tool: ModuleType, tmp_path: Path
) -> None:
    path = tmp_path / "own.py"
    path.write_text(OWN_TASK.replace("MOST", "200"))
    for folder in ("a", "b"):
        tool.main([str(path), "--out", str(tmp_path / folder), *COUNTS])
    found = {}
    for stem, count in zip(FILES, (30, 7, 5, 20), strict=True):
        text = (tmp_path / "a" / f"{stem}.jsonl").read_text()
        assert text == (tmp_path / "b" / f"{stem}.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        found[stem] = [line.get("prompt") or f"What is {line['n']}?" for line in lines]
        assert len(lines) == count
    assert len({prompt for part in found.values() for prompt in part}) == 62
    path = tmp_path / "few.py"
    path.write_text(OWN_TASK.replace("MOST", "50"))
    with pytest.raises(UserError) as caught:
        tool.main([str(path), "--out", str(tmp_path / "c"), *COUNTS])
    said = str(caught.value)
    assert "task own: of 3200 train problems that generate() gave, 38 are distinct and in" in said
    assert "draw_distinct" in said and not (tmp_path / "c").exists()


def test_command_line_exits_without_a_traceback(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for argv, code in (
        (["sudoku", "--out", str(tmp_path), "--test", "2"], 0),
        (["sudku", "--out", str(tmp_path), "--test", "2"], 2),
        (["sudoku"], 2),
        (["sudoku", "--out", str(tmp_path), "--check", "x"], 2),
        (["sudoku", "--out", str(tmp_path), "--test", "many"], 2),
    ):
        result = subprocess.run(
            [python(), str(SCRIPT), *argv],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == code, result.stderr
        assert "Traceback" not in result.stderr


def test_published_files_are_checked_split_and_counted(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    records = [{"question": f"{n} and 1?", "answer": f"#### {n + 1}"} for n in range(40)]
    lines = [json.dumps(record) for record in records]
    (source / "train.jsonl").write_text("\n".join(lines[:30] + lines[38:] + ['{"question": "x"}']))
    (source / "test.jsonl").write_text("\n".join(lines[30:]))
    argv = ["gsm8k", "--source", str(source), "--out", str(out)]
    assert status_of(tool.main, [*argv, "--train", "20"]) == 0
    # A test problem that is among the training problems stays in the test split alone.
    assert [len(prompts("gsm8k", out / f"{s}.jsonl")) for s in ("train", "test")] == [20, 10]
    assert "1 unusable, 2 repeated left out" in capsys.readouterr().out
    (source / "train.jsonl").rename(source / "all.jsonl")
    (source / "test.jsonl").unlink()
    assert status_of(tool.main, argv) == 0
    found = [prompts("gsm8k", out / f"{s}.jsonl") for s in ("train", "validation", "test")]
    assert sum(map(len, found)) == 32 and len(found[0]) > 20


def test_chat_style_reaches_problems_and_demonstrations(tool: ModuleType, tmp_path: Path) -> None:
    argv = ["sudoku", "--out", str(tmp_path), "--train", "2", "--demonstrations", "2"]
    assert status_of(tool.main, [*argv, "--style", "chat", "--noise", "0"]) == 0
    assert all(not isinstance(p, str) for p in prompts("sudoku", tmp_path / "train.jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "demonstrations.jsonl").open()]
    assert all(line["messages"][-1]["content"].startswith("<answer>") for line in lines)


def test_without_the_hub_a_download_is_a_clear_error(
    tool: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def refuse(*_: object, **__: object) -> str:
        raise OSError("no route to the hub")

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    assert status_of(tool.main, ["gsm8k", "--source", "hub", "--out", str(tmp_path / "o")]) == 2
    error = capsys.readouterr().err
    assert "--source openai/gsm8k: cannot be downloaded (no route to the hub)" in error
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, local_files_only=False, **__: (
        str(tmp_path / "cache") if local_files_only else refuse()))  # fmt: skip
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "test.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n')
    assert status_of(tool.main, ["gsm8k", "--source", "hub", "--out", str(tmp_path / "o")]) == 0
    assert "using the copy in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["sudoku", "--source", "hub"], "task sudoku is not on the hub"),
        (["gsm8k", "--source", "./none"], "no such file or folder"),
        (["gsm8k", "--source", "EMPTY"], "holds no .jsonl or .parquet file"),
        (["gsm8k", "--source", "EMPTY", "--demonstrations", "1"], "without --demonstrations"),
    ],
)
def test_bad_source_is_one_sentence(
    tool: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    message: str,
) -> None:
    (tmp_path / "empty").mkdir()
    argv = [argument.replace("EMPTY", str(tmp_path / "empty")) for argument in argv]
    assert status_of(tool.main, [*argv, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
