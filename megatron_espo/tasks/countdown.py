"""Countdown: combine the given numbers, each exactly once, into an expression with a given value.

File format: {"numbers": [44, 19, 35], "target": 98}, or the published names "nums" for "numbers"
and {"input": "44,19,35", "output": "98"}; generated records add a "solution". The prompt explains
the game in a chat, and the answer stands between <answer> tags (d1, ESPO). A record with "style":
"bare" is for a model too small to talk: the prompt is "44,19,35=98:" and the completion nothing but
the answer. An answer is an expression such as "44+19+35", optionally in an equation: "=98" after
it, or between tags "98=" before it, or steps such as "=63+35=98" that all hold.

Its grammar is in `tasks.arithmetic`; the value is an exact fraction, so 8/(3-8/3) is 24. What
models dress an expression between tags in does not count: LaTeX (products, fractions, dollar signs,
a box), "x" and Unicode's signs, dashes for minus, square brackets, Markdown, a full stop, a label
such as "Expression:".
"""

import re
import string
from collections.abc import Mapping
from fractions import Fraction
from os import PathLike
from random import Random
from typing import Any

from megatron_espo.errors import UserError
from megatron_espo.tasks.answers import tagged_answer
from megatron_espo.tasks.arithmetic import MAX_LENGTH, TOKEN, apply, parse_expression
from megatron_espo.tasks.base import (
    Example,
    Score,
    draw_distinct,
    dressed_answer,
    is_bare,
    present,
    read_records,
    tagged_prompt,
)
from megatron_espo.tasks.latex import formulas, inside, plain_text

name = "countdown"

INSTRUCTION = """Make an arithmetic expression out of given numbers that has a given value. Use \
every number exactly once and no other number; you may use +, -, *, / and parentheses. The answer \
is the expression alone, without an equals sign. For example, with the numbers [3, 5, 6] and the \
target 13 a right answer is 3*6-5."""
_WELL_FORMED_REWARD = 0.1
_MAX_TARGET = 100
_FENCE = re.compile(r"^```\w*\s|```")
_LABEL = re.compile(
    r"^\W{0,4}(?:(?:the|my|final)\s+)*(?:expression|equation|answer|solution|result)\b"
    r"[\s*]*(?:is\b)?[\s*:]*",
    re.IGNORECASE,
)
_BRACKETS = str.maketrans("[]{}\u2215", "()()/")


def read(path: str | PathLike[str]) -> list[Example]:
    """Read problems.

    Args:
        path: JSONL or parquet file with "numbers" and "target" in every record; a "solution" is
            checked.

    Returns:
        One example per line.

    Raises:
        ValueError: A line is malformed, or its solution is wrong.
    """
    return read_records(path, {}, _parse)


def _parse(record: Mapping[str, Any]) -> Example:
    record = present(record)
    numbers, target = _problem(record)
    if not numbers or any(type(number) is not int or number < 1 for number in numbers):
        raise ValueError("'numbers' is not a list of positive integers; correct it")
    if target < 0:  # the grammar has no sign, so "=target" could not be written
        raise ValueError(f"'target' is {target}; make it 0 or more")
    answer = {"numbers": numbers, "target": target}
    if "solution" in record and not _judge(answer, str(record["solution"]))[1]:
        raise ValueError(f"'solution' {record['solution']!r} is wrong; correct it or leave it out")
    if is_bare(record):
        prompt = f"{','.join(map(str, numbers))}={target}:"
        return Example(prompt, {**answer, "style": "bare"})
    return Example(tagged_prompt(INSTRUCTION, f"Numbers: {numbers}\nTarget: {target}"), answer)


def _problem(record: Mapping[str, Any]) -> tuple[list[int], int]:
    """Return numbers and target under any of their published names."""
    if "input" in record and "output" in record:
        try:
            return [int(n) for n in record["input"].split(",")], int(record["output"])
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                'not of the form {"input": "44,19,35", "output": "98"}; correct it'
            ) from error
    key = "nums" if "nums" in record and "numbers" not in record else "numbers"
    for name_, kind in ((key, list), ("target", int)):
        if name_ not in record:
            raise ValueError(f"key {name_!r} is missing; add it")
        if type(record[name_]) is not kind:
            found = type(record[name_]).__name__
            raise ValueError(f"{name_!r} is of type {found}; make it {kind.__name__}")
    return record[key], record["target"]


def score(example: Example, completion: str) -> Score:
    """Reward 1 for the target, 0.1 for an answer that misses, else 0.

    What counts as an answer is the published rule (compute_score in d1's diffu-grpo/reward_func.py,
    taken over in ESPO's espo/rewards.py): a closed pair of answer tags earns 0.1 whatever it
    encloses, be it the wrong numbers, no expression or nothing; without one there is no reward. In
    the bare style, which has no tags, 0.1 takes an expression of exactly the given numbers; with
    an "=" after it, the target and nothing else must follow. An expression that divides by zero
    has no value, so it misses.

    Unlike there, a right expression may stand in an equation that holds (evaluation scripts derived
    from d1's take off what follows "=", too) and be dressed as the module says; there, all of that
    earns 0.1. Signs, decimals, "//" and "**", which Python's eval() takes, miss.

    Args:
        example: A problem, from `read`.
        completion: Any text.

    Returns:
        The score, with the metric "well_formed": whether the answer follows the grammar and uses
        exactly the given numbers, right or not.
    """
    bare = is_bare(example.answer)
    answer = completion if bare else tagged_answer(completion)
    if answer is None:
        return Score(reward=0.0, correct=False, metrics={"well_formed": 0.0})
    well_formed, correct = _judge(example.answer, answer)
    miss = _WELL_FORMED_REWARD if well_formed or not bare else 0.0
    reward = 1.0 if correct else miss
    return Score(reward=reward, correct=correct, metrics={"well_formed": float(well_formed)})


def _judge(problem: Mapping[str, Any], answer: str) -> tuple[bool, bool]:
    """Return whether an answer is an expression of the given numbers, and whether it is right."""
    numbers, target = sorted(problem["numbers"]), problem["target"]
    if is_bare(problem):
        body, equals, claim = answer.partition("=")
        if equals and claim.strip(string.whitespace) != str(target):
            return False, False
        texts = [body]
    else:
        texts = undressed(answer).split("=")
    try:
        sides = [parse_expression(text) for text in texts]
    except ValueError:
        return False, False
    asked = next((side for side in sides if sorted(side.numbers) == numbers), None)
    well_formed = asked is not None and all(
        side.value == target for side in sides if side is not asked
    )
    return well_formed, well_formed and asked is not None and asked.value == target


def undressed(answer: str) -> str:
    """Take off what models dress an expression or equation in.

    Args:
        answer: any text; one longer than `MAX_LENGTH` twice is returned as it is.

    Returns:
        The expression in the signs of the grammar, as far as it is one.
    """
    text = answer.strip()
    if len(text) > 2 * MAX_LENGTH:
        return answer
    text = _FENCE.sub("", text)
    for _ in range(3):
        whole = formulas(text)
        if whole and whole[0].group() == text:
            text = inside(whole[0])
        text = _LABEL.sub("", text).strip().rstrip(".;").strip().strip("\"'").strip()
    return plain_text(text).translate(_BRACKETS).strip()


def generate(
    count: int,
    seed: int,
    split: str,
    *,
    style: str = "bare",
    num_numbers: int = 3,
    max_number: int = 50,
    operators: str = "+-*/",
    ordered: bool = False,
) -> list[dict[str, Any]]:
    """Make up distinct problems, each with a solution.

    As in the game, every intermediate result of the solution is a positive integer; the target is
    at most 100. Two problems are the same if they differ only in the order of the numbers, and a
    hash of what they share decides the split.

    Args:
        count: Number of problems.
        seed: Same seed, same problems.
        split: "train", "validation" or "test".
        style: How the problems are put, one of `STYLES`.
        num_numbers: Numbers per problem.
        max_number: Numbers are uniform from 1 to this (before problems without such a solution
            are dropped).
        operators: Those of the solutions; a model may use all of them.
        ordered: Solutions take the numbers as they come, from left to right and without
            parentheses, which a small model learns sooner.

    Returns:
        Records in the file format, with "solution".

    Raises:
        ValueError: A parameter makes no sense, the split is unknown or has too few problems.
    """
    if num_numbers < 2 or max_number < 1:
        raise UserError(
            f"cannot use {num_numbers} numbers from 1 to {max_number}; "
            "use 2 numbers or more, from 1 to 1 or more"
        )
    if not operators or set(operators) - set("+-*/"):
        raise UserError(f"operators {operators!r} are not some of '+-*/'; correct them")
    rng = Random(f"{name}:{split}:{seed}")

    def draw() -> tuple[str, dict[str, Any]] | None:
        numbers = [rng.randint(1, max_number) for _ in range(num_numbers)]
        join = _in_order if ordered else _random_expression
        solution = join(numbers, rng, operators)
        if solution is None:
            return None
        text, target = solution
        key = f"{','.join(map(str, sorted(numbers)))}={target}"
        return key, {"numbers": numbers, "target": target, "solution": text, "style": style}

    return draw_distinct(draw, count, split)


def _random_expression(numbers: list[int], rng: Random, operators: str) -> tuple[str, int] | None:
    """Join random pairs by random operators; None when a result breaks the rules of `generate`."""
    # Text, value, and how tightly the text binds: 0 a sum, 1 a product, 2 a number.
    parts = [(str(number), Fraction(number), 2) for number in numbers]
    while len(parts) > 1:
        left, left_value, left_binding = parts.pop(rng.randrange(len(parts)))
        right, right_value, right_binding = parts.pop(rng.randrange(len(parts)))
        operator = rng.choice(operators)
        value = apply(operator, left_value, right_value)
        if value is None or value <= 0 or value.denominator != 1:
            return None
        binding = 0 if operator in "+-" else 1
        if left_binding < binding:
            left = f"({left})"
        if right_binding < binding or (right_binding == binding and operator in "-/"):
            right = f"({right})"
        parts.append((f"{left}{operator}{right}", value, binding))
    text, value, _ = parts[0]
    return (text, int(value)) if value <= _MAX_TARGET else None


def _in_order(numbers: list[int], rng: Random, operators: str) -> tuple[str, int] | None:
    """Join numbers from left to right; None when a result breaks the rules of `generate`.

    Products and quotients bind tighter, so that they may only come first.
    """
    text, value = str(numbers[0]), Fraction(numbers[0])
    summed = False
    for number in numbers[1:]:
        operator = rng.choice(operators)
        joined = apply(operator, value, Fraction(number))
        if joined is None or joined <= 0 or joined.denominator != 1:
            return None
        if operator in "*/" and summed:
            return None
        text, value, summed = f"{text}{operator}{number}", joined, summed or operator in "+-"
    return (text, int(value)) if value <= _MAX_TARGET else None


def demonstrate(record: Mapping[str, Any], rng: Random, noise: float) -> str:
    """Write a completion of mixed quality.

    With probability 1 - noise it is the solution. Otherwise it is hasty, and misses the target:
    all numbers added as they come, or, where that is right, the solution with one operator replaced
    or two numbers exchanged. Well-formed, but worth 0.1.

    Args:
        record: A record of `generate`.
        rng: Source of the noise.
        noise: Probability that the demonstration is corrupted.

    Raises:
        ValueError: The record has no solution.
    """
    if record.get("solution") is None:
        raise UserError("a record without 'solution' cannot be demonstrated; use generated ones")
    solution: str = record["solution"]
    if rng.random() >= noise:
        return dressed_answer(record, solution)
    if sum(record["numbers"]) != record["target"]:
        return dressed_answer(record, "+".join(map(str, record["numbers"])))
    tokens = TOKEN.findall(solution)
    operators = [i for i, token in enumerate(tokens) if token in "+-*/"]
    places = [i for i, token in enumerate(tokens) if token[0] in string.digits]
    replaced = [[*tokens[:i], operator, *tokens[i + 1 :]] for i in operators for operator in "+-*/"]
    exchanged = [_exchange(tokens, i, j) for i in places for j in places if i < j]
    texts = ["".join(variant) for variant in replaced + exchanged]
    # At least one misses: no two values a+b, a-b, a*b, a/b of positive a and b all agree.
    misses = [text for text in texts if parse_expression(text).value != record["target"]]
    return dressed_answer(record, rng.choice(misses))


def _exchange(tokens: list[str], i: int, j: int) -> list[str]:
    exchanged = list(tokens)
    exchanged[i], exchanged[j] = tokens[j], tokens[i]
    return exchanged
