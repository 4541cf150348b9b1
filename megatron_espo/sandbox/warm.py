"""Warm jails: one per process and mode, in which completions are run one after the other."""

import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_espo.sandbox.jail.limits import MIB, close_to_others
from megatron_espo.sandbox.jail.view import SCRATCH, SYSTEM

type Mode = Literal["bubblewrap", "namespaces", "limits"]

_JAIL = Path(__file__).parent / "jail"
_INSIDE = "/sandbox"
# The package is found alone: nothing else of this project is in a jail.
_START = (
    "import json, sys; sys.path.insert(0, sys.argv[1]); from jail.zygote import main; "
    "del sys.path[0]; main(int(sys.argv[2]), json.loads(sys.argv[3]))"
)
_ENVIRONMENT = {
    "LANG": "C.UTF-8",
    "HOME": f"{SCRATCH}/work",
    "TMPDIR": f"{SCRATCH}/tmp",
    "PATH": "/usr/bin:/bin",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
_FIRST_USER = 1_900_000_000  # far above any real one; each side of a completion is one of its own
_users = itertools.count(step=2)
_START_SECONDS = 30.0
_END_SECONDS = 20.0


@dataclass(frozen=True)
class Limits:
    """What a completion may use.

    Attributes:
        test_seconds: wall-clock seconds per test.
        total_seconds: for all tests of one completion; tests that it does not reach have failed.
        memory: bytes of its own per process; what libraries map does not count.
        processes: processes and threads at once.
        file: bytes per file; outside of the mode "limits" of all files together.
    """

    test_seconds: float = 4.0
    total_seconds: float = 20.0
    memory: int = 1024 * MIB
    processes: int = 12
    file: int = 16 * MIB


class Jail:
    """A warm jail.

    Args:
        mode: how it is made.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(self, mode: Mode) -> None:
        if mode == "limits" and os.getuid():
            # Code has this process's user then, and could read the tests in its memory, or write to
            # it, through /proc.
            close_to_others()
        self._ending = False
        self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        inside = _INSIDE if mode == "bubblewrap" else str(_JAIL.parent)
        settings = {"mode": mode, "folders": _folders(), "path": _library()}
        with theirs:
            self._process = subprocess.Popen(
                [
                    *(_bubblewrap() if mode == "bubblewrap" else []),
                    os.path.realpath(sys.executable), "-I", "-S", "-B",
                    "-c", _START, inside, str(theirs.fileno()), json.dumps(settings),
                ],
                pass_fds=[theirs.fileno()],
                cwd="/",
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
        try:
            answer = self._wait(_START_SECONDS)
        except OSError as error:
            self.close()
            raise OSError("it does not start") from error
        if "failed" in answer:
            self.close()
            raise OSError(answer["failed"])

    def start(self, limits: Limits, ends: Sequence[socket.socket]) -> None:
        """Start both sides of a completion.

        Args:
            limits: what each may use.
            ends: sockets for the code, for the judge towards the code, and towards this process.

        Raises:
            OSError: the jail is gone.
        """
        first = _FIRST_USER + (os.getpid() * 65_536 + next(_users)) % 90_000_000
        request = {
            "memory": limits.memory, "cpu": int(limits.total_seconds) + 1,
            "processes": limits.processes, "file": limits.file, "users": [first, first + 1],
        }  # fmt: skip
        self._finish()
        data = json.dumps({"start": request}).encode()
        self._connection.settimeout(_START_SECONDS)
        socket.send_fds(self._connection, [data], [end.fileno() for end in ends])
        self._wait(_START_SECONDS)

    def end(self) -> None:
        """End both sides; the next completion, not this one, waits for that."""
        self._ending = True
        with suppress(OSError):  # a jail that is gone is replaced
            self._connection.send(b'{"end": true}')

    def _finish(self) -> None:
        """Wait until the completion before has ended.

        Raises:
            OSError: it does not.
        """
        if self._ending:
            self._ending = False
            try:
                self._wait(_END_SECONDS)
            except OSError:
                self.close()
                raise

    def ended(self) -> bool:
        """Return whether its process is gone."""
        return self._process.poll() is not None

    def close(self) -> None:
        """End the jail with all that is in it."""
        self._connection.close()
        self._process.kill()
        self._process.wait()

    def _wait(self, seconds: float) -> dict[str, Any]:
        self._connection.settimeout(seconds)
        data = self._connection.recv(1 << 16)
        if not data:
            raise ConnectionError("the jail is gone")
        answer: dict[str, Any] = json.loads(data)
        return answer


_jails: dict[Mode, Jail] = {}
jails_lock = threading.RLock()
"""Held while a completion is run: a jail runs one at a time."""


def warm_jail(mode: Mode) -> Jail:
    """Return this process's jail of a mode, started if there is none.

    Args:
        mode: how it is made.

    Raises:
        OSError: it cannot be started.
    """
    jail = _jails.get(mode)
    if jail is None or jail.ended():
        _jails[mode] = jail = Jail(mode)
    return jail


def close_jails() -> None:
    """End this process's jails; the next completion starts another."""
    with jails_lock:
        while _jails:
            _jails.popitem()[1].close()


# A fork leaves the jails to the process that was forked.
os.register_at_fork(after_in_child=_jails.clear)


def _environment() -> dict[str, str]:
    """Environment of a jail's start; a Python that has moved finds its own library by it."""
    return {**_ENVIRONMENT, "LD_LIBRARY_PATH": f"{os.path.realpath(sys.base_prefix)}/lib"}


def _library() -> list[str]:
    """Folders of installed packages that generated code may import, numpy for example."""
    return sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})


def _folders() -> list[str]:
    """Folders that a jail shows."""
    python = (sys.base_prefix, sys.base_exec_prefix)
    return list(dict.fromkeys((*SYSTEM, *map(os.path.realpath, python), *_library())))


def _bubblewrap() -> list[str]:
    """Return the command that starts a jail's Python with bubblewrap."""
    folders = _folders()
    # bwrap would make the folders above them readable to root alone.
    above = {str(folder) for path in folders for folder in Path(path).parents} - {"/"}
    # Rights to give each completion namespaces and, for root, a user; it keeps none of them.
    rights = ["CAP_SYS_ADMIN"]
    if os.getuid() == 0:
        user = ["--cap-drop", "ALL"]
        rights += ["CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP", "CAP_KILL"]
    else:
        user = ["--unshare-user", "--uid", "65534", "--gid", "65534"]
        rights += ["CAP_SETPCAP"]
    temporary = any(path == "/tmp" or path.startswith("/tmp/") for path in folders)
    return [
        shutil.which("bwrap") or "/usr/bin/bwrap",
        "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try",
        # No --as-pid-1: when this process is killed, bwrap may end an init of its own in the jail,
        # and with it all that is there, but no process of another user.
        *user, *(part for right in rights for part in ("--cap-add", right)),
        "--die-with-parent", "--clearenv",
        *(part for name, value in _environment().items() for part in ("--setenv", name, value)),
        *(part for path in sorted(above) for part in ("--perms", "0755", "--dir", path)),
        *(part for path in sorted(folders) for part in ("--ro-bind-try", path, path)),
        "--ro-bind", str(_JAIL), f"{_INSIDE}/jail",
        "--proc", "/proc", "--dev", "/dev", "--dir", SCRATCH,
        *([] if temporary else ["--symlink", f"{SCRATCH}/tmp", "/tmp"]),
        "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/",
    ]  # fmt: skip
