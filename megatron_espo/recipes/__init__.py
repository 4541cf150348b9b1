"""Recipes: files of command-line flags. ``--recipe NAME`` stands for the flags in its file.

There is no second configuration language. A recipe holds ordinary flags, any number to a line, and
comments from ``#`` on; it may name other recipes. Where a flag is given twice the later one holds:
a recipe's flags come in its place, so that what follows ``--recipe`` on the command line wins.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

from megatron_espo.errors import UserError

RECIPES = Path(__file__).resolve().parent


def expand_recipes(argv: Sequence[str], parents: tuple[Path, ...] = ()) -> list[str]:
    """Put the flags of recipes in the place of ``--recipe NAME``.

    Args:
        argv: command-line arguments without the program name.
        parents: the files that led here, for recipes that name recipes.

    Returns:
        The arguments; ``--recipe`` is gone.

    Raises:
        UserError: naming the recipe or its file and line.
    """
    expanded: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if flag != "--recipe":
            expanded.append(argument)
            continue
        name = value if equals else next(arguments, "")
        path = find_recipe(name)
        if path in parents:
            raise UserError(f"--recipe {name}: {path} names itself; take it out.")
        expanded += expand_recipes(read_flags(path), (*parents, path))
    return expanded


def find_recipe(name: str) -> Path:
    """Find a recipe's file.

    Args:
        name: name of a recipe that comes with the project, or path of a file.

    Returns:
        The file.

    Raises:
        UserError: There is none.
    """
    for path in (RECIPES / f"{name}.flags", Path(name)):
        if name and path.is_file():
            return path.resolve()
    known = ", ".join(sorted(path.stem for path in RECIPES.glob("*.flags")))
    raise UserError(f"--recipe {name}: no such recipe or file; choose a file or one of {known}.")


def read_flags(path: Path) -> list[str]:
    """Read the arguments in a recipe.

    Args:
        path: the file.

    Returns:
        The arguments in order.

    Raises:
        UserError: naming the line.
    """
    flags: list[str] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}; mend the quotes.") from error
        if words and not words[0].startswith("-"):
            raise UserError(f"{path}, line {number}: {words[0]} is no flag; start with --.")
        flags += words
    return flags


def last_value(argv: Sequence[str], flag: str) -> str | None:
    """Look up the value that holds for a flag.

    Args:
        argv: arguments.
        flag: the flag, with its dashes.

    Returns:
        The value of its last appearance, or None.
    """
    value = None
    for place, argument in enumerate(argv):
        name, equals, given = argument.partition("=")
        if name == flag:
            value = given if equals else next(iter(argv[place + 1 : place + 2]), None)
    return value
