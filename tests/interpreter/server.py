"""``python server.py SOCKET OWNER``: imports what tests' processes import, and forks them.

A connection belongs to one fork. It brings the request, then a byte per signal; its end, however it
comes about, ends the fork. The answer is the fork's status, as wait() gives it.
"""

import atexit
import contextlib
import gc
import json
import os
import resource
import runpy
import selectors
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import torch
import torch._dynamo
import torch.distributed.run
import torch.utils.tensorboard
import transformers.models.llama.modeling_llama
import transformers.models.qwen2.modeling_qwen2  # noqa: F401

import megatron_espo.commands.evaluate
import megatron_espo.commands.generate
import megatron_espo.commands.launch
import megatron_espo.conversion.convert
import megatron_espo.monitor.pictures
import megatron_espo.training.espo
import megatron_espo.training.pretrain  # noqa: F401


def _receive(connection: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """Read a request, and take its files; no request where the one who asks has been killed."""
    head, files, body = b"", [], b""
    with contextlib.suppress(OSError):
        head, files, _, _ = socket.recv_fds(connection, 4, 3)
        while part := connection.recv(int.from_bytes(head, "big") - len(body)):
            body += part
    is_whole = len(head) == 4 and len(body) == int.from_bytes(head, "big")
    return json.loads(body) if is_whole else None, files


class Server:
    """Forks for every request until another process ends.

    Args:
        path: the socket's.
        owner: the other process.
    """

    def __init__(self, path: str, owner: int) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(path)
        self._listener.listen(64)
        self._forks: dict[int, socket.socket] = {}
        self._waiting = selectors.DefaultSelector()
        self._waiting.register(self._listener, selectors.EVENT_READ, self._accept)
        self._waiting.register(os.pidfd_open(owner), selectors.EVENT_READ, None)

    def serve(self) -> dict[str, Any] | None:
        """Wait for what comes.

        Returns:
            In a fork, the request; in the server, at its end, None.
        """
        while True:
            for key, _ in self._waiting.select():
                if key.data is None:
                    for process in self._forks:
                        os.kill(process, signal.SIGKILL)
                    return None
                request = key.data()
                if request is not None:
                    return request

    def _accept(self) -> dict[str, Any] | None:
        connection, _ = self._listener.accept()
        request, files = _receive(connection)
        if request is None:
            for file in files:
                os.close(file)
            connection.close()
            return None
        process = os.fork()
        if process == 0:
            os.setsid()
            for number, file in enumerate(files):
                os.dup2(file, number)
                os.close(file)
            self._waiting.close()
            for other in (self._listener, connection, *self._forks.values()):
                other.close()
            return request
        for file in files:
            os.close(file)
        self._forks[process] = connection
        handle = os.pidfd_open(process)
        self._watch(handle, partial(self._answer, process, handle))
        self._watch(connection, partial(self._pass_on, process, connection))
        return None

    def _watch(self, file: int | socket.socket, action: Callable[[], None]) -> None:
        self._waiting.register(file, selectors.EVENT_READ, action)

    def _pass_on(self, process: int, connection: socket.socket) -> None:
        """Give signals to a fork; end it where the one who asked for it is gone."""
        if process not in self._forks:
            return  # it has ended in the same moment
        signals = b""
        with contextlib.suppress(OSError):
            signals = connection.recv(16)
        if not signals:
            self._waiting.unregister(connection)
            signals = bytes([signal.SIGKILL])
        for number in signals:
            os.kill(process, number)

    def _answer(self, process: int, handle: int) -> None:
        """Say how a fork ended."""
        _, status = os.waitpid(process, 0)
        self._waiting.unregister(handle)
        os.close(handle)
        connection = self._forks.pop(process)
        if connection in self._waiting.get_map():
            self._waiting.unregister(connection)
        with contextlib.suppress(OSError):
            connection.sendall(status.to_bytes(4, "big"))
        connection.close()


def run(request: dict[str, Any]) -> None:
    """Do as Python does with a module or a script, its arguments, directory and environment."""
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environment"])
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    for kind, limits in request["limits"]:
        resource.setrlimit(kind, limits)
    arguments = request["arguments"]
    sys.orig_argv = [sys.executable, *arguments]
    while (word := arguments[0]) in ("-u", "-W"):
        if word == "-u":
            sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
        else:
            arguments = arguments[1:]
            warnings.simplefilter(arguments[0])  # type: ignore[arg-type]
        arguments = arguments[1:]
    module = arguments[1] if arguments[0] == "-m" else None
    script = os.path.abspath(arguments[0])
    sys.path[0] = request["directory"] if module else os.path.dirname(script)
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[1:1] = [path for path in paths if path and path not in sys.path]
    if module:
        sys.argv = arguments[1:]
        # Of what is imported already and runs once more, as it does in Python.
        warnings.filterwarnings("ignore", "'.*' found in sys.modules", RuntimeWarning)
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


def status_of(error: BaseException) -> int:
    """Say what an exception makes of a process, and print what Python prints of it."""
    if not isinstance(error, SystemExit):
        sys.excepthook(type(error), error, error.__traceback__)
        return 1
    if error.code is None or isinstance(error.code, int):
        return error.code or 0
    print(error.code, file=sys.stderr)
    return 1


def end(status: int) -> NoReturn:
    """End as Python does, but for taking every module apart: that is a second of a large process.

    Args:
        status: the process's.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status & 255)


def main() -> None:
    """Serve; in a fork, run what was asked for."""
    # What is here now is never collected: the forks share its memory.
    gc.collect()
    gc.freeze()
    asked = Server(sys.argv[1], int(sys.argv[2])).serve()
    if asked is None:
        return
    status = 0
    try:
        run(asked)
    except BaseException as error:
        status = status_of(error)
    # Here what the exception's frames held is gone, such as workers that load data.
    end(status)


if __name__ == "__main__":
    main()
