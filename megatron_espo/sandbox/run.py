"""Runs generated code against tests in two jails, so that the code can neither harm nor cheat.

The code runs in one jail and answers calls with plain values; the tests run in another, compare
and report. Expected values, verdicts and the way they are reported never enter the code's jail: it
cannot read them from a frame, print them, or leave early with success.

Three modes, the first that works on the machine:

* bubblewrap: `bwrap` gives each jail process, network, IPC and mount namespaces and a file system
  of its own, with Python and nothing else of the machine in it;
* namespaces: `unshare` gives process, network and IPC namespaces; the machine's files can be read
  as far as the jail's user may, and its /tmp written to;
* limits: neither works. Files as before; other processes of the same user can be seen, and changed
  where the run is not root's and the kernel allows it.

In all of them limits hold for memory, CPU time, file size, processes and wall-clock time, a
system-call filter refuses sockets (but pairs of streams), new sessions and ways to gain rights,
the environment is empty, the working directory is empty and thrown away, and root becomes a user
that nobody else is.
"""

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from megatron_espo.errors import UserError
from megatron_espo.sandbox.jail.channel import receive, send
from megatron_espo.sandbox.jail.limits import MIB

Mode = Literal["bubblewrap", "namespaces", "limits"]

MODES: tuple[Mode, ...] = ("bubblewrap", "namespaces", "limits")
_JAIL = Path(__file__).parent / "jail"
_ENVIRONMENT = {"LANG": "C.UTF-8", "HOME": "/tmp", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1"}  # fmt: skip
_FIRST_USER = 1_900_000_000  # far above any real one; each jail adds a number of its own
_jails = itertools.count()
_START_SECONDS = 20.0


@dataclass(frozen=True)
class Limits:
    """What a jail may use.

    Attributes:
        test_seconds: wall-clock seconds per test (and for loading the code).
        total_seconds: for all tests of one completion; tests that it does not reach have failed.
        memory: bytes of address space per process.
        processes: processes and threads at once.
        file: bytes per file; in bubblewrap mode of all files together.
    """

    test_seconds: float = 4.0
    total_seconds: float = 20.0
    memory: int = 768 * MIB
    processes: int = 12
    file: int = 16 * MIB


def start_line() -> str:
    """Say which mode is in force, and what it leaves open."""
    mode = sandbox_mode()
    if mode == "bubblewrap":
        return "sandbox: bubblewrap (own process, network, IPC and mount namespaces), limits"
    if mode == "namespaces":
        return (
            "sandbox: namespaces (processes, network, IPC) and limits; generated code can read the "
            "machine's files: install bubblewrap to hide them"
        )
    return (
        "sandbox: limits only (no network, no new sessions); generated code can read the machine's "
        "files and see processes: install bubblewrap or allow user namespaces"
    )


@cache
def sandbox_mode() -> Mode:
    """Return the first mode that works here, found out by running a test in it.

    Raises:
        UserError: none works.
    """
    limits = Limits(test_seconds=_START_SECONDS, total_seconds=_START_SECONDS)
    for mode in MODES:
        with suppress(OSError):  # bwrap or unshare is not installed
            if run_tests(["def f(x): return x + 1"], ["assert f(1) == 2"], limits, mode) == [True]:
                return mode
    raise UserError(
        "generated code cannot be run in any sandbox on this machine; install bubblewrap, or run "
        "on Linux with a Python that an unprivileged process can start"
    )


def run_tests(
    sources: Sequence[str], tests: Sequence[str], limits: Limits | None = None,
    mode: Mode | None = None,
) -> list[bool]:  # fmt: skip
    """Run tests against generated code.

    Args:
        sources: Python sources that are executed one after the other: what the problem gives, then
            the generated code.
        tests: Python sources, each a test of its own that fails with an exception.
        limits: what the jails may use.
        mode: how they are made; by default the best that works.

    Returns:
        Whether each test passed. A test whose code hangs, leaves or is killed has failed, and the
        tests after it run in fresh jails.

    Raises:
        OSError: no jail of this mode can be started.
    """
    limits, mode = limits or Limits(), mode or sandbox_mode()
    end = time.monotonic() + limits.total_seconds
    passed: list[bool] = []
    while len(passed) < len(tests) and time.monotonic() < end:
        before = len(passed)
        if not _run_from(sources, tests, passed, limits, mode, end):
            break
        if len(passed) == before:
            passed.append(False)  # it took its jail down
    return passed + [False] * (len(tests) - len(passed))


def _run_from(
    sources: Sequence[str], tests: Sequence[str], passed: list[bool], limits: Limits, mode: Mode,
    end: float,
) -> bool:  # fmt: skip
    """Run tests in two fresh jails until one hangs or dies; False if the code does not load."""
    seconds = limits.test_seconds + 2.0  # for loading, and for the start
    with ExitStack() as stack:
        code_end, test_end = map(stack.enter_context, socket.socketpair())
        control, control_end = map(stack.enter_context, socket.socketpair())
        stack.enter_context(_jail("code_side.py", [code_end], limits, mode))
        code_end.close()
        try:
            send(test_end, {"sources": list(sources)})
            stack.enter_context(_jail("test_side.py", [test_end, control_end], limits, mode))
            test_end.close()
            control_end.close()
            send(control, {"tests": list(tests), "first": len(passed)})
            control.settimeout(max(min(seconds, end - time.monotonic()), 0.01))
            hello = receive(control)
            if not (hello and hello["loaded"]):
                return False
            while len(passed) < len(tests):
                control.settimeout(max(min(limits.test_seconds, end - time.monotonic()), 0.01))
                result = receive(control)
                if result is None:
                    return True
                passed.append(bool(result["passed"]))
        except (TimeoutError, ConnectionError):
            return control.gettimeout() != seconds
    return True


@contextmanager
def _jail(
    script: str, sockets: Sequence[socket.socket], limits: Limits, mode: Mode
) -> Iterator[None]:
    """Run one of the jail's scripts; on the way out it and all its children are dead."""
    with tempfile.TemporaryDirectory(prefix="sandbox_", ignore_cleanup_errors=True) as folder:
        root = os.getuid() == 0
        # A user of its own for every jail: what was killed counts against its user's processes
        # until the machine's init has collected it.
        user = _FIRST_USER + (os.getpid() * 65_536 + next(_jails)) % 90_000_000
        if root and mode != "bubblewrap":
            os.chown(folder, user, user)
        settings = {
            "memory": limits.memory,
            "cpu": int(limits.total_seconds) + 1,
            "processes": limits.processes,
            "file": limits.file,
            "user": user if root else 0,
            "preload": root and mode != "bubblewrap",
            "path": _library(),
        }
        fds = [connection.fileno() for connection in sockets]
        inside = "/jail" if mode == "bubblewrap" else str(_JAIL)
        process = subprocess.Popen(
            [
                *_prefix(mode, limits, root=root),
                os.path.realpath(sys.executable), "-I", "-S", "-B",
                f"{inside}/{script}", *map(str, fds), json.dumps(settings),
            ],
            pass_fds=fds,
            cwd=folder,
            env=_ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        try:
            yield
        finally:
            # The filter keeps all of its descendants in its process group.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.wait()


def _library() -> list[str]:
    """Folders of installed packages that generated code may import, numpy for example."""
    return sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})


def _prefix(mode: Mode, limits: Limits, *, root: bool) -> list[str]:
    """Return the command that puts the rest of a command line into namespaces."""
    if mode == "limits":
        return []
    if mode == "namespaces":
        own = [] if root else ["--user", "--map-current-user"]
        # unshare ends its child when it ends, but not itself when this process is killed.
        return [
            shutil.which("setpriv") or "/usr/bin/setpriv", "--pdeathsig", "KILL",
            shutil.which("unshare") or "/usr/bin/unshare", *own, "--pid", "--fork", "--kill-child",
            "--mount-proc", "--net", "--ipc",
        ]  # fmt: skip
    base = os.path.realpath(sys.base_prefix)
    binds = [(folder, folder) for folder in ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache")]
    binds += [(folder, folder) for folder in dict.fromkeys((base, *_library()))]
    # bwrap would make the folders above them readable to root alone.
    above = {str(folder) for path, _ in binds for folder in Path(path).parents} - {"/"}
    user: list[str]
    if root:  # enough rights to become another user inside, and then none
        user = ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        user = ["--unshare-user", "--uid", "65534", "--gid", "65534", "--disable-userns"]
    return [
        shutil.which("bwrap") or "/usr/bin/bwrap",
        "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try",
        # No --as-pid-1: when this process is killed, bwrap may end an init of its own in the jail,
        # and with it all that is there, but no process of another user.
        *user, "--die-with-parent", "--clearenv",
        *(part for name, value in _ENVIRONMENT.items() for part in ("--setenv", name, value)),
        *(part for path in sorted(above) for part in ("--perms", "0755", "--dir", path)),
        *(part for pair in binds for part in ("--ro-bind-try", *pair)),
        "--ro-bind", str(_JAIL), "/jail", "--proc", "/proc", "--dev", "/dev",
        "--perms", "1777", "--size", str(limits.file), "--tmpfs", "/tmp",
        "--chdir", "/tmp",
    ]  # fmt: skip
