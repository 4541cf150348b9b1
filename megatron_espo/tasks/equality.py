r"""Are two answers equal as mathematics? math-verify decides, behind guards.

math-verify 0.9 drops units and the bases of numbers, takes words for products of letters, sets for
tuples, "73 = 72" for 72, and numbers that differ by less than 1e-15 for equal; it does not know
emphasis, colours or most Unicode. What can be told before it is asked is told here.
"""

import logging
import re
import threading
from functools import cache
from itertools import pairwise
from typing import Any

from megatron_espo.errors import UserError
from megatron_espo.tasks.latex import plain_text, tidy
from megatron_espo.tasks.numbers import SCALE_WORDS
from megatron_espo.tasks.units import read_unit, split_unit

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
_GROUPED = re.compile(
    r"(?<![0-9.,_^{])([0-9]{1,3})((?:(?:\\[,:;! ]|,\\!|\{,\}|~| )[0-9]{3})+)(?![0-9])"
)
_MIXED = re.compile(r"(?<![0-9/^_.}])([0-9]+)\s+([0-9]+)/([0-9]+)(?![0-9/])")
_TEXT_NUMBER = re.compile(
    r"\\(?:text(?:bf|it|rm)?|mbox|math(?:rm|bf))\s*\{(\s*[-+]?[.$0-9][^{}]*)\}"
)
_SCALE = re.compile(
    rf"(?<=[0-9])(?:\s|\\[,;: ]|~)*(?P<text>\\(?:text|mbox|mathrm)\s*\{{\s*)?"
    rf"(?P<scale>{'|'.join(SCALE_WORDS)})s?\b(?(text)(?P<rest>[^{{}}]*)\}})"
)
_SQRT = re.compile(r"\\?\bsqrt\s*(?:\(([^()]*)\)|([0-9]+|[a-z]\b))")
_BASED = re.compile(
    r"(-?)\s*\(?\s*([0-9A-Z][0-9A-Z ,]*?)\s*\)?\s*(?:_\s*\{?|,?\s*\(?\s*(?:in\s+)?base[\s-]*)"
    r"\s*\(?\s*([0-9]{1,2}|[a-z]{3,7})\s*\)?\s*\}?\s*\)?"
)
_NO_NUMBER = float("inf")  # of 5_2: a digit that the base does not have
_NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
).split()
_WORDS = r"\\(?:text(?:bf|it|rm|normal)?|mbox|math(?:rm|bf|it))\s*\{[^{}$\\]*[A-Za-z][^{}$\\]*\}"
_WRAPPED_WORDS = re.compile(rf"[\s(]*{_WORDS}(?:[\s(),.]*{_WORDS})*[\s),.]*")
_BARE_WORD = re.compile(r"[A-Za-z]{3,}(?:[ -][A-Za-z]{2,})*")
_CHOICE = re.compile(r"\(?([A-Z])\)?")
_SIZES = re.compile(r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])\s*|\\[,;:! ]")
_ALTERNATIVE = re.compile(r"\bor\b")
_EQUALS = re.compile(r"(?<![<>!\\])=")
# A time of day by its looks: a half of the day, or minutes or hours with a zero in front.
_TIME = re.compile(
    r"(?P<hour>\d{1,2}) ?(?:: ?(?P<minute>\d\d))? ?(?:(?P<half>[ap])\.? ?m\b\.?)?", re.IGNORECASE
)
_NUMERIC = re.compile(r"(?:[0-9.\s()+*/^{}!%-]|\\(?:[dtc]?frac|sqrt|cdot|times|div|pi|,|;|!|%))+")


def equivalent(reference: str, answer: str) -> bool:
    """Return whether two answers are equal as mathematics.

    Args:
        reference: the right answer.
        answer: any short text. A full stop at its end is not part of it. Digits that are not
            ASCII, and powers or factorials too large to work out (unless the reference is spelt
            the same), are not equal to anything.
    """
    reference, answer = _tidy(reference), _tidy(answer)
    if reference == answer:
        return True
    if _INTEGER.fullmatch(reference) and _INTEGER.fullmatch(answer):
        return int(reference) == int(answer)
    if any(character.isnumeric() and not character.isascii() for character in answer):
        return False
    if _is_costly(answer) or _is_costly(reference):
        return False
    if (same_words := _compare_words(reference, answer)) is not None:
        return same_words
    if (same_time := _compare_times(reference, answer)) is not None:
        return same_time
    based = [_in_base(text) for text in (reference, answer)]
    if _NO_NUMBER in based:
        return False
    if any(value is not None for value in based):
        known = zip(based, (reference, answer), strict=True)
        return equivalent(*(text if value is None else str(value) for value, text in known))
    if {_brackets(reference), _brackets(answer)} == {"set", "tuple"} or _is_untrue(answer):
        return False
    return _compare_measures(reference, answer)


def _tidy(text: str) -> str:
    """Take off what has no meaning, and join the groups of digits of large numbers."""
    text = tidy(text).strip().rstrip(".").rstrip()
    if number := _TEXT_NUMBER.fullmatch(text):
        text = number[1].strip()
    text = _SCALE.sub(_scaled, _MIXED.sub(r"\1\\frac{\2}{\3}", text))
    text = _SQRT.sub(lambda root: f"\\sqrt{{{root[1] or root[2]}}}", text)
    return _GROUPED.sub(lambda number: number[1] + re.sub("[^0-9]", "", number[2]), text)


def _scaled(scale: re.Match[str]) -> str:
    rest = (scale["rest"] or "").strip()
    return f"\\cdot {SCALE_WORDS[scale['scale']]}" + (f"\\text{{ {rest}}}" if rest else "")


def _compare_words(reference: str, answer: str) -> bool | None:
    """Compare answers in words; None where the reference is none.

    To math-verify, the letters of a word commute.
    """
    if not _is_word(reference):
        return None
    wanted, found = _words(reference), _words(answer)
    if wanted == found:
        return True
    letters = [
        sorted(set(re.split(r"[,\s]+|\band\b", text.strip("{}"))) - {""})
        for text in (wanted, found)
    ]
    if all(len(letter) == 1 for letter in letters[0]) and letters[0] == letters[1]:
        return True
    if wanted in _NUMBER_WORDS:
        return equivalent(str(_NUMBER_WORDS.index(wanted)), answer)
    if _CHOICE.fullmatch(plain_text(reference).strip()):  # "(B) 13" is choice B
        chosen = re.match(r"\(([A-Z])\)|([A-Z])[).:]\s", plain_text(answer).strip())
        return chosen is not None and (chosen[1] or chosen[2]).lower() == wanted
    return False


def _compare_times(reference: str, answer: str) -> bool | None:
    """Compare times of day; None where the reference is none.

    To math-verify they are ratios: 2:05 equals 8:20, and every full hour is a division by zero.
    """
    wanted, found = (
        _TIME.fullmatch(re.sub(r"\s+", " ", plain_text(text)).strip())
        for text in (reference, answer)
    )
    if wanted is None or not _is_time(wanted):
        return None
    if found is None or (found["minute"] is None and found["half"] is None):
        return False
    times = [(int(time["hour"]), int(time["minute"] or 0)) for time in (wanted, found)]
    halves = {time["half"].lower() for time in (wanted, found) if time["half"]}
    return times[0] == times[1] and len(halves) < 2


def _is_time(found: re.Match[str]) -> bool:
    if found["minute"] is None:
        return found["half"] is not None
    return bool(found["half"]) or found["minute"][0] == "0" or found["hour"][0] == "0"


def _is_word(reference: str) -> bool:
    plain = plain_text(reference).strip()
    if _WRAPPED_WORDS.fullmatch(reference):
        return not re.fullmatch(r"(?:[A-Za-z]\s+)?(?:or|and)\b.*", plain)
    word = plain.lower()
    if not _BARE_WORD.fullmatch(plain) or re.fullmatch("sin|cos|tan|log|exp|inf(inity)?", word):
        return False
    # Products of variables are seldom pronounceable, or stand in order: xyz, abc.
    in_order = all(a < b for a, b in pairwise(word))
    return plain.isupper() or (bool(re.search("[aeiou]", word)) and not in_order)


def _words(text: str) -> str:
    plain = re.sub(r"[^a-z0-9,{}]+", " ", plain_text(text).lower()).strip(" ,")
    plain = re.sub(r"\s*,\s*", ", ", plain)
    return re.sub(r"^(?:the|an?) (?=[a-z]{2})", "", plain)


def _in_base(text: str) -> float | None:
    r"""Return the value of a number with a base: 52_8, 52_{\text{eight}}, 52 (base 8)."""
    found = _BASED.fullmatch(plain_text(text).strip())
    if found is None:
        return None
    sign, digits, base = found.groups()
    if base in _NUMBER_WORDS:
        base = str(_NUMBER_WORDS.index(base))
    digits = re.sub("[ ,]", "", digits)
    if not base.isdecimal() or not 2 <= int(base) <= 36 or (digits.isalpha() and int(base) < 11):
        return None
    try:
        return int(sign + digits, int(base))
    except ValueError:
        return None if digits.isalpha() else _NO_NUMBER


def _brackets(text: str) -> str:
    """Return whether an answer is a "set", in braces or with "or", a "tuple", or "other"."""
    text = _SIZES.sub("", text).replace("\\lbrace", "\\{").replace("\\rbrace", "\\}").strip()
    if _ALTERNATIVE.search(plain_text(text)) or (text.startswith("\\{") and text.endswith("\\}")):
        return "set"
    if text.startswith("(") and text.endswith(")") and "," in text:
        depths, depth = [], 0
        for character in text[:-1]:
            depth += (character == "(") - (character == ")")
            depths.append(depth)
        return "tuple" if min(depths) > 0 else "other"
    return "other"


def _is_untrue(answer: str) -> bool:
    """Return whether an answer is an equation of numbers that does not hold."""
    sides = [side.strip() for side in _EQUALS.split(answer)]
    numbers = [side for side in sides if _NUMERIC.fullmatch(side)]
    return len(numbers) > 1 and not all(_verified(left, right) for left, right in pairwise(numbers))


def _compare_measures(reference: str, answer: str) -> bool:
    """Compare answers that may have units; a unit that only one of them has does not count."""
    (wanted, wanted_unit), (found, found_unit) = split_unit(reference), split_unit(answer)
    if not wanted_unit and not found_unit:
        return _verified(reference, answer)
    units = read_unit(wanted_unit), read_unit(found_unit)
    if units[0] is None or units[1] is None or units[0] == units[1]:
        return _verified(wanted, found)
    if units[0].powers != units[1].powers:
        return False
    scale = units[1].factor / units[0].factor
    return _verified(wanted, f"({found})\\cdot\\frac{{{scale.numerator}}}{{{scale.denominator}}}")


def _verified(reference: str, answer: str) -> bool:
    """Ask math-verify."""
    if reference == answer:
        return True
    parse, verify = _math_verify()
    # math-verify's own time limits are alarms, which only a main thread can set.
    seconds = _SECONDS if threading.current_thread() is threading.main_thread() else None
    try:
        wanted = parse(f"\\boxed{{{reference}}}", parsing_timeout=seconds)
        found = parse(f"\\boxed{{{answer}}}", parsing_timeout=seconds)
        if not wanted or not found:
            return False
        equal = verify(wanted, found, allow_set_relation_comp=True, timeout_seconds=seconds)
        return bool(equal) and ("%" in reference + answer or _is_close(wanted[0], found[0]))
    except MemoryError:
        raise
    except Exception:  # a parser of three libraries, on hostile text
        return False


def _is_close(wanted: Any, found: Any) -> bool:
    """Return whether what math-verify finds equal is equal in proportion, too.

    To it, numbers are equal that differ by less than 1e-6, or 1e-15 where none is a decimal.
    """
    if not (getattr(wanted, "is_number", False) and getattr(found, "is_number", False)):
        return True
    wanted, found = wanted.doit(), found.doit()
    if wanted.is_infinite or found.is_infinite:
        # Numbers that are divided by zero are all the same one.
        return bool(wanted == found and wanted.is_extended_real)
    if wanted.is_Rational and found.is_Rational:
        return bool(wanted == found)
    decimals = any(atom.is_Float for atom in wanted.atoms() | found.atoms())
    tolerance = 2e-6 if decimals else 1e-12
    size = max(abs(wanted.evalf(30)), abs(found.evalf(30)))
    return bool(abs((wanted - found).evalf(30)) <= tolerance * size)


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
