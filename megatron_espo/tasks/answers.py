r"""Finds the final answer in a completion: \boxed{}, answer tags, "####", "the answer is".

Everything here is linear in the length of the text.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

MAX_ANSWER = 512
"""Characters of an answer beyond which it counts as none."""

_OPEN, _CLOSE = "<answer>", "</answer>"
_BOX = re.compile(r"(?:\\|\b)(?:boxed|fbox)\s*(?=\{)")
_MOST_TRIED = 8  # boxes, tags or phrases, from the last one back
# What prompts put where the answer goes, and models repeat.
_PLACEHOLDER = re.compile(
    r"(?:[\s.…?_\[\]()-]|\\[lc]?dots)*|[\[(]?\s*(?:(?:your|the|final)\s+)*answer(?:\s+here)?\s*[\])]?",
    re.IGNORECASE,
)
_HASHES = re.compile(r"####(?!#)")
_SAYS = re.compile(
    r"\banswer\b[^.\n$\\0-9]{0,60}?\b(?:is|are|equals)\b(?:[ \t]*:)?|\banswer\W{0,3}[:=]"
    r"|\banswer(?=[ \t]*[-0-9$])",
    re.IGNORECASE,
)
_HEADING = re.compile(r"\W*(?:step|part|case|problem|question|solution|method)\b", re.IGNORECASE)
# A full stop ends a sentence unless a digit follows it or an abbreviation comes before.
_END = re.compile(
    r"\n|[!?;](?=\s|$)|(?<!\brs)(?<!\bno)(?<!\bapprox)(?<!\b[ap]\.m)(?<!\b[ap])\.(?=\s|$|[*_`\"')])",
    re.IGNORECASE,
)
_DISPLAY = re.compile(r"\s*(?:\$\$.*?\$\$|\\\[.*?\\\])", re.DOTALL)
_BEFORE = re.compile(r"(?:[\s:*_]|\\n|\\\\)*")
_CONTENT = re.compile(r"[0-9$\\]")
_SPECIAL_TOKEN = re.compile(r"<\|[^<>|\s]{1,40}\|>|</s>")


class Statement(NamedTuple):
    """Where a completion states its answer.

    Attributes:
        text: the words around it, stripped of white space.
        place: "box" and "tags" enclose nothing but the answer, "said" follows a phrase that
            announces it, "end" is how the text ends.
    """

    text: str
    place: str


def tagged_answer(text: str) -> str | None:
    """Return what the last answer tags enclose, stripped of white space.

    Only what lies between a "</answer>" and the "<answer>" nearest before it counts, so tags that
    are merely mentioned, nested or never closed do not. Empty tags, and those that enclose what
    prompts put there, give way to ones before them.

    Args:
        text: a completion.

    Returns:
        The answer, empty where no pair encloses any, or None without a pair of tags.
    """
    span = tagged_span(text)
    return None if span is None else text[span[0] : span[1]]


def tagged_span(text: str) -> tuple[int, int] | None:
    """Return where `tagged_answer` stands: its first character and the one after its last."""
    found, stop = None, len(text)
    for _ in range(_MOST_TRIED):
        end = text.rfind(_CLOSE, 0, stop)
        start = text.rfind(_OPEN, 0, end) if end >= 0 else -1
        if start < 0:
            break
        inside = text[start + len(_OPEN) : end]
        answer, first = inside.strip(), end - len(inside.lstrip())
        if not _PLACEHOLDER.fullmatch(answer[:80]):
            return first, first + len(answer)
        found = (start, start) if found is None else found
        stop = start
    return found


def boxed_answer(text: str) -> str | None:
    r"""Return the content of the last \boxed{} whose braces close, stripped of white space.

    Empty boxes, and those that enclose what prompts put there, give way to ones before them.

    Args:
        text: a completion.

    Returns:
        The content, empty where no box holds any, or None where there is no such box.
    """
    found = None
    for box in reversed(list(_BOX.finditer(text))[-_MOST_TRIED:]):
        content = _braced(text[box.end() : box.end() + MAX_ANSWER + 2])
        if content is None:
            continue
        if not _PLACEHOLDER.fullmatch(content[:80]):
            return content.strip()
        found = "" if found is None else found
    return found


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


def final_statement(text: str) -> Statement | None:
    r"""Return where a completion states its final answer.

    In this order: the last \boxed{}, the last answer tags, what the last "####" announces, what
    the last "answer is" or "answer:" announces, the end of the text. Of the phrases, those
    followed by a number or a formula come before others.

    Args:
        text: a completion.

    Returns:
        The statement, or None where there is none of at most `MAX_ANSWER` characters; only the end
        of the text is cut to that length.
    """
    text = _SPECIAL_TOKEN.sub(" ", text)
    for place, answer in (("box", boxed_answer(text)), ("tags", tagged_answer(text))):
        if not answer:
            continue
        if place == "tags" and (inner := _said(answer)) is not None:
            return inner
        return Statement(answer, place) if len(answer) <= MAX_ANSWER else None
    said = _said(text)
    if said is not None:
        return said if len(said.text) <= MAX_ANSWER else None
    return Statement(text[-MAX_ANSWER:].strip(), "end")


def _said(text: str) -> Statement | None:
    """Return what the phrases that announce an answer are followed by."""
    plain = None
    for sentence in _announced(text):
        if _CONTENT.search(sentence):
            return Statement(sentence, "said")
        plain = plain or sentence
    return Statement(plain, "said") if plain else None


def _announced(text: str) -> Iterator[str]:
    for mark in reversed(list(_HASHES.finditer(text))[-_MOST_TRIED:]):
        sentence = first_sentence(text[mark.end() :])
        if not _HEADING.match(sentence):
            yield sentence
    for mark in reversed(list(_SAYS.finditer(text))[-_MOST_TRIED:]):
        yield without_reason(first_sentence(text[mark.end() :]))


def first_sentence(text: str) -> str:
    """Return the first sentence or display formula of a text, white space and emphasis apart."""
    text = text[: 4 * MAX_ANSWER]
    text = text[_BEFORE.match(text).end() :]  # type: ignore[union-attr]
    display = _DISPLAY.match(text)
    end = _END.search(text, display.end() if display else 0)
    return text[: end.start() if end else None].strip().strip("*_").strip()


# Words that begin a reason or a circumstance after an answer.
_REASON = re.compile(
    r"[\s,(]+(?:because|since|as|so|for|which|when|if|where|that|with|after|before|in|from|by|at"
    r"|on|out\s+of|per|each|every|given|due)\b.*",
    re.DOTALL | re.IGNORECASE,
)


def without_reason(sentence: str) -> str:
    """Cut a sentence after its answer, where a reason or a circumstance begins.

    "18 since 16-3-4=9" becomes "18". Formulas are never cut.

    Args:
        sentence: what follows "the answer is".

    Returns:
        Its beginning; all of it where nothing comes before the first such word.
    """
    for match in _REASON.finditer(sentence):
        before = sentence[: match.start()]
        if before.count("$") % 2 == 0 and before.count("\\(") == before.count("\\)"):
            return before
    return sentence
