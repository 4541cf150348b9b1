"""Arithmetic as text: a grammar, parsed and worked out in exact fractions, never by eval().

    expression = product {("+" | "-") product}
    product    = factor {("*" | "/") factor}
    factor     = number | "(" expression ")"

Numbers are ASCII digits without leading zeros; there is no sign and no other operator. ASCII white
space may stand between tokens.
"""

import re
import string
from collections import deque
from dataclasses import dataclass
from fractions import Fraction

MAX_LENGTH = 256
MAX_DEPTH = 32
# Anything that is no number and no ASCII white space is a token of its own; the grammar refuses it.
TOKEN = re.compile(r"[0-9]+|\S", re.ASCII)


@dataclass(frozen=True)
class Expression:
    """A parsed expression.

    Attributes:
        value: None where it divides by zero.
        numbers: The numbers it is made of, in order.
    """

    value: Fraction | None
    numbers: tuple[int, ...]


def parse_expression(text: str) -> Expression:
    """Parse and evaluate an expression of the module's grammar.

    Args:
        text: At most `MAX_LENGTH` characters, parentheses nested at most `MAX_DEPTH` deep.

    Returns:
        Its exact value and its numbers.

    Raises:
        ValueError: The text is not such an expression.
    """
    if len(text) > MAX_LENGTH:
        raise ValueError(f"longer than {MAX_LENGTH} characters")
    tokens = deque(TOKEN.findall(text))
    numbers: list[int] = []
    value = _parse_sum(tokens, numbers, depth=0)
    if tokens:
        raise ValueError(f"unexpected {tokens[0]!r}")
    return Expression(value, tuple(numbers))


def _parse_sum(tokens: deque[str], numbers: list[int], depth: int) -> Fraction | None:
    value = _parse_product(tokens, numbers, depth)
    while tokens and tokens[0] in {"+", "-"}:
        operator = tokens.popleft()
        value = apply(operator, value, _parse_product(tokens, numbers, depth))
    return value


def _parse_product(tokens: deque[str], numbers: list[int], depth: int) -> Fraction | None:
    value = _parse_factor(tokens, numbers, depth)
    while tokens and tokens[0] in {"*", "/"}:
        operator = tokens.popleft()
        value = apply(operator, value, _parse_factor(tokens, numbers, depth))
    return value


def _parse_factor(tokens: deque[str], numbers: list[int], depth: int) -> Fraction | None:
    if not tokens:
        raise ValueError("ends too early")
    token = tokens.popleft()
    if token[0] in string.digits:
        if token[0] == "0" and len(token) > 1:
            raise ValueError(f"leading zero in {token}")
        numbers.append(int(token))
        return Fraction(numbers[-1])
    if token != "(":
        raise ValueError(f"unexpected {token!r}")
    if depth == MAX_DEPTH:
        raise ValueError(f"more than {MAX_DEPTH} parentheses deep")
    value = _parse_sum(tokens, numbers, depth + 1)
    if not tokens or tokens.popleft() != ")":
        raise ValueError("missing ')'")
    return value


def apply(operator: str, left: Fraction | None, right: Fraction | None) -> Fraction | None:
    """Apply one of + - * / to two values; None stands for what has none, a division by zero."""
    if left is None or right is None:
        return None
    if operator == "+":
        return left + right
    if operator == "-":
        return left - right
    if operator == "*":
        return left * right
    return left / right if right else None
