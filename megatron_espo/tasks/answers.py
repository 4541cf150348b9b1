r"""Finds the final answer in a completion: answer tags, \boxed{}, numbers as people write them.

Everything here is linear in the length of the text and takes ASCII digits only.
"""

import re
from fractions import Fraction

MAX_ANSWER = 512
"""Characters of an answer beyond which it counts as none."""

_OPEN, _CLOSE = "<answer>", "</answer>"
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)")
# A number with optional thousands separators; a minus counts unless it follows an operand.
_NUMBER = re.compile(
    r"(?<![\w.)\]}])[-+]?\s?(?:\\?\$\s?)?(?:[0-9]{1,3}(?:(?:,|\{,\}|\\[,!;]|,\\!)[0-9]{3})+|[0-9]+)"
    r"(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?"
)
_SAYS = re.compile(r"(?:####|answer\s+is:?)", re.IGNORECASE)
_FRACTION = re.compile(r"([-+]?)\\[dtc]?frac\{([-+]?[0-9]+)\}\{([0-9]+)\}")
_RATIO = re.compile(r"([-+]?[0-9]+)/([0-9]+)")
_DECIMAL = re.compile(r"[-+]?[0-9]+(?:\.[0-9]*)?|[-+]?\.[0-9]+")
_TEXT = re.compile(r"\\(?:text|mbox|mathrm|textbf)\s*\{[^{}]*\}")
_SEPARATOR = re.compile(r"(?<=[0-9])(?:,|\{,\}|\\[,!;]|,\\!)(?=[0-9]{3}(?![0-9]))")
_UNIT = re.compile(r"(?<=[0-9.}])\s*(?:[A-Za-z%°][A-Za-z%°./ ]*|\\%|\\circ|\^\\circ|\^\{\\circ\})$")


def tagged_answer(text: str) -> str | None:
    """Return what the last answer tags enclose, stripped of white space.

    Only what lies between the last "</answer>" and the "<answer>" nearest before it counts, so
    tags that are merely mentioned, nested or never closed do not.

    Args:
        text: a completion.

    Returns:
        The answer, perhaps empty, or None without a pair of tags.
    """
    end = text.rfind(_CLOSE)
    start = text.rfind(_OPEN, 0, end) if end >= 0 else -1
    return text[start + len(_OPEN) : end].strip() if start >= 0 else None


def boxed_answer(text: str) -> str | None:
    r"""Return the content of the last \boxed{} whose braces close, stripped of white space.

    Args:
        text: a completion.

    Returns:
        The content, perhaps empty, or None where there is no such box.
    """
    for box in reversed(list(_BOX.finditer(text))[-8:]):
        content = _braced(text[box.end() : box.end() + MAX_ANSWER + 2])
        if content is not None:
            return content.strip()
    return None


def _braced(text: str) -> str | None:
    """Return what the brace at the start of a text encloses."""
    depth, escaped = 0, False
    for place, character in enumerate(text):
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = True
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return text[1:place]
    return None


def final_answer(text: str) -> str | None:
    r"""Return the answer that a completion ends with.

    In this order: the last \boxed{}, the last answer tags, what follows the last "####" or
    "answer is", the last number.

    Args:
        text: a completion.

    Returns:
        The answer, or None where there is none of at most `MAX_ANSWER` characters.
    """
    answer = boxed_answer(text)
    if answer is None:
        answer = tagged_answer(text)
    if answer is not None:
        return answer if 0 < len(answer) <= MAX_ANSWER else None
    says = list(_SAYS.finditer(text))
    if says and (said := _NUMBER.search(text[says[-1].end() :][:MAX_ANSWER])):
        return said.group().strip()
    numbers = _NUMBER.findall(text[-4 * MAX_ANSWER :])
    if not numbers or len(numbers[-1]) > MAX_ANSWER:
        return None
    return str(numbers[-1]).strip()


def parse_number(text: str) -> Fraction | None:
    r"""Read a number with thousands separators, a currency sign, a unit or a LaTeX fraction.

    "1,234", "$5.50", "12 apples", "x = 3", "1{,}000", "\frac{1}{2}", "3/4" and "75%" (as 75) are
    numbers; "1,23", "3 or 4" and digits that are not ASCII are not.

    Args:
        text: an answer.

    Returns:
        Its exact value, or None.
    """
    if len(text) > MAX_ANSWER or not text.isascii():
        text = text.replace("−", "-").replace("€", "").replace("£", "").replace("°", "")
        if len(text) > MAX_ANSWER or not text.isascii():
            return None
    text = _TEXT.sub("", text.strip().strip("$").strip())
    text = text.rpartition("=")[2].strip()
    text = re.sub(r"^([-+]?)\s*\\?\$\s*", r"\1", text).strip(" .~")
    text = _UNIT.sub("", _SEPARATOR.sub("", text)).strip()
    text = text.strip(" .").removesuffix("\\").strip()
    if match := _FRACTION.fullmatch(text):
        sign, top, bottom = match.groups()
        return _ratio(int(top), int(bottom), negative=sign == "-")
    if match := _RATIO.fullmatch(text):
        return _ratio(int(match[1]), int(match[2]))
    return Fraction(text) if _DECIMAL.fullmatch(text) else None


def _ratio(top: int, bottom: int, *, negative: bool = False) -> Fraction | None:
    return None if bottom == 0 else Fraction(-top if negative else top, bottom)
