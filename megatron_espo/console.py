"""What a run shows, and what it only keeps: its own lines on the console, everything in a log.

Megatron prints its arguments and every step of its start-up, a thousand lines before the first
number. Inside :func:`captured` they go into a file of the run's folder; the console gets what
:func:`say` is given, lines of others that a filter lets through, and whatever ends the run.
"""

import contextlib
import io
import logging
import os
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from megatron_espo.errors import UserError

Filter = Callable[[str], str | None]
"""A line that was printed -> what the console shows of it, or None."""


def own_lines(line: str) -> str | None:
    """Let a warning or an error of this project through."""
    return line if line.startswith(("warning: ", "error: ")) else None


class Output:
    """Stands between what is printed and the console.

    Args:
        shown: filter of the lines that others print.
        aside: put what is shown on the standard error: a tool's result alone is printed.
    """

    def __init__(self, shown: Filter, aside: bool) -> None:
        self._shown, self._aside = shown, aside
        self.console, self.errors = sys.stdout, sys.stderr
        # Lines that came before it was decided where they go, and whether each was shown.
        self._held: list[tuple[str, bool]] = []
        self._log: TextIO | None = None
        self._verbose = False
        self.is_settled = False

    def settle(self, log: Path | None, command: Sequence[str], verbose: bool) -> None:
        """Decide where everything goes; until then it is held.

        Args:
            log: file to append to, or None where nothing is kept.
            command: the command line, for the log's first line.
            verbose: show everything on the console, too.

        Raises:
            UserError: The file cannot be written.
        """
        if log is not None:
            try:
                log.parent.mkdir(parents=True, exist_ok=True)
                self._log = log.open("a", encoding="utf-8", errors="replace")
            except OSError as error:
                raise UserError(f"{log}: cannot be written ({error.strerror}).") from error
            when = time.strftime("%Y-%m-%d %H:%M:%S")
            self._log.write(f"\n=== {when}: {shlex.join(command)}\n")
        self._verbose, self.is_settled = verbose, True
        held, self._held = self._held, []
        for line, was_shown in held:
            self._keep(line, was_shown)
            if verbose and not was_shown:
                self._show(line)

    def take(self, line: str) -> None:
        """Take a line that somebody printed."""
        shown = line if self._verbose else self._shown(line)
        self._keep(line, shown is not None)
        if shown is not None:
            self._show(shown)

    def filter_by(self, shown: Filter) -> None:
        """Let another filter decide about the lines that come."""
        self._shown = shown

    def say(self, line: str) -> None:
        """Take a line for the console."""
        self._keep(line, True)
        self._show(line)

    def _keep(self, line: str, was_shown: bool) -> None:
        if not self.is_settled:
            self._held.append((line, was_shown))
        elif self._log is not None:
            self._log.write(line + "\n")
            self._log.flush()

    def _show(self, line: str) -> None:
        print(line, file=self.errors if self._aside else self.console, flush=True)

    def close(self, failure: BaseException | None) -> None:
        """End; what was held is shown where the program has failed before it was decided."""
        if failure is not None and not isinstance(failure, UserError | SystemExit):
            text = "".join(traceback.format_exception(failure))
            if self._log is not None:
                self._log.write(text)
            for line, was_shown in self._held:
                if not was_shown:
                    print(line, file=self.errors, flush=True)
        if self._log is not None:
            self._log.close()


class _Lines(io.TextIOBase):
    """A text file whose lines an output takes.

    Args:
        output: gets each line when it is whole.
        instead_of: the stream that it stands for.
    """

    def __init__(self, output: Output, instead_of: TextIO) -> None:
        self._output, self._stream, self._rest = output, instead_of, ""

    def write(self, text: str) -> int:
        """Write text; the last line waits for its end."""
        # A line that was drawn over counts as its last state, as it does on a screen.
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._output.take(line.rstrip("\r").rpartition("\r")[2])
        return len(text)

    def finish(self) -> None:
        """Write the last line where it has no end."""
        if self._rest:
            self.write("\n")

    def writable(self) -> bool:
        """Text can be written."""
        return True

    def fileno(self) -> int:
        """The file that native code and child processes write to."""
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """As of the stream that it stands for."""
        return self._stream.encoding


_current: Output | None = None


@contextlib.contextmanager
def captured(shown: Filter = own_lines, aside: bool = False) -> Iterator[Output]:
    """Take what Python code prints, logs and warns of; a traceback is printed after the end.

    What native code and child processes write is not taken: it is rare, and says how they died.

    Args:
        shown: filter of the lines that the console gets.
        aside: put what is shown on the standard error.

    Yields:
        The output, which holds everything until it is settled.
    """
    global _current
    before, output = _current, Output(shown, aside)
    streams = [_Lines(output, sys.stdout), _Lines(output, sys.stderr)]
    handlers = [(handler, handler.stream) for handler in _handlers()]
    for handler, stream in handlers:
        # Bound to their streams when they were made.
        handler.stream = streams[0 if stream is sys.stdout else 1]
    _current = output
    failure: BaseException | None = None
    try:
        with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
            yield output
    except BaseException as error:
        failure = error
        raise
    finally:
        _current = before
        for handler, stream in handlers:
            handler.stream = stream
        for lines in streams:
            lines.finish()
        output.close(failure)


def _handlers() -> list["logging.StreamHandler[Any]"]:
    return [
        handler
        for handler in logging.getLogger().handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream in (sys.stdout, sys.stderr)
    ]


def say(line: str) -> None:
    """Show a line on the console, whatever is captured, and keep it in the log.

    Args:
        line: without its end.
    """
    if _current is None:
        print(line, flush=True)
    else:
        _current.say(line)


def filter_lines(shown: Filter) -> None:
    """Let another filter decide what the console shows from here on, where anything is captured.

    Args:
        shown: filter of the lines that others print.
    """
    if _current is not None:
        _current.filter_by(shown)


def rank_log(folder: str | os.PathLike[str]) -> Path:
    """Name this rank's log in a run's folder."""
    return Path(folder, "logs", f"rank-{os.environ.get('RANK', '0')}.log")
