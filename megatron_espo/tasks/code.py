"""Python programming with unit tests (AceCode, HumanEval, MBPP): format and pass rate.

File formats, told apart by their keys:

* AceCode: {"question", "test_cases": [assertions]};
* MBPP: {"prompt", "tests": [assertions]}, or the published {"text", "test_list"};
* HumanEval: {"prompt", "tests": "def check(candidate): ..."}, or the published {"prompt", "test",
  "entry_point"}. The function is the last one that the prompt defines; what the prompt defines
  comes before the generated code, as helper functions and imports do.

The completion must end with one fenced block of Python, which is run in the sandbox.
"""

import ast
import re
import warnings
from collections.abc import Mapping
from os import PathLike
from typing import Any

from megatron_espo.sandbox import run as sandbox
from megatron_espo.tasks.base import Example, Score, read_records

name = "code"

SYSTEM = (
    "You are a careful Python programmer. End your response with exactly one code block, fenced by "
    "```python and ```, that holds the whole program; write nothing after it."
)
MAX_CODE = 20_000
_FENCE = "```"
_LEAD = re.compile(r"\A\s*Complete the following python code:\s*\n", re.IGNORECASE)


def read(path: str | PathLike[str]) -> list[Example]:
    """Read problems.

    Args:
        path: JSONL or parquet file in one of the module's formats.

    Returns:
        One example per record.

    Raises:
        ValueError: A record is malformed.
    """
    return read_records(path, {}, _parse)


def _parse(record: Mapping[str, Any]) -> Example:
    text = _first(record, "question", "prompt", "text")
    tests = _first(record, "test_cases", "test_list", "tests", "test")
    if not isinstance(text, str) or not text.strip():
        raise ValueError("none of 'question', 'prompt', 'text' is a text; give the problem")
    if isinstance(tests, str):
        return _from_check(text, tests, record.get("entry_point"))
    if not isinstance(tests, list) or not tests or not all(isinstance(t, str) for t in tests):
        raise ValueError(
            "none of 'test_cases', 'test_list', 'tests' is a list of assertions; give the tests"
        )
    setup = record.get("test_setup_code") or ""
    content = text if tests[0].strip() in text else f"{text}\nTest cases: {tests[0]}"
    return Example(_prompt(content), {"tests": [f"{setup}\n{t}" for t in tests], "given": ""})


def _from_check(text: str, tests: str, entry: Any) -> Example:
    """Read a HumanEval problem: code to complete, and a function that checks it."""
    given = _LEAD.sub("", text)
    try:
        program = ast.parse(given)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"'prompt' is no Python to complete ({error}); correct it") from error
    names = [node.name for node in program.body if isinstance(node, ast.FunctionDef)]
    entry = entry or (names[-1] if names else None)
    if not isinstance(entry, str) or not entry.isidentifier():
        raise ValueError("'prompt' defines no function; give the 'entry_point'")
    content = f"Complete the following function.\n\n{_FENCE}python\n{given.strip()}\n{_FENCE}"
    return Example(_prompt(content), {"tests": [f"{tests}\ncheck({entry})"], "given": given})


def _first(record: Mapping[str, Any], *keys: str) -> Any:
    return next((record[key] for key in keys if record.get(key) is not None), None)


def _prompt(content: str) -> tuple[Mapping[str, str], ...]:
    return ({"role": "system", "content": SYSTEM}, {"role": "user", "content": content})


def score(example: Example, completion: str) -> Score:
    """Reward format plus pass rate, 0 to 2 in all (ESPO, arXiv 2512.03759).

    Format: 1 for a completion that ends with its only code block and whose code is Python, 0.5 if
    it is not Python, else 0. Only well-formed code is run; the pass rate is the share of the tests
    that pass.

    Args:
        example: A problem, from `read`.
        completion: Any text.

    Returns:
        The score, with the metrics "format" and "pass_rate"; correct if all tests pass.
    """
    code, form = extract_code(completion)
    passed: list[bool] = []
    if code is not None and form == 1.0:
        given = [example.answer["given"]] if example.answer["given"] else []
        passed = sandbox.run_tests([*given, code], example.answer["tests"])
    rate = sum(passed) / len(passed) if passed else 0.0
    return Score(
        reward=form + rate,
        correct=bool(passed) and all(passed),
        metrics={"format": form, "pass_rate": rate},
    )


def extract_code(completion: str) -> tuple[str | None, float]:
    """Find the code of a completion.

    Args:
        completion: Any text.

    Returns:
        The code, or None, and the reward of its format.
    """
    parts = completion.removesuffix("\n").split(_FENCE)
    if len(parts) != 3 or parts[2] or not parts[1].startswith("python\n"):
        return None, 0.0
    code = parts[1].removeprefix("python\n")
    if len(code) > MAX_CODE:
        return None, 0.5
    try:
        with warnings.catch_warnings(action="ignore"):
            ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None, 0.5
    return code, 1.0


def start_line() -> str:
    """Say which sandbox is in force."""
    return sandbox.start_line()
