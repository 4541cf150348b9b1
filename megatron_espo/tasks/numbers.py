"""Reads numbers as people write them: separators, currencies, units, scale words, fractions.

Digits are ASCII. Nothing is evaluated here but fractions, signs and scale words.
"""

import re
from collections.abc import Sequence
from fractions import Fraction

from megatron_espo.tasks.answers import MAX_ANSWER, Statement, without_reason
from megatron_espo.tasks.latex import formulas, inside, plain_text

SCALE_WORDS = {
    **{"dozen": 12, "hundred": 100, "thousand": 10**3},
    **{"million": 10**6, "billion": 10**9, "trillion": 10**12},
}
"""Words after a number, and what they multiply it by."""
_SCALES = {**SCALE_WORDS, "k": 10**3}
_UNSIGNED = (
    r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?"
    r"|[0-9]{1,3}(?: [0-9]{3})+(?![0-9])(?:\.[0-9]+)?"
    r"|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
)
_QUANTITY = re.compile(
    r"(?P<sign>(?:(?<=[\s=(:,;])|^)[-+](?=[.0-9])|(?:(?<=[=(:])|^)\s*[-+]\s*)?"
    rf"(?<![\w.])(?P<number>{_UNSIGNED})(?:[eE](?P<power>[-+]?[0-9]{{1,2}})(?![\w.]))?"
    r"(?:\s*(?:(?<=\s)|(?<=\s[-+]))(?P<top>[0-9]+)\s*/\s*(?P<bottom>[0-9]+)(?![\w.])"
    rf"|\s*/\s*(?P<under>{_UNSIGNED})(?![\w]))?"
    rf"(?P<scales>(?:[\s-]*(?:{'|'.join(SCALE_WORDS)})s?\b|(?<=[0-9])[kK]\b)*)"
)
_EQUALS = re.compile(r"(?<![<>!\\])=+(?!>)|:\s|:$|\b(?:is|are|was|were|equals?|makes?|will\s+be)\b")
_RELATION = re.compile(
    r"[<>]|!=|\\(?:geq?|leq?|neq?|geqslant|leqslant|gt|lt|pm|in|cup|infty|emptyset)(?![A-Za-z])"
)
_UNIT_POWER = re.compile(r"(?<=[A-Za-z])\s*(?:\^\s*\{?\s*-?[0-9]\s*\}?|\*\*\s*[0-9])")
_CENTS = re.compile(
    r"([0-9][0-9,]*)(?:\s*(?:dollars?|USD|bucks))?\s*,?\s*and\s+([0-9]{1,2})\s*cents?\b"
    r"|([0-9][0-9,]*)\s*(?:dollars?|USD|bucks)\s*,?\s*([0-9]{1,2})\s*cents?\b"
)
_VARIABLE = re.compile(r"[xyzne](?![A-Za-z])")
_PARENTHESIS = re.compile(r"(?<=[\w%.])\s*\([^()]*[A-Za-z][^()]*\)")
_ARITHMETIC = re.compile(r"[0-9.\s()+*/^{}\[\],!-]+")
_MEASURES = [
    {"dollar", "cent", "usd", "buck"},
    {"year", "month", "week", "day", "hour", "hr", "h", "minute", "min", "second", "sec", "s"},
    {"mile", "yard", "foot", "feet", "ft", "inch", "inches", "km", "kilometer", "meter", "m", "cm",
     "centimeter", "mm", "millimeter"},
    {"ton", "pound", "lb", "ounce", "oz", "kg", "kilogram", "gram", "g"},
    {"gallon", "quart", "pint", "cup", "liter", "milliliter", "l", "ml"},
]  # fmt: skip
_SECOND_UNIT = re.compile(r"\s*([A-Za-z]+)\.?\s*,?\s*(?:and\s+)?")
_WORD = re.compile(r"\s*([A-Za-z]+)")


def read_number(text: str) -> Fraction | None:
    r"""Read the number that an answer gives.

    "1,234", "1\,234", "$5.50", "12 apples", "10 cm^3", "x = 3", "Total: 18", "\frac{1}{2}",
    "2 1/2", "75%" (as 75), "5 million" and "18 dollars for 9 eggs" are numbers; "1,23", "3 or 4",
    "3 to 4", "12 hours 30 minutes", "x > 3", "73 = 72", sums and digits that are not ASCII are not.

    Args:
        text: an answer.

    Returns:
        Its exact value, or None.
    """
    sides = equal_sides(text)
    if not sides:
        return None
    values = [_single(side) for side in sides]
    if len(sides) > 1 and _contradict(sides[-2:], values[-2:]):
        return None
    return values[-1]


def _contradict(sides: Sequence[str], values: Sequence[Fraction | None]) -> bool:
    """Return whether two sides are numbers alone that differ; 1/8 and 12.5% do not."""
    if any(re.search("[A-Za-z]", side) for side in sides) or None in values:
        return False
    shares = [
        v / 100 if "%" in s else v for s, v in zip(sides, values, strict=True) if v is not None
    ]
    return values[0] != values[1] and shares[0] != shares[1]


def equal_sides(text: str) -> list[str]:
    """Return what stands between the equals signs of an answer, as plain text.

    "is" and a colon after a word count as equals signs, and reasons are cut off.

    Args:
        text: an answer.

    Returns:
        The sides that hold a digit or a command of LaTeX; none where the answer is no equation and
        no number: an inequality, or longer than `MAX_ANSWER`.
    """
    if len(text) > MAX_ANSWER:
        return []
    plain = _words_and_numbers(text)
    if _RELATION.search(plain):
        return []
    parts = [_PARENTHESIS.sub("", part) for part in _EQUALS.split(plain)]
    return [_trimmed(part) for part in parts if re.search(r"[0-9\\]", part)]


def _words_and_numbers(text: str) -> str:
    """Write an answer as plain text, units without powers, dollars with their cents."""
    plain = re.sub(r"\bRs\.", "Rs ", plain_text(text))
    plain = re.sub(r"\b(?:negative|minus)\s+(?=[.0-9])", "-", plain, flags=re.IGNORECASE)
    plain = _UNIT_POWER.sub("", plain)
    return _CENTS.sub(
        lambda sum_: f"{sum_[1] or sum_[3]}.{int(sum_[2] or sum_[4]):02} dollars", plain
    )


def _trimmed(side: str) -> str:
    short = without_reason(side)
    return (short if re.search("[0-9]", short) else side).lstrip(" ,;~_").rstrip(" .,;~_")


def is_arithmetic(side: str) -> bool:
    """Return whether a side of `equal_sides` holds nothing but numbers, operators, brackets."""
    return bool(_ARITHMETIC.fullmatch(side)) or "\\" in side


def _single(side: str) -> Fraction | None:
    """Read the only number of a text."""
    found = list(_QUANTITY.finditer(side))
    if len(found) != 1 or "\\" in side:
        return None
    before, after = side[: found[0].start()], side[found[0].end() :]
    if _VARIABLE.match(after) or re.search(r"[-+*/^]\s*$", before):
        return None
    if re.match(r"\s*[*^+!]|\s*[-/]\s*(?:$|[0-9(])", after):
        return None
    if re.search("[0-9]", re.sub(r"[A-Za-z][A-Za-z0-9]*", "", before + " " + after)):
        return None
    return _value(found[0])


def _value(quantity: re.Match[str]) -> Fraction | None:
    value = Fraction(re.sub("[ ,]", "", quantity["number"]))
    value *= Fraction(10) ** int(quantity["power"] or 0)
    if quantity["top"]:
        if int(quantity["bottom"]) == 0:
            return None
        value += Fraction(int(quantity["top"]), int(quantity["bottom"]))
    if quantity["under"]:
        under = Fraction(re.sub("[ ,]", "", quantity["under"]))
        if under == 0:
            return None
        value /= under
    for scale in re.findall("[A-Za-z]+", quantity["scales"].lower()):
        value *= _SCALES[scale.removesuffix("s")]
    return -value if "-" in (quantity["sign"] or "") else value


def last_number(text: str) -> Fraction | None:
    """Read the number that a text without a stated answer ends with.

    Args:
        text: the end of a completion.

    Returns:
        The last number of it; None where that is the second of two units or of an alternative.
    """
    plain = _words_and_numbers(text)
    found = list(_QUANTITY.finditer(plain))
    if not found:
        return None
    last = _value(found[-1])
    if len(found) == 1 or last is None:
        return last
    between, after = plain[found[-2].end() : found[-1].start()], plain[found[-1].end() :]
    if re.fullmatch(r"\s*(?:-|or)\s*|[,:]", between):
        return None
    first, second = _SECOND_UNIT.fullmatch(between), _WORD.match(after)
    if first and second and _same_measure(first[1], second[1]):
        return None
    return last


def _same_measure(*words: str) -> bool:
    names = {word.lower() for word in words}
    names |= {name.removesuffix("s") for name in names}
    return any(all({w.lower(), w.lower().removesuffix("s")} & kind for w in words)
               for kind in _MEASURES) and len(names) > 1  # fmt: skip


def stated_number(statement: Statement) -> tuple[Fraction | None, list[str]]:
    """Read the number of a completion's final statement.

    Args:
        statement: from `final_statement`.

    Returns:
        The number, or None; and the equal sides it was sought in, for one who can calculate.
    """
    if statement.place == "end":
        return last_number(statement.text), []
    text = statement.text
    if statement.place == "said" and (found := formulas(text)):
        outside = text[: found[0].start()] + text[found[0].end() :]
        text = inside(found[0]) if not re.search("[0-9]", outside) else text
    return read_number(text), equal_sides(text)
