"""What a docstring says of an argument is more than its name."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "megatron_espo"
# Rooms that have not been looked through yet.
LEFT = {"rl", "passes", "model", "conversion", "plan", "generation"}
EMPTY = {"the", "a", "an", "of", "its", "this", "that"}


def stems(text: str) -> set[str]:
    words = re.findall(r"[a-z]+", text.lower().replace("_", " "))
    return {word.removesuffix("s") for word in words if word not in EMPTY}


def says_nothing(name: str, text: str) -> bool:
    return stems(text) <= stems(name)


def described(source: str) -> list[tuple[str, str]]:
    """List what the docstrings of a file say of arguments and attributes."""
    nodes = [
        n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.ClassDef)
    ]
    item = re.compile(r"^    \*{0,2}(\w+): (.*?)(?=^    \S|^\S|\Z)", re.M | re.S)
    return [found for node in nodes for found in item.findall(ast.get_docstring(node) or "")]


@pytest.mark.parametrize(
    "path",
    [p for p in sorted(PACKAGE.rglob("*.py")) if p.relative_to(PACKAGE).parts[0] not in LEFT],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_arguments_are_explained(path: Path) -> None:
    bare = [
        f"{n}: {t.strip()}" for n, t in described(path.read_text("utf-8")) if says_nothing(n, t)
    ]
    assert not bare, "say what it is for, what it holds, or what it must be"


def test_bare_ones_are_told_from_others() -> None:
    source = (
        'def f(model, ids):\n    """Do.\n\n    Args:\n        model: the model.\n'
        '        mask_token_id: The mask token.\n        ids: int64 ``[b]``.\n    """\n'
    )
    bare = [name for name, text in described(source) if says_nothing(name, text)]
    assert bare == ["model", "mask_token_id"] and len(described(source)) == 3
