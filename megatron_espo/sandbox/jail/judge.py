"""Judges a completion: runs the tests, asking the code's process for what only it can evaluate.

Expected values and comparisons are here and never there. Whatever the other process says is data.
"""

import ast
import builtins
import importlib
import socket

from .border import AgainError, Jail, MalformedError
from .channel import MAX_MESSAGE, receive, send
from .parsed import Parsed
from .split import PURE_MODULES, Split

_MOST_RUNS = 30  # of one test, each of which evaluates more where the code is


def judge(code: socket.socket, control: socket.socket) -> None:
    """Run tests in order and report each.

    Args:
        code: to the code's process.
        control: to whoever asks.
    """
    job = receive(control)
    if job is None:
        return
    try:
        programs = not all(isinstance(test, str) for test in job["tests"])
        send(code, {"sources": job["sources"], "programs": programs})
        hello = receive(code, MAX_MESSAGE)
    except (OSError, ValueError):
        hello = None
    names = hello.get("names") if hello else None
    if not isinstance(names, dict):
        send(control, {"loaded": False})
        return
    send(control, {"loaded": True})
    for number in range(job["first"], len(job["tests"])):
        test = job["tests"][number]
        try:
            if isinstance(test, str):
                passed = run_test(test, names, code)
            else:
                passed = run_program(test, code)
        except (OSError, EOFError, ValueError):
            return  # the code's process is gone: whoever asks starts another for the rest
        send(control, {"test": number, "passed": passed})


def run_program(test: dict[str, str], code: socket.socket) -> bool:
    """Run a whole program with a text as its input; returns whether it printed what it should.

    Args:
        test: "input" and "output".
        code: to the code's process.

    Raises:
        EOFError: the code's process is gone.
        ValueError: what it says is malformed.
    """
    send(code, {"program": test["input"]})
    answer = receive(code, MAX_MESSAGE)
    if answer is None:
        raise EOFError
    printed = answer.get("printed")
    return answer.get("status") == 0 and isinstance(printed, str) and (
        _lines(printed) == _lines(test["output"])
    )  # fmt: skip


def _lines(text: str) -> list[list[str]]:
    """Return a text's words line by line; space around them and empty lines at the end are none."""
    lines = [line.split() for line in text.splitlines()]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def run_test(test: str, names: dict[str, str], code: socket.socket) -> bool:
    """Run one test, as often as it takes to find out what can be told as plain values.

    Args:
        test: its source, usually an assertion.
        names: what the code defines, and what it is.
        code: to the code's process.

    Returns:
        Whether it ended without an exception.

    Raises:
        EOFError: the code's process is gone.
        ValueError: what it says is malformed.
    """
    try:
        parsed = Parsed(test)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    overriding, modules = _meaning(parsed, names)
    for _ in range(_MOST_RUNS):
        split = Split(parsed, overriding, set(modules))
        space = {name: importlib.import_module(module) for name, module in modules.items()}
        jail = Jail(code, split, parsed, space)
        send(code, {"test": True})
        try:
            exec(compile(split.module, "<test>", "exec"), jail.space)
            passed = split.required <= jail.passed
        except AgainError:
            passed = None
        except (EOFError, MalformedError):
            raise
        except BaseException:
            passed = False
        ended = jail.end()
        if passed is not None:
            return passed and ended
    return False


def _meaning(parsed: Parsed, names: dict[str, str]) -> tuple[set[str], dict[str, str]]:
    """Say which of a test's names are not what they seem.

    Args:
        parsed: the test.
        names: what the code defines: "module NAME" for a module, else another word.

    Returns:
        Built-in names that mean what the code defines, because the test uses nothing else of it;
        modules that the test uses as the code has imported them, by their names.
    """
    used = {node.id for node in ast.walk(parsed.tree) if isinstance(node, ast.Name)}
    known = {name: kind for name, kind in names.items() if name in used and "__" not in name}
    modules = {
        name: kind.removeprefix("module ")
        for name, kind in known.items()
        if kind.startswith("module ") and kind.removeprefix("module ") in PURE_MODULES
    }
    built_in = {name for name in known if hasattr(builtins, name)}
    own = set(known) - built_in - set(modules)
    return (set() if own else built_in), modules
