"""Check that the answers in data files earn full reward, or that cases are judged as expected.

For every file of a folder whose format a built-in task knows, the reference answer of each problem
is written as a completion and scored. A countdown problem without a solution is solved by search.
Code has no answers of its own: --solutions DIR gives them, DIR/humaneval.py those to the problems
of humaneval.jsonl. A function there solves the problem whose tests call it; imports and names with
an underscore go with every function. Problems without an answer are read and counted only.

--cases FILE takes completions with a verdict instead, {"task": NAME, "record": {...}, "completion":
"...", "expect": true for full reward}, and lists those that are judged otherwise. The task is a
built-in one, FILE.py or an import path; its record is read as a data file's.
"""

import ast
import json
import tempfile
from collections.abc import Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

from megatron_espo.command_line import Parser, run_tool
from megatron_espo.data.jsonl import read_jsonl
from megatron_espo.errors import UserError
from megatron_espo.tasks import BUILT_IN, Example, Score, Task, code, load_task
from megatron_espo.tasks.base import read_examples, read_parquet, start_line

# The task of a record is the first whose reader accepts it.
_ORDER = ("sudoku", "countdown", "gsm8k", "math", "code")
_MOST_NUMBERS = 5  # of a countdown problem that is searched: 6 take minutes


def main(argv: Sequence[str]) -> int:
    """Run the tool.

    Args:
        argv: Command line without the program's name.

    Returns:
        Exit code: 0, or 1 if an answer does not earn full reward.

    Raises:
        UserError: The input is bad.
    """
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", type=Path, metavar="DIR", help="the files")
    what.add_argument("--cases", type=Path, metavar="FILE", help="JSONL of judged completions")
    parser.add_argument("--solutions", type=Path, metavar="DIR", help="solutions to code problems")
    args = parser.parse_args(argv)
    if args.cases:
        if args.solutions:
            raise UserError("--solutions goes with --data; leave it out")
        return _check_cases(args.cases)
    files = sorted(p for p in args.data.glob("*") if p.suffix in (".jsonl", ".parquet"))
    if not files:
        raise UserError(f"--data {args.data}: holds no .jsonl or .parquet file; correct it")
    solutions = _read_solutions(args.solutions, files) if args.solutions else {}
    if solutions:
        print(start_line(code))
    return max([_check_file(path, solutions.get(path.stem, {})) for path in files])


def _check_cases(path: Path) -> int:
    """Judge the completions of a file of cases; prints the wrong verdicts and the counts."""
    counts: dict[str, list[int]] = {}
    for number, case in read_jsonl(path):
        name, completion, expected = (case.get(key) for key in ("task", "completion", "expect"))
        if not (
            isinstance(name, str) and isinstance(completion, str) and expected in (True, False)
        ):
            raise UserError(f"{path}:{number}: lacks 'task', 'completion' or 'expect'; add them")
        found = _judge_case(load_task(name, flag=f"{path}:{number}: task"), case)
        right = isinstance(found, Score) and found.correct is expected
        counts.setdefault(name, []).append(right)
        if not right:
            verdict = f"pays {found.reward:g}" if isinstance(found, Score) else f"refuses {found}"
            wanted = "full" if expected else "less than full"
            print(
                f"{path.name}:{number}: {name} {verdict}, but {wanted} reward is expected for "
                f"{completion[:120]!a}",
                flush=True,
            )
    for name, verdicts in counts.items():
        print(f"{name}: {sum(verdicts)} of {len(verdicts)} cases as expected")
    return 0 if all(map(all, counts.values())) else 1


def _judge_case(task: Task, case: Mapping[str, Any]) -> Score | str:
    """Read a case's record as a file with one line would be, and score its completion.

    Returns:
        The score, or why the record is refused.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "case.jsonl"
        file.write_text(json.dumps(case.get("record")) + "\n")
        try:
            (example,) = read_examples(task, file)
        except UserError as error:
            return f"the record ({str(error).removeprefix(f'{file}:1: ')})"
    return task.score(example, case["completion"])


def _read_solutions(folder: Path, files: Sequence[Path]) -> dict[str, dict[str, list[str]]]:
    """Read the solutions of each data file's problems: function's name, programs."""
    found = {}
    for stem in {path.stem for path in files}:
        path = folder / f"{stem}.py"
        if path.is_file():
            found[stem] = _programs(path)
    if not found:
        raise UserError(f"--solutions {folder}: holds no NAME.py for a NAME.jsonl; correct it")
    return found


def _programs(path: Path) -> dict[str, list[str]]:
    try:
        source = path.read_text("utf-8")
        parts = ast.parse(source).body
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as Python ({error}); correct it") from error
    text = {part: ast.get_source_segment(source, part) or "" for part in parts}
    solving = [p for p in parts if isinstance(p, ast.FunctionDef) and not p.name.startswith("_")]
    common = [text[part] for part in parts if part not in solving]
    found: dict[str, list[str]] = {}
    for part in solving:  # several problems may ask for functions of one name
        found.setdefault(part.name, []).append("\n\n".join([*common, text[part]]))
    return found


def _check_file(path: Path, solutions: Mapping[str, Sequence[str]]) -> int:
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
        answers = _references(name, example, record, solutions)
        if answers:
            right = any(BUILT_IN[name].score(example, answer).correct for answer in answers)
            tried += 1
            full += right
            if not right:
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


def _references(
    name: str, example: Example, record: Mapping[str, Any], solutions: Mapping[str, Sequence[str]]
) -> list[str]:
    """Write the reference answer as a completion; more than one where any of them will do."""
    if name == "code":
        test = example.answer["tests"][0]
        called = _called(test) if isinstance(test, str) else set()
        found = next((solutions[f] for f in solutions if f in called), [])
        return [f"```python\n{solution}\n```\n" for solution in found]
    if name in ("gsm8k", "math"):
        # The command keeps it from being found equal letter by letter.
        return [f"So it is \\boxed{{\\displaystyle {example.answer['answer']}}}."]
    answer = record.get("solution")
    if answer is None and name == "countdown":
        answer = _solve(example.answer["numbers"], example.answer["target"])
    if answer is None:
        return []
    bare = example.answer.get("style") == "bare"
    return [str(answer) if bare else f"<answer>\n{answer}\n</answer>"]


def _called(test: str) -> set[str]:
    """Return the names that a test calls or hands over."""
    try:
        return {node.id for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Name)}
    except SyntaxError:
        return set()


def _solve(numbers: Sequence[int], target: int) -> str | None:
    """Search for an expression with the target as its value, in floats: the reward is exact."""
    if len(numbers) > _MOST_NUMBERS:
        return None
    return _combine([(float(number), str(number)) for number in numbers], target)


def _combine(parts: Sequence[tuple[float, str]], target: int) -> str | None:
    """Replace any two parts by what an operator makes of them, until one is left."""
    if len(parts) == 1:
        return parts[0][1] if abs(parts[0][0] - target) < 1e-6 else None
    for i, j in permutations(range(len(parts)), 2):
        (a, left), (b, right) = parts[i], parts[j]
        rest = [part for k, part in enumerate(parts) if k not in (i, j)]
        made = {"-": a - b, "/": a / b if b else None}
        if i < j:
            made |= {"+": a + b, "*": a * b}
        for operator, value in made.items():
            if value is not None and (
                found := _combine([*rest, (value, f"({left}{operator}{right})")], target)
            ):
                return found
    return None


if __name__ == "__main__":
    run_tool(main)
