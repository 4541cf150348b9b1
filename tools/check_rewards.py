"""Check that the answers in data files earn full reward, file by file.

For every file of a folder whose format a built-in task knows, the reference answer of each problem
is written as a completion and scored. Problems without an answer (countdown without a solution,
code) are read and counted only; for code, --solutions FILE gives solutions by problem number:
JSONL of {"file": "humaneval.jsonl", "line": 1, "code": "..."}.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_espo.data.jsonl import read_jsonl
from megatron_espo.tasks import BUILT_IN, Example, code
from megatron_espo.tasks.base import read_parquet, start_line

# The task of a record is the first whose reader accepts it.
_ORDER = ("sudoku", "countdown", "gsm8k", "math", "code")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool.

    Args:
        argv: Command line without the program's name; by default the process's own.

    Returns:
        Exit code: 0, 1 if an answer does not earn full reward, 2 for bad input.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="the files")
    parser.add_argument("--solutions", type=Path, metavar="FILE", help="solutions to code problems")
    args = parser.parse_args(argv)
    try:
        files = sorted(p for p in args.data.glob("*") if p.suffix in (".jsonl", ".parquet"))
        if not files:
            raise ValueError(f"--data {args.data}: holds no .jsonl or .parquet file; correct it")
        solutions = _read_solutions(args.solutions) if args.solutions else {}
        if solutions:
            print(start_line(code))
        return max([_check_file(path, solutions.get(path.name, {})) for path in files])
    except ValueError as error:
        print(f"check_rewards.py: {error}", file=sys.stderr)
        return 2


def _read_solutions(path: Path) -> dict[str, dict[int, str]]:
    found: dict[str, dict[int, str]] = defaultdict(dict)
    for number, record in read_jsonl(path):
        try:
            found[record["file"]][record["line"]] = record["code"]
        except KeyError as error:
            raise ValueError(f"{path}:{number}: key {error} is missing; add it") from error
    return found


def _check_file(path: Path, solutions: Mapping[int, str]) -> int:
    """Check one file; prints its counts and what fails, and returns the exit code."""
    if path.suffix == ".parquet":
        records = list(enumerate(read_parquet(path), start=1))
    else:
        records = list(read_jsonl(path))
    full, tried, wrong, unusable, name = 0, 0, [], [], ""
    for number, record in records:
        found = _read(record)
        if found is None:
            unusable.append(number)
            continue
        name, example = found
        answer = _reference(name, example, record, solutions.get(number))
        if answer is not None:
            score = BUILT_IN[name].score(example, answer)
            tried += 1
            full += score.correct
            if not score.correct:
                wrong.append(number)
    line = f"{path.name}: {len(records)} records of {name or 'no known task'}"
    line += f", {full} of {tried} answers earn full reward" if tried else ", without answers"
    for label, numbers in (("unusable", unusable), ("not full", wrong)):
        if numbers:
            line += f"; {label}: {len(numbers)} (lines {', '.join(map(str, numbers[:10]))})"
    print(line, flush=True)
    return 1 if wrong else 0


def _read(record: Mapping[str, Any]) -> tuple[str, Example] | None:
    for name in _ORDER:
        try:
            return name, BUILT_IN[name]._parse(record)  # type: ignore[attr-defined]
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return None


def _reference(
    name: str, example: Example, record: Mapping[str, Any], solution: str | None
) -> str | None:
    """Write the reference answer as a completion, or None where the file has none."""
    if name == "code":
        return None if solution is None else f"```python\n{solution}\n```\n"
    if name in ("gsm8k", "math"):
        return f"So it is \\boxed{{{example.answer['answer']}}}."
    answer = record.get("solution")
    if answer is None:
        return None
    bare = example.answer.get("style") == "bare"
    return str(answer) if bare else f"<answer>\n{answer}\n</answer>"


if __name__ == "__main__":
    sys.exit(main())
