r"""Grade-school mathematics (GSM8K): the final number must equal the reference.

File format: {"question": "...", "answer": "72"}; the published answer, a worked solution that ends
with "#### 72", is taken as well.
"""

from collections.abc import Mapping
from fractions import Fraction
from os import PathLike
from typing import Any

from megatron_espo.tasks.answers import Statement, boxed_answer, final_statement
from megatron_espo.tasks.base import Example, Score, read_records
from megatron_espo.tasks.equality import equivalent
from megatron_espo.tasks.math import INSTRUCTION
from megatron_espo.tasks.numbers import is_arithmetic, read_number, stated_number

name = "gsm8k"


def read(path: str | PathLike[str]) -> list[Example]:
    """Read problems.

    Args:
        path: JSONL or parquet file with "question" and "answer" in every record.

    Returns:
        One example per record.

    Raises:
        ValueError: A record is malformed or its answer is no number.
    """
    return read_records(path, {"question": str, "answer": str}, _parse)


def _parse(record: Mapping[str, Any]) -> Example:
    answer = record["answer"].rpartition("####")[2].strip()
    if read_number(answer) is None:
        raise ValueError(f"'answer' {answer[:40]!r} is no number; end it with \"#### NUMBER\"")
    prompt = ({"role": "user", "content": f"{record['question']}\n{INSTRUCTION}"},)
    return Example(prompt=prompt, answer={"answer": answer})


def score(example: Example, completion: str) -> Score:
    r"""Reward 1 if the final answer equals the reference, else 0 (ESPO, arXiv 2512.03759).

    Unlike the published parser, it reads thousands separators, units and LaTeX.

    Args:
        example: A problem, from `read`.
        completion: Any text; its last \boxed{} counts, then answer tags, "####", the last number.

    Returns:
        The score, with the metric "boxed": whether there is a closed \boxed{}.
    """
    statement, correct = final_statement(completion), False
    if statement is not None:
        correct = _is_right(example.answer["answer"], statement)
    boxed = boxed_answer(completion) is not None
    return Score(reward=float(correct), correct=correct, metrics={"boxed": float(boxed)})


def _is_right(reference: str, statement: Statement) -> bool:
    value, sides = stated_number(statement)
    if value is not None:
        right = value == read_number(reference)
        claim = right and len(sides) == 2 and is_arithmetic(sides[0])
        return right and (not claim or _holds(sides[0], value))
    if not sides or not all(is_arithmetic(side) for side in sides[-2:]):
        return False
    if len(sides) == 2 and not equivalent(sides[0], sides[1]):
        return False
    return equivalent(str(read_number(reference)), sides[-1])


def _holds(side: str, value: Fraction) -> bool:
    """Return whether one side of an equation has the value of the other: 5 + 3 = 9 gives no 9."""
    found = read_number(side)
    return found is not None or equivalent(str(value), side)
