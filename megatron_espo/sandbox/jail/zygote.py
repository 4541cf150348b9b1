"""The warm jail of a worker: forks a judge and a process for the code of each completion.

:func:`main` enters the jail, loads what is needed and then forks, which takes milliseconds where a
start of Python takes tens. It never runs code itself. A completion's process has an own process,
IPC and mount namespace with an empty folder, or at least an own user where this process is root; it
ends with everything that it has started.
"""

import gc
import importlib
import json
import os
import signal
import site
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .code_side import serve
from .folders import remove_folder
from .judge import judge
from .limits import close_to_others, die_with_parent, lock_in, threads_of
from .view import SCRATCH, enter_namespaces, fresh_scratch, mount_processes

# What generated code imports, and tests: a fork has it for nothing.
_PRELOADED = (
    "array ast asyncio base64 bisect calendar cmath collections contextlib copy csv dataclasses "
    "datetime decimal difflib enum fractions functools hashlib heapq inspect io itertools json "
    "keyword math numbers operator pprint queue random re secrets statistics string struct "
    "textwrap threading time traceback types typing unittest.mock uuid zlib encodings.idna"
).split()
# Processes of a jail's that count against its user: two of its own, a judge, and two keepers and
# what they keep while one of them ends.
_OWN = 6
_MESSAGE = 1 << 16
_kept: list[int] = []  # files that stay open in every fork


def main(fd: int, settings: dict[str, Any]) -> None:
    """Serve completions, one at a time, until the other side is gone.

    Args:
        fd: file descriptor of a socket of packets.
        settings: "mode"; "folders" to show; "path", folders to import from.
    """
    for name in _PRELOADED:
        importlib.import_module(name)
    site.setquit()  # exit() and quit(), which Python gives programs
    os.environ.pop("LD_LIBRARY_PATH", None)
    control = socket.socket(fileno=fd)
    try:
        if settings["mode"] == "namespaces":
            enter_namespaces(settings["folders"])
    except OSError as error:
        control.send(json.dumps({"failed": str(error)}).encode())
        return
    sys.path.extend(settings["path"])
    root = os.getuid() == 0
    jail = _Jail(contained=settings["mode"] != "limits", root=root)
    if root and not jail.contained:
        _keep_readable()
    else:
        close_to_others()
    gc.collect()
    gc.freeze()
    control.send(b'{"ready": true}')
    while True:
        data, fds, _, _ = socket.recv_fds(control, _MESSAGE, 8)
        if not data:
            return
        request = json.loads(data)
        if "start" in request:
            jail.start(request["start"], fds)
        if "end" in request:
            jail.end()
        control.send(b"{}")


class _Jail:
    """Where completions run, one after the other.

    Args:
        contained: whether this process may make namespaces.
        root: whether it may change users.
    """

    def __init__(self, *, contained: bool, root: bool) -> None:
        self.contained, self._root = contained, root
        self._judge = self._keeper = self._leaving = self._pipe = 0

    def start(self, limits: dict[str, Any], fds: Sequence[int]) -> None:
        """Start both sides of a completion.

        Args:
            limits: see `lock_in`; "users" are two user ids.
            fds: the code's end, the judge's end, and the judge's end to who asks.
        """
        code_end, judge_end, control_end = fds
        limits["running"] = _OWN if self.contained else threads_of(os.getuid()) + _OWN
        users = limits["users"] if self._root else (0, 0)

        def run_judge() -> None:
            _only(judge_end, control_end)
            die_with_parent()
            lock_in({**limits, "user": users[0], "open": 0})
            judge(socket.socket(fileno=judge_end), socket.socket(fileno=control_end))

        def keep() -> None:
            _only(wait, code_end)
            self._keep(wait, code_end, {**limits, "user": users[1], "open": int(self._root)})

        self._judge = _fork(run_judge)
        wait, self._pipe = os.pipe()
        self._keeper = _fork(keep)
        for fd in (*fds, wait):
            os.close(fd)

    def end(self) -> None:
        """End both sides, with everything that the code has started."""
        if not self._pipe:
            return
        os.close(self._pipe)
        self._pipe = 0
        os.kill(self._judge, signal.SIGKILL)
        os.waitpid(self._judge, 0)
        # A namespace takes its time to go, while the next completion starts already.
        if self._leaving:
            os.waitpid(self._leaving, 0)
        self._leaving = self._keeper

    def _keep(self, wait: int, code_end: int, limits: dict[str, Any]) -> None:
        """Start the code's process, and end it when the other end of a pipe is closed."""
        die_with_parent()
        folder = f"{SCRATCH}/work"
        if self.contained:
            fresh_scratch(limits["file"])
        else:
            folder = tempfile.mkdtemp(prefix="sandbox_")
            os.chown(folder, limits["user"] or -1, limits["user"] or -1)

        def run_code() -> None:
            _only(code_end)
            os.setpgrp()
            if self.contained:
                mount_processes()
            else:
                os.environ["TMPDIR"] = os.environ["HOME"] = folder
            os.chdir(folder)
            lock_in(limits)
            serve(socket.socket(fileno=code_end))

        child = _fork(run_code)
        os.close(code_end)
        os.read(wait, 1)
        for kill in (os.killpg, os.kill):  # the filter keeps its descendants in its process group
            with suppress(ProcessLookupError):
                kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if not self.contained:
            remove_folder(folder)


def _fork(work: Callable[[], None]) -> int:
    """Work in a fork, which ends with it; returns its id."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)
    return child


def _only(*fds: int) -> None:
    """Close every other file but the standard ones and those that stay open."""
    low = 3
    for fd in sorted({*fds, *_kept}):
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, 1024)


def _keep_readable() -> None:
    """Reach folders of Python's that only root may enter through files that stay open.

    ``/proc/self/fd/N`` leads to a folder without a look at those above it.
    """
    moved = {}
    for path in [*sys.path]:
        if os.path.isdir(path) and not all(
            part.stat().st_mode & 0o001 for part in (Path(path), *Path(path).parents)
        ):
            _kept.append(os.open(path, os.O_PATH))
            moved[path] = f"/proc/self/fd/{_kept[-1]}"
    sys.path[:] = [moved.get(path, path) for path in sys.path]
    for module in list(sys.modules.values()):
        paths = getattr(module, "__path__", None)
        if isinstance(paths, list):
            paths[:] = [_moved(path, moved) for path in paths]


def _moved(path: str, moved: dict[str, str]) -> str:
    for old, new in moved.items():
        if path.startswith(f"{old}/"):
            return new + path[len(old) :]
    return path
