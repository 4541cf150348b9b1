r"""Grade-school mathematics (GSM8K): the final number must equal the reference.

File format: {"question": "...", "answer": "72"}; the published answer, a worked solution that ends
with "#### 72", is taken as well.
"""

from collections.abc import Mapping
from os import PathLike
from typing import Any

from megatron_espo.tasks.answers import boxed_answer, final_answer, parse_number
from megatron_espo.tasks.base import Example, Score, read_records
from megatron_espo.tasks.math import INSTRUCTION, equivalent

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
    if parse_number(answer) is None:
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
    reference, answer = example.answer["answer"], final_answer(completion)
    correct = False
    if answer is not None:
        value = parse_number(answer)
        if value is not None:
            correct = value == parse_number(reference)
        else:
            correct = equivalent(reference.replace(",", ""), answer)
    boxed = boxed_answer(completion) is not None
    return Score(reward=float(correct), correct=correct, metrics={"boxed": float(boxed)})
