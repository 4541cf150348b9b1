"""Task interface: reading JSONL, splits by hash, drawing distinct problems, loading by name."""

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_espo.errors import UserError
from megatron_espo.tasks import BUILT_IN, checking, countdown, load_task, sudoku
from megatron_espo.tasks.base import (
    SPLITS,
    DemonstratingTask,
    Example,
    Score,
    draw_distinct,
    read_jsonl,
    split_of,
)
from megatron_espo.tasks.checking import RESERVED_METRICS, checked_score


def parse(record: Mapping[str, Any]) -> Example:
    if record["n"] < 0:
        raise ValueError("'n' is negative; make it 0 or more")
    return Example(prompt=record["text"], answer={"n": record["n"]})


def read(path: Path) -> list[Example]:
    return read_jsonl(path, {"text": str, "n": int}, parse)


def test_reader_returns_every_line_in_order_and_skips_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "é", "n": 1}\r\n\n  \n{"text": "b", "n": 2, "more": []}', "utf-8")
    assert read(path) == [Example("é", {"n": 1}), Example("b", {"n": 2})]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a", "n": 1', "not valid JSON"),
        (b'{"text": "\xff", "n": 1}', "byte 10 of the line is not UTF-8"),
        (b"[" * 100_000, "not valid JSON"),
        (b'["a", 1]', "holds a JSON list"),
        (b"null", "holds a JSON NoneType"),
        (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "not valid JSON"),
        (rb'{"text": "a \ud83d", "n": 1}', r'spells "\\ud83d", half of a surrogate pair'),
        (rb'{"text": "a", "n": 1, "\uDE00": [{"more": 1}]}', "half of a surrogate pair"),
        (b'{"text": "a"}', "key 'n' is missing"),
        (b'{"text": "a", "n": "1"}', "'n' is of type str; make it int"),
        (b'{"text": "a", "n": true}', "'n' is of type bool; make it int"),
        (b'{"text": "a", "n": 1.0}', "'n' is of type float; make it int"),
        (b'{"text": "a", "n": -1}', "'n' is negative"),
    ],
)
def test_reader_names_file_and_line_of_a_malformed_line(
    tmp_path: Path, line: bytes, message: str
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "a", "n": 1}\n\n' + line + b'\n{"text": "a", "n": 1}\n')
    with pytest.raises(ValueError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:3: ")


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_reader_refuses_a_file_without_examples(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="holds no example") as caught:
        read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["missing.jsonl", "."])
def test_reader_refuses_what_is_not_a_readable_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        read(tmp_path / name)


def test_splits_are_a_fixed_property_of_the_key_with_shares_80_10_10() -> None:
    counts = Counter(split_of(str(key)) for key in range(20_000))
    assert [counts[split] / 20_000 for split in SPLITS] == pytest.approx([0.8, 0.1, 0.1], abs=0.01)
    # Pinned: another hash would move problems of data sets already written across splits.
    for split, members in (("validation", [11, 37, 54]), ("test", [1, 7, 10, 15, 24])):
        assert [key for key in range(60) if split_of(str(key)) == split] == members


def test_drawing_finds_every_problem_of_a_split_then_says_that_there_are_no_more() -> None:
    state = iter(range(10**9))

    def draw() -> tuple[str, dict[str, Any]] | None:
        number = next(state) % 200
        return None if number % 2 else (str(number), {"number": number})

    expected = [n for n in range(0, 200, 2) if split_of(str(n)) == "validation"]
    found = draw_distinct(draw, len(expected), "validation")
    assert [record["number"] for record in found] == expected
    with pytest.raises(ValueError, match=f"only {len(expected)} of 50 distinct validation"):
        draw_distinct(draw, 50, "validation")


def test_only_misses_in_a_row_count_as_exhaustion() -> None:
    misses = [None] * 9_999
    draws = iter([*misses, ("0", {"n": 0}), *misses, ("2", {"n": 2})])
    assert draw_distinct(lambda: next(draws), 2, "train") == [{"n": 0}, {"n": 2}]


def test_drawing_refuses_an_unknown_split_and_a_negative_count() -> None:
    with pytest.raises(ValueError, match="split 'dev' is unknown; use one of train, validation"):
        draw_distinct(lambda: None, 0, "dev")
    with pytest.raises(ValueError, match="-1"):
        draw_distinct(lambda: None, -1, "train")


def test_built_in_tasks_load_by_name_and_can_demonstrate() -> None:
    assert load_task("sudoku") is sudoku
    assert load_task("countdown") is countdown
    for name, task in BUILT_IN.items():
        assert task.name == name
        assert isinstance(task, DemonstratingTask) is (name in ("sudoku", "countdown"))


TASK_MODULE = """
from types import SimpleNamespace
from megatron_espo.tasks import Score

name = "mine"

def read(path):
    return []

def score(example, completion):
    return Score(1.0, True, {})

other = SimpleNamespace(name="other", read=read, score=score)
nameless = SimpleNamespace(name=3, read=read)

class AsClass:
    name, read, score = name, read, score
"""


@pytest.fixture
def user_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "users_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "my_task.py").write_text(TASK_MODULE)
    (package / "broken.py").write_text("import a_library_that_is_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    for module in [name for name in sys.modules if name.startswith("users_package")]:
        monkeypatch.delitem(sys.modules, module)


@pytest.mark.usefixtures("user_package")
def test_users_task_loads_as_module_or_attribute() -> None:
    assert load_task("users_package.my_task").name == "mine"
    assert load_task("users_package.my_task:other").name == "other"


@pytest.mark.usefixtures("user_package")
@pytest.mark.parametrize(
    "name",
    [
        "sudku",
        "",
        ".sudoku",
        "my-task",
        "users_package.no_task",
        "users_package.my_task.deeper",
        "users_package.my_task:nothing",
        "users_package.my_task:",
        ":sudoku",
    ],
)
def test_unknown_task_error_names_flag_known_names_and_import_path(name: str) -> None:
    with pytest.raises(ValueError, match="no such task") as caught:
        load_task(name)
    for part in (f"--task {name}:", "sudoku, countdown", "my_package.my_tasks:attribute"):
        assert part in str(caught.value)


@pytest.mark.usefixtures("user_package")
@pytest.mark.parametrize(
    ("name", "lacking"),
    [
        ("json", "the module of this name lacks name, read, score:"),
        ("os.path", "the module of this name lacks name, read, score:"),
        ("torch", "the module of this name lacks name, read, score:"),
        ("users_package.my_task:nameless", "the SimpleNamespace of this name lacks name, score:"),
    ],
)
def test_whatever_else_can_be_imported_is_no_task_and_the_known_ones_are_named(
    name: str, lacking: str
) -> None:
    with pytest.raises(ValueError, match="no such task") as caught:
        load_task(name, flag="--espo-task")
    message = str(caught.value)
    assert message.startswith(f"--espo-task {name}: no such task; use one of sudoku, countdown")
    assert lacking in message


@pytest.mark.usefixtures("user_package")
def test_a_file_is_a_task_wherever_it_lies_and_imports_what_lies_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "my-tasks"
    folder.mkdir()
    text = "from words_of_mine import NAME\n" + TASK_MODULE + "name = NAME\n"
    (folder / "json.py").write_text(text)
    (folder / "words_of_mine.py").write_text("NAME = 'of a file'\n")
    (folder / "broken.py").write_text("import a_library_that_is_not_installed\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    task = load_task(str(folder / "json.py"))
    assert task.name == "of a file" and sys.modules["json"] is json
    monkeypatch.chdir(folder)
    assert load_task("json.py") is task  # one file is imported once
    assert load_task("json.py:other").name == "other"
    for name, message in (
        ("no.py", "--task no.py: no such file; give the path of your task's FILE.py"),
        ("json.py:nothing", "--task json.py:nothing: no such task"),
        ("words_of_mine.py", "the module of this name lacks name, read, score"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            load_task(name)
    with pytest.raises(ModuleNotFoundError, match="a_library_that_is_not_installed"):
        load_task("broken.py")


NUMBERED = Example("p", {"n": 3})


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (1.0, "score returned 1.0 (float); return a megatron_espo.tasks.base.Score"),
        ({"reward": 1}, "score returned {'reward': 1} (dict); return"),
        (None, "score returned None (NoneType); return"),
        ((1.0, True, {}), "score returned (1.0, True, {}) (tuple); return"),
        ("x" * 500, "xxx... (str); return"),
        (Score(math.nan, True, {}), "the reward is nan (float); make it a finite number"),
        (Score(math.inf, True, {}), "the reward is inf (float); make it a finite number"),
        (Score(-math.inf, True, {}), "the reward is -inf (float)"),
        (Score("1", True, {}), "the reward is '1' (str)"),
        (Score(None, True, {}), "the reward is None (NoneType)"),
        (Score([1.0], True, {}), "the reward is [1.0] (list)"),
        (Score(10**400, True, {}), "(int); make it a finite number"),
        (Score(1.0, True, {"a": math.nan}), "the metric 'a' is nan (float)"),
        (Score(1.0, True, {"a": "b"}), "the metric 'a' is 'b' (str)"),
        (Score(1.0, True, None), "metrics is None (NoneType); make it a dict of numbers"),
        (Score(1.0, True, {3: 1.0}), "a metric is called 3, a name that is reserved"),
        (Score(1.0, True, {"": 1.0}), "a metric is called ''"),
        (Score(1.0, True, {"by_task/x/mean": 1.0}), "a metric is called 'by_task/x/mean'"),
        (Score(1.0, np.ones(2), {}), "correct is array([1., 1.]) (ndarray); make it True or False"),
    ],
)
def test_a_score_that_cannot_be_used_is_named_with_task_record_and_value(
    score: object, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        checked_score("mine", NUMBERED, score)
    assert str(caught.value).startswith('task mine, record {"n": 3}: ')
    assert message in str(caught.value) and len(str(caught.value)) < 500


def test_a_score_is_passed_on_in_plain_numbers() -> None:
    score = checked_score("mine", NUMBERED, Score(np.float32(0.5), np.bool_(1), {"a": np.int64(2)}))
    assert score == Score(0.5, True, {"a": 2.0})
    kinds = [type(value) for value in (score.reward, score.correct, score.metrics["a"])]
    assert kinds == [float, bool, float]


def test_every_name_that_the_trainer_logs_under_reward_is_reserved() -> None:
    folder = Path(checking.__file__).parents[1]
    source = "".join((folder / name).read_text() for name in ("rl/scalars.py", "rl/reports.py"))
    logged = set(re.findall(r'"reward/(\w+)', source))
    assert {"mean", "std", "correct", "timeouts", "by_task"} <= logged <= RESERVED_METRICS


@pytest.mark.usefixtures("user_package")
def test_a_class_is_no_task() -> None:
    with pytest.raises(ValueError, match="is a class"):
        load_task("users_package.my_task:AsClass")


@pytest.mark.usefixtures("user_package")
def test_missing_dependency_of_a_users_task_keeps_its_own_error() -> None:
    with pytest.raises(ModuleNotFoundError, match="a_library_that_is_not_installed"):
        load_task("users_package.broken")
