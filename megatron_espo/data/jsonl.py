"""Text and JSONL files, read with errors that name the file and the line."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_espo.errors import UserError
from megatron_espo.json_lines import load_object


def read_text(path: str | Path) -> str:
    """Read a whole UTF-8 file, line ends untouched.

    Args:
        path: the file.

    Returns:
        Its text.

    Raises:
        UserError: the file cannot be read or is not UTF-8.
    """
    try:
        return Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); correct the path") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: byte {error.start} is not UTF-8; convert the file to UTF-8 or leave it out"
        ) from error


def read_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file that are not blank.

    Args:
        path: the file.

    Yields:
        The line number, from 1 and counting blank lines, and the raw line.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); correct the path") from error


def parse_line(path: str | Path, number: int, line: bytes) -> dict[str, Any]:
    """Parse one line of a JSONL file.

    Args:
        path: the file, for the error.
        number: the line number, for the error.
        line: the raw line, UTF-8.

    Returns:
        The JSON object.

    Raises:
        UserError: the line is not a JSON object in UTF-8.
    """
    try:
        return load_object(line)
    except UserError as error:
        raise UserError(f"{path}:{number}: {error}") from error


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the objects of a JSONL file; blank lines are passed over.

    Args:
        path: the file, UTF-8.

    Yields:
        The line number, from 1, and the JSON object.

    Raises:
        UserError: the file is missing or has no line, or a line is not a JSON object.
    """
    empty = True
    for number, line in read_lines(path):
        empty = False
        yield number, parse_line(path, number, line)
    if empty:
        raise UserError(f"{path}:1: the file is empty; write one JSON object a line")
