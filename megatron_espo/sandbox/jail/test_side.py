"""Runs tests, calling the code in its own jail; here the verdicts are made."""

import builtins
import importlib
import json
import os
import socket
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from channel import MAX_MESSAGE, receive, send
from limits import lock_in
from values import decode, encode

del sys.path[0]

# Exceptions that would end a loop or an iteration of the test quietly.
_NEVER_RAISED = ("StopIteration", "StopAsyncIteration", "GeneratorExit", "KeyboardInterrupt",
                 "SystemExit", "BaseException", "BaseExceptionGroup")  # fmt: skip


def main(code_fd: int, control_fd: int, settings: dict[str, Any]) -> None:
    """Run tests in order and report each.

    Args:
        code_fd: file descriptor of the socket to the code.
        control_fd: file descriptor of the socket to whoever asks.
        settings: see limits.lock_in.
    """
    lock_in(settings)
    sys.path.extend(settings["path"])
    code, control = socket.socket(fileno=code_fd), socket.socket(fileno=control_fd)
    job = receive(control)
    if job is None:
        return
    hello = receive(code, MAX_MESSAGE)
    names = hello.get("names") if hello else None
    if not isinstance(names, dict):
        send(control, {"loaded": False})
        return
    send(control, {"loaded": True})
    for number in range(job["first"], len(job["tests"])):
        try:
            send(code, {"test": number})
            passed = run_test(job["tests"][number], names, Code(code))
        except (OSError, EOFError):
            return  # the code's process is gone: whoever asks starts another for the rest
        send(control, {"test": number, "passed": passed})


def run_test(test: str, names: dict[str, str], code: "Code") -> bool:
    """Run one test.

    Args:
        test: source, usually an assertion.
        names: what the code defines, and what it is.
        code: the code.

    Returns:
        Whether it ended without an exception.

    Raises:
        EOFError: the code's process is gone.
    """
    try:
        program = compile(test, "<test>", "exec")
        exec(program, _namespace(program, names, code))
        passed = True
    except EOFError:
        raise
    except BaseException:
        passed = False
    return code.end() and passed


def _namespace(program: types.CodeType, names: dict[str, str], code: "Code") -> dict[str, Any]:
    """Give a test the names it uses that the code defines, and nothing it could be misled by."""
    used = _names_of(program)
    unknown = {name for name in used if not hasattr(builtins, name)}
    namespace: dict[str, Any] = {"__name__": "tests"}
    own = any(names.get(name) in ("function", "class") for name in unknown)
    for name in used:
        kind = names.get(name)
        # A built-in's name is the code's only where a test uses nothing else of the code.
        if kind is None or (name not in unknown and own) or name.startswith("__"):
            continue
        if kind == "module":
            if name in sys.stdlib_module_names:
                namespace[name] = importlib.import_module(name)
        elif kind == "value":
            namespace[name] = code.value(name)
        else:
            namespace[name] = Remote(code, {"name": name})
    return namespace


def _names_of(program: types.CodeType) -> set[str]:
    found = set(program.co_names)
    for constant in program.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _names_of(constant)
    return found


class Remote:
    """A function or class of the code, or a method of an object it made."""

    def __init__(self, code: "Code", target: dict[str, Any]) -> None:
        self._code, self._target = code, target

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it in the code's jail."""
        return self._code.call(self._target, args, kwargs)


class RemoteObject:
    """An object of one of the code's classes: methods, attributes, ``len`` and ``str``.

    Comparison is not passed on: an object could say that it equals everything.
    """

    def __init__(self, code: "Code", number: int) -> None:
        self._code, self._number = code, number

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        target = {"object": self._number, "name": name}
        try:
            return self._code.ask({**target, "want": "value"}, ())
        except Unplain:
            return Remote(self._code, target)

    def __len__(self) -> int:
        return int(self._code.call({"object": self._number, "name": "__len__"}, (), {}))

    def __str__(self) -> str:
        return str(self._code.call({"object": self._number, "name": "__str__"}, (), {}))


class Unplain(ValueError):
    """What was asked for is no plain value."""


class Code:
    """The other jail, seen from here. Whatever it says is data; malformed data fails the test."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._callbacks: list[Callable[..., Any]] = []
        self._ended = self._malformed = False

    def value(self, name: str) -> Any:
        """Return a plain global of the code."""
        return self.ask({"name": name, "want": "value"}, ())

    def call(self, target: dict[str, Any], args: Any, kwargs: Any) -> Any:
        """Call a function of the code."""
        message = {
            **target,
            "want": "call",
            "args": [encode(value, self._foreign) for value in args],
            "kwargs": {name: encode(value, self._foreign) for name, value in kwargs.items()},
        }
        return self.ask(message, args)

    def ask(self, message: dict[str, Any], args: Any) -> Any:
        """Send a request and wait for its answer, serving calls back meanwhile."""
        if self._ended:
            raise RuntimeError("the code has ended")
        send(self._connection, message)
        while True:
            with self._well_formed():
                answer = receive(self._connection, MAX_MESSAGE)
            if answer is None:
                raise EOFError
            if "callback" not in answer:
                break
            with self._well_formed():
                function = self._callbacks[answer["callback"]]
                values = [decode(value) for value in answer["args"]]
            result = function(*values)
            send(self._connection, {"value": encode(result, self._foreign)})
        if "gone" in answer:
            self._ended = True
            raise RuntimeError("the code has ended")
        if "raised" in answer:
            raise self._exception(answer, message)
        with self._well_formed():
            if "object" in answer:
                return RemoteObject(self, int(answer["object"]))
            for place, value in answer.get("changed", {}).items():
                _replace(args[int(place)], decode(value))
            return decode(answer["value"])

    @contextmanager
    def _well_formed(self) -> Iterator[None]:
        """Fail the test if the code's words make no sense, whatever exceptions the test catches."""
        try:
            yield
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            self._malformed = True
            raise RuntimeError("the code's answer is malformed") from error

    def end(self) -> bool:
        """End a test; returns False if the code's process had ended before or spoke nonsense."""
        if self._ended:
            return False
        send(self._connection, {"end": True})
        try:
            while (answer := receive(self._connection, MAX_MESSAGE)) is not None:
                if "gone" in answer:
                    return not self._malformed
        except ValueError as error:
            raise EOFError from error
        raise EOFError

    def _foreign(self, value: Any) -> Any:
        if isinstance(value, RemoteObject):
            return ["object", value._number]
        if isinstance(value, Remote) and "object" not in value._target:
            return ["function", value._target["name"]]
        if callable(value):
            self._callbacks.append(value)
            return ["callback", len(self._callbacks) - 1]
        raise ValueError(f"a {type(value).__name__} cannot be passed to the code")

    @staticmethod
    def _exception(answer: dict[str, Any], message: dict[str, Any]) -> BaseException:
        name, text = str(answer["raised"]), str(answer.get("text", ""))
        if message["want"] == "value" and name == "ValueError":
            return Unplain(text)
        kind = getattr(builtins, name, None)
        if not (isinstance(kind, type) and issubclass(kind, Exception)) or name in _NEVER_RAISED:
            return RuntimeError(f"the code raised {name}: {text}")
        try:
            return kind(text)
        except TypeError:
            return RuntimeError(f"the code raised {name}: {text}")


def _replace(old: Any, new: Any) -> None:
    """Give a container the content that the code left in it."""
    if type(old) is not type(new):
        return
    if isinstance(old, list):
        old[:] = new
    elif isinstance(old, dict | set):
        old.clear()
        old.update(new)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))
