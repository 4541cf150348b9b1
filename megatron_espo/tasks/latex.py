r"""What LaTeX, Markdown and Unicode dress an answer in, taken off."""

import re

_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("\u2212\u2013\u2014\u2012\u2010\u2011\ufe63\uff0d", "-"),
        **dict.fromkeys("\u00a0\u2007\u2009\u200a\u202f\u2002\u2003", " "),
        **dict.fromkeys("\u200b\u2060\ufeff", None),
        **{"×": "\\times ", "⋅": "\\cdot ", "·": "\\cdot ", "÷": "\\div ", "∗": "*"},
        **{"≤": "\\le ", "≥": "\\ge ", "≠": "\\neq ", "≈": "\\approx ", "±": "\\pm "},
        **{"∞": "\\infty ", "∪": "\\cup ", "∩": "\\cap ", "∅": "\\emptyset ", "∈": "\\in "},
        **{"°": "^\\circ ", "π": "\\pi ", "√": "\\sqrt "},
    }
)
# Emphasis; 2**3 is a power.
_MARKS = re.compile(
    r"(?<![\w.)\]}])\*\*|\*\*(?![\w.(\[{\\-])|__(?=\S)|(?<=\S)__|`|^\s*\*(?=[^*]+\*\s*$)|(?<=[^*])\*\s*$"
)
_COLOUR = re.compile(r"\\(?:text)?color\s*(?:\[[^\][]*\])?\s*\{[^{}]*\}")
_LINE = re.compile(r"\\(?:underline|uline|boxed|fbox|ensuremath)\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_LONE = re.compile(r"\{\s*([^{}\\]*?)\s*\}")
_TEXT_SIGN = re.compile(r"\\(?:text|mathrm|mbox)\s*\{\s*-\s*\}")
_SYNONYMS = {"degree": "^\\circ ", "varnothing": "\\emptyset "}
_SYNONYM = re.compile(r"\\(degree|varnothing)(?![A-Za-z])")
_DELIMITED = re.compile(
    r"\$\$(?P<a>.+?)\$\$|\\\[(?P<b>.+?)\\\]|\\\((?P<c>.+?)\\\)"
    r"|(?<!\\)\$(?P<d>(?:\\.|[^$\\])+)(?<!\\)\$",
    re.DOTALL,
)
_DRESS = re.compile(
    r"\\(?:text(?:bf|it|rm|normal|tt|sf|up)?|mbox|hbox|math(?:rm|bf|it|sf|bb)|bm|boldsymbol|emph"
    r"|operatorname|underline|boxed|fbox)\s*\{([^{}]*)\}"
)
_FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
_SPACES = re.compile(r"\\(?:[,;:!> ]|q?quad|[tn]?space)|~|\\\\")
_SIZES = re.compile(
    r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|rm|bf|tiny|small"
    r"|[lL]arge|LARGE|[hH]uge)(?![A-Za-z])"
)
_PLAIN = [
    (re.compile(r"\{([,.:])\}"), r"\1"),
    (re.compile(r",\\!"), ","),
    (re.compile(r"\\(?:times|cdot|ast)(?![A-Za-z])"), " * "),
    (re.compile(r"\\div(?![A-Za-z])"), " / "),
    (re.compile(r"\\(?:approx|equiv|simeq)(?![A-Za-z])"), "="),
    (re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![A-Za-z])"), " degrees "),
    (re.compile(r"\\(?=[%$#&])"), ""),
    (re.compile(r"(?<=[0-9)])\s*[xX]\s*(?=[0-9$(])"), " * "),
]


def tidy(latex: str) -> str:
    r"""Take off emphasis, colour, lines and boxes, and write Unicode's signs as LaTeX's.

    Args:
        latex: an answer.

    Returns:
        The same mathematics.
    """
    # Single spaces also keep the patterns of this package from trying many ways to share them out.
    text = _MARKS.sub("", " ".join(latex.translate(_CHARACTERS).split()))
    text = _TEXT_SIGN.sub("-", text)
    text = _SYNONYM.sub(lambda command: _SYNONYMS[command[1]], text)
    if _COLOUR.search(text):
        text = _COLOUR.sub("", text)
        text = _LONE.sub(r"\1", text) if text.strip()[:1] == "{" else text
    for _ in range(4):
        text, changes = _LINE.subn(r"\1", text)
        if not changes:
            break
    return text.strip()


def formulas(text: str) -> list[re.Match[str]]:
    r"""Return the formulas of a text: what $, $$, \( and \[ enclose."""
    return list(_DELIMITED.finditer(text))


def inside(formula: re.Match[str]) -> str:
    """Return what the signs around a formula of `formulas` enclose."""
    return next(part for part in formula.groups() if part is not None).strip()


def plain_text(latex: str) -> str:
    r"""Write an answer without LaTeX: "\text{18 eggs}" as "18 eggs", "\frac{1}{2}" as "1/2".

    Args:
        latex: an answer in words, numbers and LaTeX.

    Returns:
        Plain text without dollar signs; commands that are not known stay.
    """
    text = _SIZES.sub(" ", tidy(latex))
    for pattern, plain in _PLAIN:
        text = pattern.sub(plain, text)
    text = _SPACES.sub(" ", text)
    for _ in range(4):
        text, dressed = _DRESS.subn(r"\1", text)
        text, broken = _FRACTION.subn(_slash, text)
        if not dressed + broken:
            break
    return " ".join(re.sub(r"-\s*\$\s*", "-", text).replace("$", " ").split())


def _slash(fraction: re.Match[str]) -> str:
    parts = (fraction[1] or fraction[2] or "", fraction[3] or fraction[4] or "")
    return " " + "/".join(
        part.strip() if re.fullmatch(r"\s*-?[\w.,]+\s*", part) else f"({part})" for part in parts
    )
