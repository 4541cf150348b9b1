r"""Competition mathematics (MATH): the answer in \boxed{} must equal the reference.

File format: {"problem": "...", "answer": "\\frac{1}{2}"}, or the published {"problem", "solution"}
whose solution ends with a \boxed{} answer. Judged by math-verify, which reads LaTeX.
"""

import logging
import re
import threading
from collections.abc import Mapping
from functools import cache
from os import PathLike
from typing import Any

from megatron_espo.errors import UserError
from megatron_espo.tasks.answers import boxed_answer, final_answer
from megatron_espo.tasks.base import Example, Score, read_records

name = "math"

INSTRUCTION = "Reason step by step, and write your final answer inside \\boxed{}."
_SECONDS = 5
# What would take sympy for ever or all memory: large exponents, factorials and numbers as such ...
_LARGE = re.compile(
    r"(?:\^|\*\*)\s*[\{(]?\s*[-+]?\s*[0-9]{5,}"
    r"|[0-9]{4,}\s*[)\}]*\s*!|!\s*[)\}]*\s*!|[0-9]{200}"
)
# ... and a power of a number in an exponent. (x-1)^3(x+1)^3 and e^{-x^2} are no such towers.
_CHAIN = re.compile(
    r"(?:\^|\*\*)\s*(?:[-+]?\s*[0-9.]+|\{\s*[-+]?[0-9.]+\s*\})\s*(?:\^|\*\*)"
    r"|(?:\^|\*\*)\s*\\(?!circ)[A-Za-z]+.*[0-9]\s*[)\}]*\s*(?:\^|\*\*|!)"
)
_EXPONENT = re.compile(r"(?:\^|\*\*)\s*[\{(]")
_NUMBER_POWER = re.compile(r"[0-9]\s*[)\}]*\s*(?:\^|\*\*|!)")
# Powers of powers multiply their exponents.
_POWER = re.compile(r"([)\}\]]?)\s*(?:\^|\*\*)\s*[\{(]*\s*[-+]?\s*([0-9]+)")
_MOST_POWER = 10_000
_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]{0,17})")


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
        completion: Any text; its last \boxed{} counts, then answer tags, then the last number.

    Returns:
        The score, with the metric "boxed": whether there is a closed \boxed{}.
    """
    answer = final_answer(completion)
    correct = answer is not None and equivalent(example.answer["answer"], answer)
    boxed = boxed_answer(completion) is not None
    return Score(reward=float(correct), correct=correct, metrics={"boxed": float(boxed)})


def equivalent(reference: str, answer: str) -> bool:
    """Return whether two answers are equal as mathematics.

    Args:
        reference: the right answer, trusted.
        answer: any short text. A full stop at its end is not part of it. Digits that are not
            ASCII, and powers or factorials too large to work out (unless the reference is spelt
            the same), are not equal to anything.
    """
    reference, answer = reference.strip(), answer.strip().removesuffix(".").rstrip()
    if reference == answer:
        return True
    if _INTEGER.fullmatch(reference) and _INTEGER.fullmatch(answer):
        return int(reference) == int(answer)
    if any(character.isnumeric() and not character.isascii() for character in answer):
        return False
    if _is_costly(answer):
        return False
    parse, verify = _math_verify()
    # math-verify's own time limits are alarms, which only a main thread can set.
    seconds = _SECONDS if threading.current_thread() is threading.main_thread() else None
    try:
        wanted = parse(f"\\boxed{{{reference}}}", parsing_timeout=seconds)
        found = parse(f"\\boxed{{{answer}}}", parsing_timeout=seconds)
        return bool(wanted and found and verify(wanted, found, timeout_seconds=seconds))
    except MemoryError:
        raise
    except Exception:  # a parser of three libraries, on hostile text
        return False


def _is_costly(text: str) -> bool:
    """Return whether numbers of an expression might be too large to work out."""
    if _LARGE.search(text) or _CHAIN.search(text):
        return True
    for power in _EXPONENT.finditer(text):
        if _NUMBER_POWER.search(_group(text, power.end() - 1)):
            return True
    of_numbers, of_groups = 1, 1
    for bracket, exponent in _POWER.findall(text):
        if bracket:
            of_groups *= max(int(exponent), 1)
        else:
            of_numbers = max(int(exponent), of_numbers)
    return of_numbers * of_groups > _MOST_POWER


def _group(text: str, start: int) -> str:
    """Return what the bracket at a place encloses, or all that follows if it does not close."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] in "{(") - (text[place] in "})")
        if depth == 0:
            return text[start + 1 : place]
    return text[start + 1 :]


@cache
def _math_verify() -> tuple[Any, Any]:
    """Import math-verify when it is first needed: it takes a second."""
    try:
        from math_verify import parse, verify
    except ModuleNotFoundError as error:
        raise UserError(
            "the tasks math and gsm8k need math-verify; pip install megatron-espo again"
        ) from error
    # It reports every unreadable answer.
    for logger in ("math_verify", "latex2sympy2_extended"):
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    # The first call builds tables, for seconds on a busy machine: not on an answer's time.
    verify(parse("\\boxed{x+\\frac{1}{2}}", parsing_timeout=None), parse("1", parsing_timeout=None),
           timeout_seconds=None)  # fmt: skip
    return parse, verify
