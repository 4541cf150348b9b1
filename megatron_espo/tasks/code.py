"""Python programming with unit tests (AceCode, HumanEval, MBPP): format and pass rate.

File formats, told apart by their keys:

* AceCode: {"question", "test_cases": [assertions]};
* APPS: {"question", "input_output": {"inputs": [...], "outputs": [...]}}, the latter also as JSON
  or under the name "test_cases": programs that read a text and print one, or, with "fn_name", calls
  of a function;
* MBPP: {"prompt", "tests": [assertions]}, or the published {"text", "test_list"};
* HumanEval: {"prompt", "tests": "def check(candidate): ..."}, or the published {"prompt", "test",
  "entry_point"}. The function is the last one that the prompt defines; what the prompt defines
  comes before the generated code, as helper functions and imports do.

The completion must end with one fenced block of Python, which is run in the sandbox.
"""

import ast
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
from os import PathLike
from typing import Any

from megatron_espo.sandbox import run as sandbox
from megatron_espo.sandbox.warm import close_jails
from megatron_espo.tasks.base import Example, Score, read_records

name = "code"

SYSTEM = (
    "You are a careful Python programmer. End your response with exactly one code block, fenced by "
    "```python and ```, that holds the whole program; write nothing after it."
)
MAX_CODE = 20_000
_FENCE = "```"
_LANGUAGES = ("", "python", "py", "python3")
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
    tests = _first(record, "input_output", "test_cases", "test_list", "tests", "test")
    if not isinstance(text, str) or not text.strip():
        raise ValueError("none of 'question', 'prompt', 'text' is a text; give the problem")
    if isinstance(tests, Mapping) or (record.get("input_output") is not None):
        return Example(_prompt(text), {"tests": _from_pairs(tests), "given": ""})
    if isinstance(tests, str):
        return _from_check(text, tests, record.get("entry_point"))
    if not isinstance(tests, list) or not tests or not all(isinstance(t, str) for t in tests):
        raise ValueError(
            "none of 'test_cases', 'test_list', 'tests' is a list of assertions; give the tests"
        )
    setup = record.get("test_setup_code") or ""
    content = text if tests[0].strip() in text else f"{text}\nTest cases: {tests[0]}"
    return Example(_prompt(content), {"tests": [f"{setup}\n{t}" for t in tests], "given": ""})


def _from_pairs(pairs: Any) -> list[str | dict[str, str]]:
    """Read inputs and outputs: of a program, or of a function that is named."""
    if isinstance(pairs, str):
        try:
            pairs = json.loads(pairs)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"'input_output' is no JSON ({error}); correct it") from error
    inputs, outputs = (pairs.get(key) if isinstance(pairs, Mapping) else None
                       for key in ("inputs", "outputs"))  # fmt: skip
    if not isinstance(inputs, list) or not isinstance(outputs, list) or not inputs:
        raise ValueError("the tests have no lists 'inputs' and 'outputs'; give both")
    if len(inputs) != len(outputs):
        raise ValueError(
            f"there are {len(inputs)} 'inputs' and {len(outputs)} 'outputs'; give as many of both"
        )
    function = pairs.get("fn_name")
    if function is None:
        return [{"input": _text(a), "output": _text(b)}
                for a, b in zip(inputs, outputs, strict=True)]  # fmt: skip
    if not isinstance(function, str) or not function.isidentifier():
        raise ValueError("'fn_name' is not the name of a function; correct it")
    if not all(isinstance(values, list) for values in inputs):
        raise ValueError("with 'fn_name' each of the 'inputs' is a list of arguments; correct it")
    return [_call(function, a, b) for a, b in zip(inputs, outputs, strict=True)]


def _text(value: Any) -> str:
    """Return a program's input or output, which some files hold as a list of lines."""
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _call(function: str, arguments: list[Any], output: Any) -> str:
    """Write the call of a function as a test; LeetCode's methods of a Solution are functions, too.

    JSON has no tuples, and published files put some outputs into a list of one.
    """
    found = f"(Solution().{function} if 'Solution' in globals() else {function})"
    test = f"__found = {found}(*{arguments!r})\n"
    plain = "list(__found) if type(__found) is tuple else __found"
    return f"{test}assert ({plain}) in ({output!r}, {_unwrapped(output)!r})"


def _unwrapped(output: Any) -> Any:
    return output[0] if isinstance(output, list) and len(output) == 1 else output


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
        passed = _passed(example, code)
    rate = _pass_rate(passed)
    return Score(
        reward=form + rate,
        correct=bool(passed) and all(passed),
        metrics={"format": form, "pass_rate": rate},
    )


def segments(example: Example, completion: str) -> list[tuple[int, int]]:
    """Return the program's statements at the top level: functions, classes, imports.

    What stands inside of a function has no worth of its own, since a run of its statements is
    hardly ever a program; a test that passes says of no token that it is the reason. Comments
    belong to the statement after them, and statements that share a line are one part.

    Args:
        example: A problem, from `read`.
        completion: Any text.

    Returns:
        Spans that make up the whole program; none where it is not well-formed, or where its lines
        end as Windows' do.
    """
    code, _ = extract_code(completion)
    if code is None or "\r" in completion:
        return []
    body = _parsed(code).body
    lines = code.split("\n")
    ends = [a.end_lineno for a, b in pairwise(body) if b.lineno > (a.end_lineno or 0)]
    stop = len(completion.rstrip()) - len(_FENCE)
    start = stop - len(code)
    cuts = [start + sum(len(line) + 1 for line in lines[:end]) for end in ends]
    return list(pairwise([start, *cuts, stop])) if body else []


def score_segments(example: Example, completion: str, kept: Sequence[Sequence[int]]) -> list[float]:
    """Run programs made of some statements of a completion's program.

    Args:
        example: A problem, from `read`.
        completion: Any text.
        kept: Numbers of `segments`, for each program.

    Returns:
        Their pass rates. The format is that of the whole completion and is not among them.
    """
    spans = segments(example, completion)
    rates = []
    for parts in kept:
        code = "".join(completion[slice(*spans[part])] for part in parts)
        rates.append(_pass_rate(_passed(example, code)))
    return rates


def _passed(example: Example, code: str) -> list[bool]:
    given = [example.answer["given"]] if example.answer["given"] else []
    return sandbox.run_tests([*given, code], example.answer["tests"])


def _pass_rate(passed: Sequence[bool]) -> float:
    return sum(passed) / len(passed) if passed else 0.0


def extract_code(completion: str) -> tuple[str | None, float]:
    """Find the code of a completion.

    Published (ESPO): the text ends with its only block, opened by ```` ```python ````. Accepted as
    well: "py", "python3", capitals or no language, space after it, Windows' line ends, empty space
    at the end, and fences in a text of the program's own (a docstring).

    Args:
        completion: Any text.

    Returns:
        The code, or None, and the reward of its format.
    """
    text = completion.replace("\r\n", "\n").rstrip()
    start = text.find(_FENCE)
    if start < 0 or not text.endswith(_FENCE) or len(text) < start + 2 * len(_FENCE):
        return None, 0.0
    head, line_end, code = text[start + len(_FENCE) : -len(_FENCE)].partition("\n")
    if not line_end or head.strip().lower() not in _LANGUAGES:
        return None, 0.0
    form = 1.0 if _is_python(code) else 0.0 if _FENCE in code else 0.5
    return (code, 1.0) if form == 1.0 else (None, form)


def _is_python(code: str) -> bool:
    if len(code) > MAX_CODE:
        return False
    try:
        _parsed(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _parsed(code: str) -> ast.Module:
    with warnings.catch_warnings(action="ignore"):
        return ast.parse(code)


def start_line() -> str:
    """Say which sandbox is in force.

    Raises:
        UserError: generated code cannot be contained here, and that was not accepted.
    """
    line = sandbox.start_line()
    close_jails()  # a worker has its own
    return line
