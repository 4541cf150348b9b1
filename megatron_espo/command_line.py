"""Command lines: what cannot be read is refused in one sentence that names the nearest flag."""

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from megatron_espo.errors import UserError

_UNKNOWN = "unrecognized arguments: "
# What a word must share with a flag to be taken for it.
_LIKE = 0.6


class Parser(argparse.ArgumentParser):
    """A parser whose errors are a UserError; it takes no abbreviations of flags."""

    def __init__(self, **settings: object) -> None:
        settings.setdefault("allow_abbrev", False)
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**settings)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        """Refuse the command line.

        Raises:
            UserError: always.
        """
        refuse(message, flags_of(self))


def flags_of(parser: argparse.ArgumentParser) -> list[str]:
    """List the flags of a parser and of its commands."""
    commands = [
        command
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
        for command in action.choices.values()
    ]
    return [*parser._option_string_actions, *(flag for one in commands for flag in flags_of(one))]


_elsewhere: list[str] = []


def parse_own(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[Any, list[str]]:
    """Parse the flags that a parser knows; the rest is for another one, which knows of these.

    Args:
        parser: a tool's own.
        argv: the command line.

    Returns:
        The values, and what the parser does not know.
    """
    _elsewhere[:] = flags_of(parser)
    return parser.parse_known_args(argv)


def refuse(message: str, known: Iterable[str]) -> NoReturn:
    """Put what argparse says into a sentence.

    Args:
        message: as argparse words it.
        known: all flags.

    Raises:
        UserError: always.
    """
    if not message.startswith(_UNKNOWN):
        raise UserError(f"{message[:1].upper()}{message[1:]}; --help lists the flags.")
    words = message.removeprefix(_UNKNOWN).split()
    flags = [word.partition("=")[0] for word in words if word.startswith("-")]
    if not flags:
        raise UserError(f"{words[0]} belongs to no flag; --help lists the flags.")
    guess = nearest(flags[0], [*_elsewhere, *known])
    wanted = f"did you mean {guess}?" if guess else "--help lists the flags."
    raise UserError(f"{flags[0]} is no flag; {wanted}")


def nearest(flag: str, known: Iterable[str]) -> str | None:
    """Find the flag that somebody may have meant.

    Args:
        flag: a word that is none.
        known: the flags that are.

    Returns:
        The most similar one; None where none is similar.
    """

    def plain(name: str) -> str:
        return name.lower().replace("_", "-").strip("-")

    names: dict[str, str] = {}
    for name in known:
        names.setdefault(plain(name), name)
    found = difflib.get_close_matches(plain(flag), names, 1, _LIKE)
    return names[found[0]] if found else None


def run_tool(main: Callable[[Sequence[str]], int | None]) -> NoReturn:
    """Run a tool that needs no process group, and end with its status.

    A mistake of the user, and a file that cannot be read or written, is one sentence and status 2.

    Args:
        main: gets the command line without the program name; returns the status, None for 0.
    """
    sys.exit(status_of(main, sys.argv[1:]))


def status_of(main: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> int:
    """Run a tool; see :func:`run_tool`.

    Args:
        main: the tool.
        argv: its command line without the program name.

    Returns:
        The status to end with.
    """
    try:
        status = main(argv) or 0
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except BrokenPipeError:
        # Who read the output has enough of it; the interpreter must not try to write the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}.", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130
    return status
