"""Runs generated code, and evaluates for the judge what needs it; nothing of it is trusted."""

import builtins
import json
import operator
import os
import signal
import socket
import sys
import tempfile
import types
from collections.abc import Callable
from typing import Any

from .channel import MAX_MESSAGE, receive, send, send_text
from .folders import clear_folder
from .values import NotPlainError, decode, encode

_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "Eq": lambda a, b: bool(a == b), "NotEq": lambda a, b: bool(a != b),
    "In": lambda a, b: bool(a in b), "NotIn": lambda a, b: bool(a not in b),
    "Add": operator.add, "Sub": operator.sub, "Mult": operator.mul, "Div": operator.truediv,
    "FloorDiv": operator.floordiv, "Mod": operator.mod, "Pow": operator.pow,
    "LShift": operator.lshift, "RShift": operator.rshift, "BitOr": operator.or_,
    "BitXor": operator.xor, "BitAnd": operator.and_, "MatMult": operator.matmul,
}  # fmt: skip


def serve(connection: socket.socket) -> None:
    """Load the code, then serve each test in a copy of this process, so that none sees another's.

    Args:
        connection: to the judge; this process is locked in already.
    """
    setup = receive(connection)
    if setup is None:
        return
    # As deep as where Python runs a program of its own.
    sys.setrecursionlimit(sys.getrecursionlimit() + _depth())
    if setup["programs"]:
        send(connection, {"names": {}})
    else:
        module = _module("solution")
        for source in setup["sources"]:
            try:
                exec(compile(source, "<solution>", "exec"), module.__dict__)
            except BaseException as error:
                send(connection, {"failed": type(error).__name__})
                return
        send(connection, {"names": {n: _kind(value) for n, value in module.__dict__.items()}})
    kept = {folder: os.listdir(folder) for folder in _folders()}
    while (message := receive(connection, MAX_MESSAGE)) is not None:
        if "program" in message:
            answer = _run_program(setup["sources"], message["program"])
        else:
            _in_a_copy(lambda: _Server(connection, module.__dict__).serve())
            answer = {"gone": True}
        for folder, names in kept.items():
            clear_folder(folder, names)
        send(connection, answer)


def _folders() -> list[str]:
    """Return the folders that code may write to and nobody else does."""
    own = [os.getcwd(), os.environ["TMPDIR"], *(["/dev/shm"] if os.getpid() == 1 else [])]
    return list(dict.fromkeys(own))


def _module(name: str) -> types.ModuleType:
    sys.modules[name] = module = types.ModuleType(name)
    return module


def _depth() -> int:
    depth, frame = 0, sys._getframe()
    while frame.f_back is not None:
        depth, frame = depth + 1, frame.f_back
    return depth + 2


def _kind(value: object) -> str:
    return f"module {value.__name__}" if isinstance(value, types.ModuleType) else "other"


def _in_a_copy(work: Callable[[], None]) -> int:
    """Work in a fork; returns its exit status when it and all that it has started are gone."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.getpid() == 1:  # of a namespace of its own
        try:
            os.kill(-1, signal.SIGKILL)
        except ProcessLookupError:
            return status
    try:
        while os.waitpid(-1, 0 if os.getpid() == 1 else os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
    return status


def _run_program(sources: list[str], text: str) -> dict[str, Any]:
    """Run sources as a program with some input; returns what it printed and its exit status."""
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as printed:
        given.write(text.encode(errors="surrogatepass"))
        given.seek(0)

        def work() -> None:
            os.dup2(given.fileno(), 0)
            os.dup2(printed.fileno(), 1)
            sys.stdin = open(0, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
            sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
            os._exit(_main(sources))

        status = _in_a_copy(work)
        printed.seek(0)
        return {"printed": printed.read().decode(errors="replace"), "status": status}


def _main(sources: list[str]) -> int:
    module = _module("__main__")
    try:
        for source in sources:
            exec(compile(source, "<solution>", "exec"), module.__dict__)
    except SystemExit as leaving:
        status = 0 if leaving.code in (None, 0) else 1
    except BaseException:
        status = 1
    else:
        status = 0
    try:
        sys.stdout.flush()
    except BaseException:
        status = 1
    return status


class _Server:
    """Evaluates for one test, in the names of the code and the test."""

    def __init__(self, connection: socket.socket, space: dict[str, Any]) -> None:
        self._connection, self._space = connection, space
        self._compiled: dict[tuple[str, str], types.CodeType] = {}
        self._closures: list[tuple[Callable[..., Any], ...]] = []
        self._contexts: list[Any] = []
        self._error: BaseException = AssertionError()

    def serve(self) -> None:
        """Answer until the test ends."""
        self._space["__check__"] = self._check
        self._answer_requests()

    def _answer_requests(self) -> dict[str, Any]:
        """Answer until the judge has judged an assert; ends with the test."""
        while (message := receive(self._connection, MAX_MESSAGE)) is not None:
            if "go" in message:
                return message
            if "end" in message:
                break
            try:
                answer = json.dumps(self._answer(message))
                if len(answer) >= MAX_MESSAGE:
                    answer = '{"live": true}'
            except BaseException as error:
                self._error = error
                answer = '{"raised": true}'
            send_text(self._connection, answer)
        os._exit(0)

    def _answer(self, message: dict[str, Any]) -> dict[str, Any]:
        what = message["do"]
        if what == "leave":
            return {"value": self._leave(message["error"])}
        for name, value in message["env"].items():
            self._space[name] = decode(value)
        if what == "run":
            exec(self._code(message["source"], "exec"), self._space)
            return {"value": None}
        if what == "matches":
            found = isinstance(self._error, self._value(message))
            if found and message["name"]:
                self._space[message["name"]] = self._error
            return {"value": found}
        value = self._value(message)
        if what == "enter":
            self._enter(value, message["target"])
            return {"value": None}
        if what == "truth":
            return {"value": bool(value)}
        if what == "line_up":
            return {"answers": [self._combined(message, value, c) for c in message["candidates"]]}
        return _told(value)

    def _value(self, message: dict[str, Any]) -> Any:
        args = {name: decode(value) for name, value in message.get("args", {}).items()}
        if "closure" in message:
            return self._closures[-1][message["closure"]](**args)
        value = eval(self._code(message["source"], "eval"), self._space)
        return value(**args) if "args" in message else value

    def _code(self, source: str, mode: str) -> types.CodeType:
        if (source, mode) not in self._compiled:
            self._compiled[source, mode] = compile(source, "<test>", mode)
        return self._compiled[source, mode]

    def _combined(self, message: dict[str, Any], value: Any, candidate: Any) -> dict[str, Any]:
        pair = (value, decode(candidate))
        try:
            return _told(_OPERATORS[message["operator"]](*pair[:: -1 if message["swapped"] else 1]))
        except Exception as error:
            self._error = error
            return {"raised": True}

    def _enter(self, manager: Any, target: str | None) -> None:
        value = type(manager).__enter__(manager)
        self._contexts.append(manager)
        if target:
            self._space["__value__"] = value
            exec(self._code(f"{target} = __value__", "exec"), self._space)

    def _leave(self, name: str | None) -> bool:
        """Leave a context: without an exception, with the code's own ("") or the judge's."""
        manager = self._contexts.pop()
        if name is None:
            type(manager).__exit__(manager, None, None, None)
            return False
        error = self._error if name == "" else getattr(builtins, name, AssertionError)()
        return bool(type(manager).__exit__(manager, type(error), error, error.__traceback__))

    def _check(self, number: int, *closures: Callable[..., Any]) -> None:
        """Have the judge judge an assert."""
        self._closures.append(closures)
        send(self._connection, {"check": number})
        verdict = self._answer_requests()
        self._closures.pop()
        if verdict.get("raise"):
            raise self._error
        if not verdict["go"]:
            raise AssertionError


def _told(value: Any) -> dict[str, Any]:
    try:
        return {"value": encode(value)}
    except NotPlainError:
        return {"live": True}
