r"""Units of measure behind a number: told apart, and converted where they measure the same.

math-verify drops units, so that 5 cm would equal 5 m.
"""

import re
from fractions import Fraction
from typing import NamedTuple

from megatron_espo.tasks.latex import plain_text


class Unit(NamedTuple):
    """A unit as a multiple of a product of powers of base units.

    Attributes:
        factor: base units to the unit.
        powers: base unit, power; sorted, without zeros.
    """

    factor: Fraction
    powers: tuple[tuple[str, int], ...]


_INCH = Fraction(254, 10_000)
_POUND = Fraction(45_359_237, 100_000)
# Base unit and its power: names and how many base units each is.
_TABLE: dict[tuple[str, int], dict[str, Fraction | int]] = {
    ("meter", 1): {
        "mm millimeter millimetre": Fraction(1, 1000),
        "cm centimeter centimetre": Fraction(1, 100),
        "m meter metre": 1,
        "km kilometer kilometre": 1000,
        "inch inches in": _INCH,
        "ft foot feet": 12 * _INCH,
        "yd yard": 36 * _INCH,
        "mi mile": 63_360 * _INCH,
    },
    ("meter", 2): {"acre": 43_560 * (12 * _INCH) ** 2, "hectare": 10_000},
    ("meter", 3): {
        "ml milliliter millilitre cc": Fraction(1, 1_000_000),
        "l liter litre": Fraction(1, 1000),
        "gallon gal": 231 * _INCH**3,
        "quart qt": Fraction(231, 4) * _INCH**3,
        "pint": Fraction(231, 8) * _INCH**3,
        "cup": Fraction(231, 16) * _INCH**3,
    },
    ("second", 1): {
        "s sec second": 1,
        "min minute": 60,
        "h hr hour": 3600,
        "day": 86_400,
        "week": 604_800,
    },
    ("month", 1): {"month": 1, "year yr": 12},
    ("gram", 1): {
        "mg milligram": Fraction(1, 1000),
        "g gram": 1,
        "kg kilogram": 1000,
        "lb pound": _POUND,
        "oz ounce": _POUND / 16,
    },
    ("dollar", 1): {"$ dollar usd": 1, "cent": Fraction(1, 100)},
    **{(name, 1): {names: 1} for name, names in {
        "euro": "€ euro eur", "sterling": "£ gbp", "rupee": "rupee rs", "degree": "degree deg",
        "radian": "radian rad", "am": "am", "pm": "pm", "newton": "newton", "joule": "joule",
        "watt": "watt", "volt": "volt", "ohm": "ohm", "hertz": "hertz hz"}.items()},
}  # fmt: skip
_NAMES: dict[str, tuple[str, int, Fraction]] = {
    name: (base, power, Fraction(factor))
    for (base, power), units in _TABLE.items()
    for names, factor in units.items()
    for name in names.split()
}
_SPELLED_OUT = {"mph": "mile/hour", "kmh": "km/hour", "kph": "km/hour", "kmph": "km/hour"}
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_PART = re.compile(r"([A-Za-z$€£]+)|(/|\bper\b)|\^?\s*\{?([23])\}?")
_TEXT = (
    r"\\(?:text|mbox|mathrm|textnormal|textrm|textit|mathit)\s*\{[^{}]*[A-Za-z][^{}]*\}"
    r"(?:\s*\^\s*\{?[23]\}?)?"
)
_GAP = r"(?:\\[,;: ~!]|~|\s)*"
_WRAPPED = re.compile(
    rf"(?P<value>.*[0-9)}}\]]){_GAP}"
    rf"(?P<unit>/?{_GAP}{_TEXT}(?:(?:\\[,;: ]|\s|/)*{_TEXT})*){_GAP}\.?"
)
_BARE = re.compile(
    rf"(?P<value>.*[0-9)}}])(?P<gap>{_GAP})"
    r"(?P<unit>[A-Za-z][A-Za-z. ]*(?:/\s*[A-Za-z]+)?(?:\s*\^\s*\{?[23]\}?)?)"
)
_MONEY = re.compile(r"(?P<sign>-?)\s*(?P<unit>\\?\$|€|£)\s*(?P<value>\.?[0-9].*)")
_NO_UNIT = re.compile(
    r"\b(?:or|and|base|to|if|for|when|where|mod|sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|pi|inf|infty"
    r"|infinity|theta|alpha|beta|million|billion|thousand|hundred|dozen)\b",
    re.IGNORECASE,
)


def split_unit(answer: str) -> tuple[str, str]:
    r"""Split an answer into its value and the words of its unit, empty without one.

    Args:
        answer: LaTeX such as "5 \text{ cm}^2", "5 km/h", "\$5" or "5 marbles".

    Returns:
        Both as text.
    """
    answer = answer.strip()
    if money := _MONEY.fullmatch(answer):
        value, unit = split_unit(money["value"])
        return money["sign"] + value, unit or money["unit"].removeprefix("\\")
    if (found := _WRAPPED.fullmatch(answer)) and not _NO_UNIT.search(found["unit"]):
        return found["value"], plain_text(found["unit"]).strip()
    if (found := _BARE.fullmatch(answer)) and not _NO_UNIT.search(found["unit"]):
        unit = found["unit"].strip()
        long = found["gap"] and re.match("[A-Za-z]{3}", unit)
        if long or ((known := read_unit(unit)) and (len(unit) > 1 or (found["gap"] and known))):
            return found["value"], unit
    return answer, ""


def read_unit(words: str) -> Unit | None:
    """Read a unit of measure.

    Args:
        words: such as "square centimeters", "cm^2", "km/h" or "miles per hour".

    Returns:
        The unit, or None where one of the words is no measure.
    """
    words = words.lower().replace(".", "").strip()
    words = re.sub("[a-z]+", lambda word: _SPELLED_OUT.get(word[0], word[0]), words)
    factor, powers = Fraction(1), dict[str, int]()
    sign, raised, last = 1, 1, ""
    for word, slash, exponent in _PART.findall(words):
        if exponent and last:
            base, power, size = _NAMES[last]
            factor *= size ** (sign * (int(exponent) - 1))
            powers[base] += sign * power * (int(exponent) - 1)
        elif slash or word == "per":
            sign = -1
        elif word in _POWERS:
            raised = _POWERS[word]
        else:
            last = word if word in _NAMES else word.removesuffix("s")
            if last not in _NAMES:
                return None
            base, power, size = _NAMES[last]
            factor *= size ** (sign * raised)
            powers[base] = powers.get(base, 0) + sign * power * raised
            raised = 1
    if not powers:
        return None
    return Unit(factor, tuple(sorted((base, power) for base, power in powers.items() if power)))
