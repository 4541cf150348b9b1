"""Runs generated code against tests so that it can neither harm the machine nor forge a verdict.

A warm jail per worker forks two processes for each completion. One loads the code and evaluates
there, with Python's own semantics, the expressions of the tests that need the code; the other, the
judge, has the rest: expected values, comparisons, loops and branches. They share no memory, and
what the first one says is data. Modes, the first that works on the machine:

* bubblewrap: `bwrap` makes the jail, with process, network, IPC and mount namespaces and a file
  system of its own, with Python and nothing else of the machine in it;
* namespaces: the same by system calls, where `bwrap` is not installed;
* limits: neither works. The machine's files and processes are as open as to the user that the jail
  has; it is used only where :data:`ACCEPT` says so.

In all of them limits hold for memory, CPU time, file size, processes and wall-clock time, a
system-call filter refuses sockets (but pairs of streams), new sessions, namespaces and ways to gain
rights, the environment is empty, the working folder is empty and thrown away, and root becomes a
user that nobody else is.
"""

import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cache

from megatron_espo.errors import UserError
from megatron_espo.sandbox.jail.channel import receive, send
from megatron_espo.sandbox.warm import Limits, Mode, jails_lock, warm_jail

type Test = str | Mapping[str, str]
"""Source of a test, or the "input" of a program and the "output" it must print."""

MODES: tuple[Mode, ...] = ("bubblewrap", "namespaces", "limits")
ACCEPT = "MEGATRON_ESPO_UNCONTAINED_CODE"
"""Environment variable that, set to 1, accepts the mode "limits"; the flag sets it."""
FLAG = "--espo-accept-uncontained-code"
_START_SECONDS = 30.0
_LOAD_SECONDS = 10.0  # for imports: torch's takes a few


def start_line() -> str:
    """Say which mode is in force, and what it leaves open."""
    mode = sandbox_mode()
    if mode != "limits":
        made = "bubblewrap" if mode == "bubblewrap" else "namespaces"
        return (
            f"sandbox: {made} (own processes, network, IPC and file system; the machine's files "
            "are hidden), limits"
        )
    return (
        f"sandbox: limits only, as {FLAG} accepts: no network, no new sessions; generated code can "
        "read, change and delete what the jail's user may, "
        + ("a user without files" if os.getuid() == 0 else "your own files among it")
    )


@cache
def sandbox_mode() -> Mode:
    """Return the first mode that works here, found out by running a test in it.

    Raises:
        UserError: none works, or only one that has to be accepted first.
    """
    if sys.platform != "linux":
        raise UserError(
            f"generated code is contained by what Linux alone has, and this is {sys.platform}: run "
            "tasks that execute code on Linux, for example in a container."
        )
    limits = Limits(test_seconds=_START_SECONDS, total_seconds=_START_SECONDS)
    reasons = []
    for mode in MODES:
        if mode == "limits" and os.environ.get(ACCEPT) != "1":
            continue
        try:
            if run_tests(["def f(x): return x + 1"], ["assert f(1) == 2"], limits, mode) == [True]:
                return mode
            reasons.append(f"{mode}: a process does not start in it")
        except OSError as error:
            reasons.append(f"{mode}: {error}")
    raise UserError(
        f"generated code cannot be contained on this machine ({'; '.join(reasons)}): install "
        "bubblewrap or allow user namespaces; on a machine that holds nothing of value, accept a "
        f"jail of limits alone, in which code can change the files of its user, with {FLAG} (or "
        f"{ACCEPT}=1)"
    )


def run_tests(
    sources: Sequence[str], tests: Sequence[Test], limits: Limits | None = None,
    mode: Mode | None = None,
) -> list[bool]:  # fmt: skip
    """Run tests against generated code.

    Args:
        sources: Python sources that are executed one after the other: what the problem gives, then
            the generated code.
        tests: Python sources, each a test of its own that fails with an exception; or texts for
            the sources as a program, with what it must print.
        limits: what the completion may use.
        mode: how it is contained; by default the best that works.

    Returns:
        Whether each test passed. A test whose code hangs, leaves or is killed has failed, and the
        tests after it run in fresh processes.

    Raises:
        OSError: no jail of this mode can be started.
    """
    limits, mode = limits or Limits(), mode or sandbox_mode()
    end = time.monotonic() + limits.total_seconds
    passed: list[bool] = []
    with jails_lock:
        while len(passed) < len(tests) and time.monotonic() < end:
            before = len(passed)
            if not _run_from(sources, tests, passed, limits, mode, end):
                break
            if len(passed) == before:
                passed.append(False)  # it took its process down
    return passed + [False] * (len(tests) - len(passed))


def _run_from(
    sources: Sequence[str], tests: Sequence[Test], passed: list[bool], limits: Limits, mode: Mode,
    end: float,
) -> bool:  # fmt: skip
    """Run tests in fresh processes until one hangs or dies; False if the code does not load."""
    jail = warm_jail(mode)
    load = max(min(_LOAD_SECONDS, end - time.monotonic()), 0.01)
    with ExitStack() as stack:
        code_end, judge_end = map(stack.enter_context, socket.socketpair())
        control, control_end = map(stack.enter_context, socket.socketpair())
        stack.callback(jail.end)
        try:
            jail.start(limits, [code_end, judge_end, control_end])
            for inner in (code_end, judge_end, control_end):
                inner.close()
            plain = [test if isinstance(test, str) else dict(test) for test in tests]
            control.settimeout(load)
            send(control, {"sources": list(sources), "tests": plain, "first": len(passed)})
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
            return control.gettimeout() != load
    return True
