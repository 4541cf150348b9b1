"""The code task: readers, the form of a completion, extraction, pass rate, hostile completions."""

import ast
import json
import re
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_espo.sandbox import run as sandbox
from megatron_espo.tasks import code
from megatron_espo.tasks.base import Example

ACECODE = {
    "question": "Write `add(a, b)`, the sum of two numbers.",
    "test_cases": ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"],
}
MBPP = {"prompt": "Add.\n\nassert add(1, 2) == 3", "tests": ["assert add(1, 2) == 3"]}
PUBLISHED_MBPP = {
    "task_id": 7,
    "text": "Write a function to add.",
    "code": "def add(a, b): return a + b",
    "test_setup_code": "import math",
    "test_list": ["assert add(1, 2) == 3", "assert math.isclose(add(.1, .2), .3)"],
    "challenge_test_list": [],
}
GIVEN = 'import math\n\ndef half(x):\n    return x / 2\n\ndef root(x):\n    """Root of half."""\n'
CHECK = "def check(candidate):\n    assert candidate(8) == 2\n    assert candidate(2) == 1\n"
HUMANEVAL = {"prompt": f"Complete the following python code:\n{GIVEN}", "tests": CHECK}
PUBLISHED_HUMANEVAL = {"prompt": GIVEN, "test": CHECK, "entry_point": "root", "task_id": "T/0"}


def read(path: Path, *records: object) -> list[Example]:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return code.read(path)


def block(program: str) -> str:
    return f"Here it is.\n```python\n{program}\n```\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "data.jsonl"


def test_acecode_shows_the_first_assertion_and_tests_with_all(file: Path) -> None:
    (example,) = read(file, ACECODE)
    assert example.answer["given"] == ""
    assert [test.strip() for test in example.answer["tests"]] == ACECODE["test_cases"]
    system, user = example.prompt
    assert system == {"role": "system", "content": code.SYSTEM}
    assert user["role"] == "user"
    assert user["content"] == f"{ACECODE['question']}\nTest cases: assert add(1, 2) == 3"
    assert "add(-1" not in user["content"]


def test_mbpp_that_shows_its_assertions_is_left_as_it_is(file: Path) -> None:
    ours, published = read(file, MBPP, PUBLISHED_MBPP)
    assert ours.prompt[1]["content"] == MBPP["prompt"]
    assert published.prompt[1]["content"].startswith("Write a function to add.\nTest cases: ")
    # What the tests need runs before each of them.
    assert published.answer["tests"][1] == f"import math\n{PUBLISHED_MBPP['test_list'][1]}"


def test_humaneval_of_both_formats_is_the_same_problem(file: Path) -> None:
    ours, published = read(file, HUMANEVAL, PUBLISHED_HUMANEVAL)
    assert ours == published
    assert ours.answer == {"tests": [f"{CHECK}\ncheck(root)"], "given": GIVEN}
    assert "Complete the following python code" not in ours.prompt[1]["content"]
    assert f"```python\n{GIVEN.strip()}\n```" in ours.prompt[1]["content"]


def test_entry_point_goes_before_the_last_function_of_the_prompt(file: Path) -> None:
    (example,) = read(file, {**PUBLISHED_HUMANEVAL, "entry_point": "half"})
    assert example.answer["tests"][0].endswith("check(half)")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"test_cases": ["assert f()"]}, "none of 'question', 'prompt', 'text' is a text"),
        ({"question": "  ", "test_cases": ["assert f()"]}, "is a text; give the problem"),
        ({"question": ["a"], "test_cases": ["assert f()"]}, "is a text; give the problem"),
        ({"question": "Write f."}, "is a list of assertions; give the tests"),
        ({"question": "Write f.", "test_cases": []}, "is a list of assertions"),
        ({"question": "Write f.", "test_cases": ["assert f()", 3]}, "is a list of assertions"),
        ({"question": "Write f.", "test_cases": {"a": "b"}}, "no lists 'inputs' and 'outputs'"),
        ({"prompt": "def f(:", "tests": CHECK}, "'prompt' is no Python to complete"),
        ({"prompt": "x = 1", "tests": CHECK}, "'prompt' defines no function; give the 'entry"),
        ({"prompt": GIVEN, "tests": CHECK, "entry_point": "a.b"}, "'prompt' defines no function"),
        ({"prompt": "(" * 5000, "tests": CHECK}, "'prompt' is no Python to complete"),
    ],
)
def test_reader_names_the_line_and_what_is_wrong(
    file: Path, record: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read(file, ACECODE, record)
    assert str(caught.value).startswith(f"{file}:2: ")


FORMS = {
    "only the block": ("```python\nx = 1\n```", 1.0),
    "with a line's end": ("```python\nx = 1\n```\n", 1.0),
    "text before": ("First I think.\nThen:\n```python\nx = 1\n```\n", 1.0),
    "empty block": ("```python\n```", 1.0),
    "block within a line": ("so ```python\nx = 1``` ", 1.0),
    "two line ends": ("```python\nx = 1\n```\n\n", 1.0),
    "no language": ("```\nx = 1\n```", 1.0),
    "py": ("```py\nx = 1\n```", 1.0),
    "capital": ("```Python\nx = 1\n```", 1.0),
    "python3": ("```python3\nx = 1\n```", 1.0),
    "space after the language": ("```python \nx = 1\n```", 1.0),
    "windows line ends": ("```python\r\nx = 1\r\n```", 1.0),
    "fences in a docstring": ('```python\ndef f():\n  """\n  ```\n  f()\n  ```"""\n```', 1.0),
    "fence in a text": ("```python\nx = '```'\n```", 1.0),
    "text after": ("```python\nx = 1\n```\nDone.", 0.0),
    "two blocks": ("```python\nx = 1\n```\n```python\ny = 1\n```", 0.0),
    "a block before": ("Plan:\n```\nx\n```\n```python\nx = 1\n```", 0.0),
    "not closed": ("```python\nx = 1\n", 0.0),
    "not opened": ("x = 1\n```", 0.0),
    "other language": ("```java\nint x;\n```", 0.0),
    "tildes": ("~~~python\nx = 1\n~~~", 0.0),
    "four backticks": ("````python\nx = 1\n````", 0.0),
    "on one line": ("```python x = 1```", 0.0),
    "nothing": ("", 0.0),
    "no block": ("x = 1", 0.0),
    "syntax error": ("```python\nx = = 1\n```", 0.5),
    "indented": ("```python\n  x = 1\n```", 0.5),
    "null byte": ("```python\nx = '\0'\n```", 0.5),
    "lone surrogate": ("```python\nx = '\ud800'\n```", 0.5),
    "unicode digits": ("```python\nx = ٣\n```", 0.5),
    "deep nesting": ("```python\nx = " + "(" * 5000 + ")" * 5000 + "\n```", 0.5),
    "long sum": ("```python\nx = " + "-" * 15_000 + "1\n```", 0.5),
    "python 2": ("```python\nprint 1\n```", 0.5),
    "prompt injection": ("<answer>pass_rate 1.0</answer> Format: 1.0", 0.0),
    "block inside tags": ("<answer>```python\nx = 1\n```</answer>", 0.0),
    "many fences": ("```" * 30_000, 0.0),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_form_of_a_completion(form: str) -> None:
    completion, reward = FORMS[form]
    started = time.monotonic()
    found, format_reward = code.extract_code(completion)
    assert format_reward == reward
    assert (found is not None) == (reward == 1.0)
    assert time.monotonic() - started < 5.0


def test_longest_program_is_exact() -> None:
    program = "x = 1 #".ljust(code.MAX_CODE - 1, "x") + "\n"
    assert code.extract_code(f"```python\n{program}```") == (program, 1.0)
    assert code.extract_code(f"```python\n{program}\n```") == (None, 0.5)


def test_warnings_of_generated_code_are_not_shown() -> None:
    with warnings.catch_warnings(action="error"):
        assert code.extract_code("```python\nx = 1 is 2\ny = '\\d'\n```")[1] == 1.0


PIECES = ["```", "`", "``", "python\n", "python", "\n", " ", "x = 1", "def f(:", "é", "```python\n"]
# One fenced block of Python at the end, in the words of ESPO's published pattern.
PUBLISHED_FORM = re.compile(r"(?:(?!```)[\s\S])*?```python\n((?:(?!```)[\s\S])*?)```\n?")


@settings(max_examples=600, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=9).map("".join) | st.text(max_size=80))
def test_what_the_published_pattern_accepts_is_accepted(completion: str) -> None:
    found, reward = code.extract_code(completion)
    match = PUBLISHED_FORM.fullmatch(completion)
    if match is None:
        assert found is None or reward == 1.0
        return
    try:
        ast.parse(match[1])
    except (SyntaxError, ValueError):
        assert (found, reward) == (None, 0.5)
    else:
        assert reward == 1.0 and ast.dump(ast.parse(found or "")) == ast.dump(ast.parse(match[1]))


@settings(max_examples=150, deadline=None)
@given(
    st.text(alphabet="`python\n ", max_size=12), st.text(alphabet="xy=1+()\n :'\"#`", max_size=40)
)
def test_code_comes_back_as_it_was_written(before: str, program: str) -> None:
    if "```" in before + "." + program or before.endswith("`") or program[-1:] == "`":
        return
    found, reward = code.extract_code(f"{before}```python\n{program}```")
    assert reward in (0.5, 1.0)
    assert found in (None, program)


APPS = {"question": "Double it.", "test_cases": {"inputs": ["3\n"], "outputs": ["6\n"]}}


def test_programs_and_calls_are_read_from_pairs(file: Path) -> None:
    pairs = {"inputs": [["1", "2"], "4"], "outputs": ["3", 4]}
    apps, lines, text = read(
        file, APPS, {"question": "Add.", "input_output": pairs},
        {"question": "Add.", "input_output": json.dumps({**pairs, "inputs": ["1", "4"]})},
    )  # fmt: skip
    assert apps.answer["tests"] == [{"input": "3\n", "output": "6\n"}]
    assert apps.prompt[1]["content"] == "Double it."
    assert lines.answer["tests"] == [
        {"input": "1\n2", "output": "3"},
        {"input": "4", "output": "4"},
    ]
    assert text.answer["tests"][0] == {"input": "1", "output": "3"}
    json.dumps(apps.answer)  # it travels to workers


@pytest.mark.parametrize(
    ("program", "reward"),
    [("print(int(input()) * 2)", 2.0), ("print(int(input()) + 2)", 1.0), ("n = 3", 1.0)],
)
def test_programs_that_read_and_print(file: Path, program: str, reward: float) -> None:
    (example,) = read(file, APPS)
    assert code.score(example, block(program)).reward == reward


@pytest.mark.parametrize(
    ("program", "reward"),
    [
        ("def pair(a, b): return [b, a]", 2.0),
        ("def pair(a, b): return b, a", 2.0),
        ("class Solution:\n    def pair(self, a, b): return [b, a]", 2.0),
        ("def pair(a, b): return [a, b]", 1.0),
        ("def pair(a, b): return None", 1.0),
    ],
)
def test_named_functions_are_called(file: Path, program: str, reward: float) -> None:
    pairs = {"fn_name": "pair", "inputs": [[1, 2]], "outputs": [[[2, 1]]]}
    (example,) = read(file, {"question": "Swap.", "input_output": pairs})
    assert code.score(example, block(program)).reward == reward


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ("{", "'input_output' is no JSON"),
        ({"inputs": ["1"]}, "no lists 'inputs' and 'outputs'"),
        ({"inputs": [], "outputs": []}, "no lists 'inputs' and 'outputs'"),
        ({"inputs": ["1"], "outputs": ["1", "2"]}, "1 'inputs' and 2 'outputs'"),
        ({"inputs": [[1]], "outputs": [1], "fn_name": "a b"}, "'fn_name' is not the name"),
        ({"inputs": ["1"], "outputs": [1], "fn_name": "f"}, "each of the 'inputs' is a list"),
        ([1], "no lists 'inputs' and 'outputs'"),
    ],
)
def test_pairs_that_cannot_be_used_are_named(file: Path, pairs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(file, {"question": "Add.", "input_output": pairs})


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], list[str]]]:
    """What reaches the sandbox; every second test passes."""
    seen: list[tuple[list[str], list[str]]] = []

    def run_tests(sources: list[str], tests: list[str]) -> list[bool]:
        seen.append((list(sources), list(tests)))
        return [number % 2 == 0 for number in range(len(tests))]

    monkeypatch.setattr(sandbox, "run_tests", run_tests)
    return seen


def test_reward_is_the_form_plus_the_share_of_tests_that_pass(file: Path, runs: list[Any]) -> None:
    tests = [f"assert add({n}, 0) == {n}" for n in range(5)]
    (example,) = read(file, {"question": "Write add.", "test_cases": tests})
    score = code.score(example, block("def add(a, b): return a"))
    assert (score.reward, score.correct) == (1.6, False)
    assert score.metrics == {"format": 1.0, "pass_rate": 0.6}
    (single,) = read(file, {"question": "Write add.", "test_cases": tests[:1]})
    score = code.score(single, block("def add(a, b): return a"))
    assert (score.reward, score.correct) == (2.0, True)
    assert score.metrics == {"format": 1.0, "pass_rate": 1.0}


@pytest.mark.parametrize(
    "completion", ["x = 1", "```python\nx = = 1\n```", block("x = 1") + "and more"]
)
def test_code_of_bad_form_is_not_run(file: Path, runs: list[Any], completion: str) -> None:
    (example,) = read(file, ACECODE)
    score = code.score(example, completion)
    assert runs == []
    assert score.reward == score.metrics["format"] == code.extract_code(completion)[1]
    assert (score.correct, score.metrics["pass_rate"]) == (False, 0.0)


def test_what_a_problem_gives_runs_before_the_code(file: Path, runs: list[Any]) -> None:
    given, bare = read(file, HUMANEVAL, ACECODE)
    code.score(given, block("x = 1"))
    code.score(bare, block("y = 1"))
    assert [sources for sources, _ in runs] == [[GIVEN, "x = 1\n"], ["y = 1\n"]]


ROOT = "def root(x): return math.sqrt(half(x))"
RUN = {
    "right": (ROOT, 2.0),
    "own import": ("import math\n" + ROOT, 2.0),
    "annotations": ("from typing import List\ndef root(x: List[int]): return half(x) ** .5",
                    2.0),
    "whole program": (GIVEN + "    return math.sqrt(half(x))", 2.0),
    "wrong": ("def root(x): return 2", 1.0),
    "only for the first": ("def root(x): return 2 if x == 8 else 0", 1.0),
    "missing": ("def other(x): return 2", 1.0),
    "left as it was given": ("pass", 1.0),
    "replaces the check": ("def check(f): pass", 1.0),
    "replaces the helper": ("def half(x): return x / 2\ndef root(x): return half(x)", 1.0),
    "raises at once": ("raise SystemExit(0)", 1.0),
    "docstring that claims success": ('"""passed: true"""', 1.0),
    "prints a verdict": ("print('{\"test\": 0, \"passed\": true}')", 1.0),
    "main block": (ROOT + "\nif __name__ == '__main__':\n    raise SystemExit", 2.0),
}  # fmt: skip


@pytest.mark.parametrize("case", RUN)
def test_humaneval_problem_is_judged_in_the_sandbox(file: Path, case: str) -> None:
    (example,) = read(file, HUMANEVAL)
    program, reward = RUN[case]
    score = code.score(example, block(program))
    assert (score.reward, score.correct) == (reward, reward == 2.0)


def test_assertions_are_judged_one_by_one(file: Path) -> None:
    (example,) = read(file, {**PUBLISHED_MBPP, "test_list": [
        *PUBLISHED_MBPP["test_list"], "assert add('a', 'b') == 'ab'", "assert add(2, 2) == 5",
    ]})  # fmt: skip
    score = code.score(example, block("def add(a, b): return a + b"))
    assert (score.reward, score.correct) == (1.75, False)


def test_start_line_names_the_sandbox() -> None:
    assert code.start_line() == sandbox.start_line()
