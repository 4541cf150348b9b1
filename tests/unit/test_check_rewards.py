"""tools/check_rewards.py: answers of every kind of file, what it counts and what it refuses."""

import json
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import pytest
from tool_loading import load_tool

from megatron_espo.command_line import status_of
from megatron_espo.tasks import BUILT_IN, Score, countdown

ROOT = Path(__file__).parents[2]
SOLUTIONS = ROOT / "tests" / "data" / "solutions"

GSM8K = {"question": "How many?", "answer": "1,234"}
MATH = {"problem": "What is it?", "answer": "\\left( 3, \\frac{\\pi}{2} \\right)"}
COUNTDOWN = {"numbers": [3, 3, 8, 8], "target": 24}
SUDOKU = {"puzzle": "3102200002100320", "solution": "3142243142131324"}
ASSERTIONS = {
    "prompt": "Write double(x).",
    "tests": ["assert double(2) == 4", "assert double('a') == 'aa'"],
}
CHECKED = {
    "prompt": "def half(x):\n    return x / 2\n\ndef quarter(x):\n    pass\n",
    "tests": "def check(candidate):\n    assert candidate(8) == 2\n",
}
PROGRAMS = '''"""Solutions."""

import operator


def _twice(x):
    return operator.add(x, x)


def double(x):
    return _twice(x)


def quarter(x):
    return half(half(x))


def unknown(x):
    return x
'''


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("check_rewards")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


def write(path: Path, *records: object) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.mark.parametrize(
    ("record", "task"),
    [
        (GSM8K, "gsm8k"),
        (MATH, "math"),
        (COUNTDOWN, "countdown"),
        ({**COUNTDOWN, "solution": "8/(3-8/3)", "style": "bare"}, "countdown"),
        (SUDOKU, "sudoku"),
        ({**SUDOKU, "style": "bare"}, "sudoku"),
    ],
)
def test_answers_earn_full_reward(
    tool: ModuleType, data: Path, capsys: pytest.CaptureFixture[str], record: object, task: str
) -> None:
    write(data / "x.jsonl", record, record)
    assert status_of(tool.main, ["--data", str(data)]) == 0
    assert capsys.readouterr().out == (
        f"x.jsonl: 2 records of {task}, 2 of 2 answers earn full reward\n"
    )


@pytest.mark.parametrize("task", ["gsm8k", "math", "countdown", "sudoku"])
def test_answers_that_a_reward_does_not_take_are_named(
    tool: ModuleType, data: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, task: str,
) -> None:  # fmt: skip
    records = {"gsm8k": GSM8K, "math": MATH, "countdown": COUNTDOWN, "sudoku": SUDOKU}
    write(data / "x.jsonl", records[task])
    monkeypatch.setattr(BUILT_IN[task], "score", lambda example, text: Score(1.0, False, {}))
    assert status_of(tool.main, ["--data", str(data)]) == 1
    assert "0 of 1 answers earn full reward; not full: 1 (lines 1)" in capsys.readouterr().out


def test_math_is_judged_as_mathematics_and_not_letter_by_letter(
    tool: ModuleType, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(data / "x.jsonl", MATH, {"problem": "?", "answer": "\\text{no} mathematics \\at \\all{"})
    assert status_of(tool.main, ["--data", str(data)]) == 1
    assert "1 of 2 answers earn full reward; not full: 1 (lines 2)" in capsys.readouterr().out


def test_records_without_an_answer_or_a_format_are_counted(
    tool: ModuleType, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(data / "a.jsonl", MATH, {"problem": "?", "answer": None}, MATH)
    write(data / "b.jsonl", {"numbers": [2, 2], "target": 99}, COUNTDOWN)
    write(data / "c.jsonl", ASSERTIONS)
    write(data / "d.jsonl", {"riddle": "?"})
    assert status_of(tool.main, ["--data", str(data)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "a.jsonl: 3 records of math, 2 of 2 answers earn full reward; unusable: 1 (lines 2)",
        "b.jsonl: 2 records of countdown, 1 of 1 answers earn full reward",
        "c.jsonl: 1 records of code, without answers",
        "d.jsonl: 1 records of no known task, without answers; unusable: 1 (lines 1)",
    ]


def test_solutions_are_found_by_the_function_that_tests_call(
    tool: ModuleType, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(data / "x.jsonl", ASSERTIONS, CHECKED, {"prompt": "Write f.", "tests": ["assert f()"]})
    write(data / "y.jsonl", ASSERTIONS)
    (tmp_path / "x.py").write_text(PROGRAMS)
    assert status_of(tool.main, ["--data", str(data), "--solutions", str(tmp_path)]) == 0
    start, x, y = capsys.readouterr().out.splitlines()
    assert start.startswith("sandbox: ")
    assert x == "x.jsonl: 3 records of code, 2 of 2 answers earn full reward"
    assert y == "y.jsonl: 1 records of code, without answers"


def test_wrong_solution_fails(
    tool: ModuleType, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(data / "x.jsonl", ASSERTIONS, CHECKED)
    (tmp_path / "x.py").write_text(PROGRAMS.replace("operator.add(x, x)", "operator.mul(x, 2.0)"))
    assert status_of(tool.main, ["--data", str(data), "--solutions", str(tmp_path)]) == 1
    assert "1 of 2 answers earn full reward; not full: 1 (lines 1)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "holds no NAME.py for a NAME.jsonl"), ("def f(:", "cannot be read as Python")],
)
def test_unusable_solutions_are_one_sentence(
    tool: ModuleType, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    content: str | None, message: str,
) -> None:  # fmt: skip
    write(data / "x.jsonl", ASSERTIONS)
    if content is not None:
        (tmp_path / "x.py").write_text(content)
    assert status_of(tool.main, ["--data", str(data), "--solutions", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_folder_without_data_is_one_sentence(
    tool: ModuleType, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(tool.main, ["--data", str(data)]) == 2
    assert "holds no .jsonl or .parquet file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("numbers", "target"),
    [
        ([3, 3, 8, 8], 24),
        ([44, 19, 35], 98),
        ([1, 3, 3], 1),
        ([5, 7, 12], 0),
        ([7], 7),
        ([2, 9], 18),
    ],
)
def test_search_finds_an_expression_of_all_numbers(
    tool: ModuleType, numbers: list[int], target: int
) -> None:
    parsed = countdown.parse_expression(tool._solve(numbers, target))
    assert sorted(parsed.numbers) == sorted(numbers)
    assert parsed.value == Fraction(target)


def test_search_gives_up_where_there_is_nothing_or_too_much(tool: ModuleType) -> None:
    assert tool._solve([1, 1, 1], 99) is None
    assert tool._solve([7, 7], 0.5) is None
    assert tool._solve([1, 2, 3, 4, 5, 6], 21) is None


@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_solutions_in_the_repository_are_programs_with_a_number_each(
    tool: ModuleType, name: str
) -> None:
    path = SOLUTIONS / f"{name}.py"
    programs = tool._programs(path)
    assert sum(map(len, programs.values())) >= (164 if name == "humaneval" else 200)
    for function, sources in programs.items():
        for program in sources:
            compile(program, function, "exec")
    mark = "# HumanEval/" if name == "humaneval" else "  # "
    numbered = [
        line for line in path.read_text().splitlines() if line.startswith("def ") and mark in line
    ]
    assert len(numbered) == sum(map(len, programs.values()))
