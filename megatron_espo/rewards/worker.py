"""A reward worker: ``python -m megatron_espo.rewards.worker FD PARENT`` scores what it is sent.

A process of its own that knows nothing of torch, Megatron, CUDA or process groups, so that a reward
that hangs or crashes can be ended and replaced. Messages are JSON with a length before them.
"""

import contextlib
import ctypes
import os
import resource
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from megatron_espo.errors import UserError
from megatron_espo.sandbox.jail.channel import receive, send
from megatron_espo.tasks import BUILT_IN, Blend, Example, Task, load_task
from megatron_espo.tasks.checking import checked_score
from megatron_espo.tasks.parts import Coalitions, part_worths

OUT_OF_MEMORY = 77
"""Exit code of a worker that ran out of memory; the pool counts it as a crash."""
_MEMORY = 4 << 30  # address space of a built-in task: far more than any needs
_PR_SET_PDEATHSIG = 1
_LOOK_SECONDS = 1.0


def die_with_parent(parent: int) -> None:
    """Have this process end when its parent ends, however that comes about.

    Linux's kernel sees to it. Elsewhere a thread looks once a second, which a score that never
    gives way to other threads can hold up.

    Args:
        parent: the parent's process id; this process leaves at once if it is gone already.
    """
    try:
        ask_kernel = ctypes.CDLL(None, use_errno=True).prctl
    except AttributeError:  # not Linux
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    else:
        ask_kernel(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    os._exit(0)


def limit_memory(most: int) -> None:
    """Bound this process's memory and forbid core dumps, where the system lets a process do so.

    Args:
        most: bytes of address space; macOS refuses such a limit, and the process has none then.
    """
    for kind, value in ((resource.RLIMIT_AS, most), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (value, value))


def main(fd: int, parent: int) -> None:
    """Score until the other side is gone.

    Args:
        fd: file descriptor of the connected socket.
        parent: process id of the parent.
    """
    die_with_parent(parent)
    connection = socket.socket(fileno=fd)
    connection.set_inheritable(False)
    setup = receive(connection)
    if setup is None:
        return
    try:
        task = load_task(setup["task"], flag="--espo-task")
    except Exception as error:
        send(connection, _failure(error))
        return
    names = task.spellings() if isinstance(task, Blend) else [setup["task"]]
    is_built_in = BUILT_IN.keys() >= set(names)
    limit_memory(_MEMORY if is_built_in else resource.RLIM_INFINITY)
    send(connection, {"ready": True})
    while (job := receive(connection)) is not None:
        send(connection, _answer(task, job))


def _answer(task: Task, job: Mapping[str, Any]) -> dict[str, Any]:
    """Score a completion, or its parts where the job says which coalitions of them."""
    prompt, text = job["prompt"], job["completion"]
    example = Example(prompt if isinstance(prompt, str) else tuple(prompt), job["answer"])
    try:
        if job["coalitions"] is not None:
            return _parts(task, example, text, Coalitions(*job["coalitions"]))
        returned = task.score(example, text)
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except Exception as error:
        return _failure(error)
    try:
        return asdict(checked_score(task.name, example, returned))
    except UserError as error:
        return {"mistake": str(error)}


def _parts(task: Task, example: Example, text: str, asked: Coalitions) -> dict[str, Any]:
    try:
        return {"parts": part_worths(task, example, text, asked)}
    except UserError as error:
        return {"mistake": str(error)}


def _failure(error: Exception) -> dict[str, str]:
    return {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
