"""Runs generated code and answers calls of its functions; knows nothing of the tests."""

import json
import os
import socket
import sys
import types
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from channel import MAX_MESSAGE, receive, send
from limits import lock_in
from values import decode, encode

del sys.path[0]


def main(fd: int, settings: dict[str, Any]) -> None:
    """Load the code, then serve each test in a copy of this process, so that none sees another's.

    Args:
        fd: file descriptor of the socket to the tests.
        settings: see limits.lock_in; "path" lists folders to import from.
    """
    lock_in(settings)
    sys.path.extend(settings["path"])
    connection = socket.socket(fileno=fd)
    setup = receive(connection)
    if setup is None:
        return
    namespace: dict[str, Any] = {"__name__": "solution"}
    sys.modules["solution"] = module = types.ModuleType("solution")
    module.__dict__.update(namespace)
    namespace = module.__dict__
    for source in setup["sources"]:
        try:
            exec(compile(source, "<solution>", "exec"), namespace)
        except BaseException as error:
            send(connection, {"failed": type(error).__name__})
            return
    send(connection, {"names": {name: _kind(value) for name, value in namespace.items()}})
    while receive(connection, MAX_MESSAGE) is not None:
        child = os.fork()
        if child == 0:
            try:
                _Server(connection, namespace).serve()
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        send(connection, {"gone": True})


def _kind(value: object) -> str:
    if isinstance(value, type):
        return "class"
    if isinstance(value, types.ModuleType):
        return "module"
    return "function" if callable(value) else "value"


class _Server:
    """Answers the calls of one test."""

    def __init__(self, connection: socket.socket, namespace: dict[str, Any]) -> None:
        self.connection, self.namespace = connection, namespace
        self.objects: list[Any] = []

    def serve(self) -> None:
        """Answer until the test ends."""
        self._next_result()

    def _next_result(self) -> dict[str, Any] | None:
        """Answer until the test says what a function of its own returned; None when it ends."""
        while (message := receive(self.connection, MAX_MESSAGE)) is not None:
            if "end" in message:
                return None
            if "value" in message:
                return message
            try:
                answer = self._answer(message)
            except BaseException as error:
                answer = _raised(error)
            send(self.connection, answer)
        return None

    def _answer(self, message: dict[str, Any]) -> dict[str, Any]:
        target, args, kwargs = self._target(message), [], {}
        if message["want"] == "value":
            return {"value": encode(target)}
        args = [decode(value, self._foreign) for value in message["args"]]
        kwargs = {name: decode(value, self._foreign) for name, value in message["kwargs"].items()}
        result = target(*args, **kwargs)
        if isinstance(target, type) and target.__module__ == "solution":
            self.objects.append(result)
            return {"object": len(self.objects) - 1}
        changed = {}
        for place, value in enumerate(args):
            if type(value) in (list, dict, set) and place < 16:
                now = encode(value, _opaque)
                if now != message["args"][place]:
                    changed[str(place)] = now
        return {"value": encode(result), "changed": changed}

    def _target(self, message: dict[str, Any]) -> Any:
        if "object" in message:
            return getattr(self.objects[message["object"]], message["name"])
        return self.namespace[message["name"]]

    def _foreign(self, kind: str, content: Any) -> Any:
        if kind == "object":
            return self.objects[content]
        if kind == "function":
            return self.namespace[content]

        def call_back(*args: Any) -> Any:
            send(self.connection, {"callback": content, "args": [encode(a) for a in args]})
            answer = self._next_result()
            if answer is None:  # it raised, which ended the call or the test
                os._exit(0)
            return decode(answer["value"], self._foreign)

        return call_back


def _opaque(value: object) -> list[str]:
    return ["opaque", type(value).__name__]


def _raised(error: BaseException) -> dict[str, Any]:
    """Name the built-in exception that an exception is, for a test that expects one."""
    names = [c.__name__ for c in type(error).__mro__ if c.__module__ == "builtins"]
    try:
        text = str(error)[:1000]
    except BaseException:
        text = ""
    return {"raised": names[0], "text": text}


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(sys.argv[2]))
