"""Recipes: files of command-line flags. ``--recipe NAME`` stands for the flags in its file.

There is no second configuration language. A recipe holds ordinary flags, any number to a line, and
comments from ``#`` on; it may name other recipes. Where a flag is given twice the later one holds:
a recipe's flags come in its place, so that what follows ``--recipe`` on the command line wins.

``--defaults NAME`` in a recipe stands for the flags of another one that hold where nobody says
anything else: they come before all others, wherever they are named. What several recipes assume and
another kind of recipe decides (the layout of an 8B model, which a mixture's recipe changes) is
named so: then recipes of different kinds may be given in any order.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

from megatron_espo.errors import UserError

RECIPES = Path(__file__).resolve().parent


def expand_recipes(argv: Sequence[str]) -> list[str]:
    """Put the flags of recipes in the place of ``--recipe NAME``, and those of defaults in front.

    Args:
        argv: command-line arguments without the program name.

    Returns:
        The arguments; ``--recipe`` and ``--defaults`` are gone.

    Raises:
        UserError: naming the recipe or its file and line.
    """
    defaults, flags = _expand(argv, ())
    return defaults + flags


def _expand(argv: Sequence[str], parents: tuple[Path, ...]) -> tuple[list[str], list[str]]:
    """Expand arguments; ``parents`` are the files that led here. Defaults, and other flags."""
    defaults: list[str] = []
    flags: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if flag not in ("--recipe", "--defaults"):
            flags.append(argument)
            continue
        name = value if equals else next(arguments, "")
        path = find_recipe(name, flag)
        if path in parents:
            raise UserError(f"{flag} {name}: {path} names itself; take it out.")
        assumed, said = _expand(read_flags(path), (*parents, path))
        defaults += assumed
        (flags if flag == "--recipe" else defaults).extend(said)
    return defaults, flags


def find_recipe(name: str, flag: str = "--recipe") -> Path:
    """Find a recipe's file.

    Args:
        name: name of a recipe that comes with the project, or path of a file.
        flag: what named it.

    Returns:
        The file.

    Raises:
        UserError: There is none.
    """
    for path in (RECIPES / f"{name}.flags", Path(name)):
        if name and path.is_file():
            return path.resolve()
    known = ", ".join(sorted(path.stem for path in RECIPES.glob("*.flags")))
    raise UserError(f"{flag} {name}: no such recipe or file; choose a file or one of {known}.")


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
