r"""Competition mathematics (MATH): the answer in \boxed{} must equal the reference.

File format: {"problem": "...", "answer": "\\frac{1}{2}"}, or the published {"problem", "solution"}
whose solution ends with a \boxed{} answer. Judged by math-verify, which reads LaTeX.
"""

import re
from collections.abc import Mapping
from os import PathLike
from typing import Any

from megatron_espo.tasks.answers import Statement, boxed_answer, final_statement, without_reason
from megatron_espo.tasks.base import Example, Score, read_records
from megatron_espo.tasks.equality import equivalent
from megatron_espo.tasks.latex import formulas, inside
from megatron_espo.tasks.units import read_unit

name = "math"

INSTRUCTION = "Reason step by step, and write your final answer inside \\boxed{}."
_JOINED = re.compile(r"\s*(?:,|,?\s*(?:and|or))\s*")
_NUMBER = re.compile(
    r"(?<![\w.\\])[-+]?\s?\\?\$?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)(?:\s*[-+*/^]\s*\(?[0-9.]+\)?)*%?"
)


def read(path: str | PathLike[str]) -> list[Example]:
    """Read problems.

    Args:
        path: JSONL or parquet file with "problem", and "answer" or "solution", in every record.

    Returns:
        One example per record.

    Raises:
        ValueError: A record is malformed or its solution has no boxed answer.
    """
    return read_records(path, {"problem": str}, _parse)


def _parse(record: Mapping[str, Any]) -> Example:
    answer = record.get("answer")
    if answer is None and isinstance(record.get("solution"), str):
        answer = boxed_answer(record["solution"])
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError(
            "'answer' is no text and 'solution' has no \\boxed{} answer; give one or leave the "
            "problem out"
        )
    prompt = ({"role": "user", "content": f"{record['problem']}\n{INSTRUCTION}"},)
    return Example(prompt=prompt, answer={"answer": answer})


def score(example: Example, completion: str) -> Score:
    r"""Reward 1 if the final answer equals the reference, else 0 (ESPO, arXiv 2512.03759).

    Args:
        example: A problem, from `read`.
        completion: Any text; its last \boxed{} counts, then answer tags, then what it says the
            answer is, then the formula or number it ends with.

    Returns:
        The score, with the metric "boxed": whether there is a closed \boxed{}.
    """
    statement, correct = final_statement(completion), False
    if statement is not None:
        correct = equivalent(example.answer["answer"], stated_formula(statement))
    boxed = boxed_answer(completion) is not None
    return Score(reward=float(correct), correct=correct, metrics={"boxed": float(boxed)})


def stated_formula(statement: Statement) -> str:
    """Return the formula, number or words that a completion's final statement gives.

    Args:
        statement: from `final_statement`.

    Returns:
        LaTeX without the signs around it; empty where there is none.
    """
    text, runs = statement.text, _runs(statement.text)
    if statement.place == "end":
        after = runs[-1][1] if runs else 0
        numbers = list(_NUMBER.finditer(text, after))
        if numbers:
            return numbers[-1].group().strip()
        return runs[-1][2] if runs else ""
    if statement.place == "said":
        return runs[0][2] if runs else without_reason(text).strip(" ,;:*_`\"'")
    outside = "".join(text[a:b] for a, b in _gaps(runs, len(text)))
    return runs[-1][2] if runs and not re.search("[0-9]", outside) else text


def _runs(text: str) -> list[tuple[int, int, str]]:
    """Find the formulas of a text, those joined by a comma, "and" or "or" as one.

    Returns:
        Start, end and LaTeX of each, with the unit of measure that follows.
    """
    runs: list[tuple[int, int, str]] = []
    for formula in formulas(text):
        start, end, latex = formula.start(), formula.end(), inside(formula)
        unit = re.match(r"\s*([A-Za-z]+)", text[end:])
        if unit and read_unit(unit[1]):
            latex += f" \\text{{ {unit[1]}}}"
        between = text[runs[-1][1] : start] if runs else ""
        if _JOINED.fullmatch(between):
            start, _, before = runs.pop()
            latex = f"{before} \\text{{ or }} {latex}" if "or" in between else f"{before}, {latex}"
        runs.append((start, end, latex))
    return runs


def _gaps(runs: list[tuple[int, int, str]], length: int) -> list[tuple[int, int]]:
    starts, ends = [run[0] for run in runs], [run[1] for run in runs]
    return list(zip([0, *ends], [*starts, length], strict=True))
