"""A reward worker: ``python -m megatron_espo.rewards.worker FD PARENT`` scores what it is sent.

A process of its own that knows nothing of torch, Megatron, CUDA or process groups, so that a reward
that hangs or crashes can be ended and replaced. Messages are JSON with a length before them.
"""

import ctypes
import os
import resource
import signal
import socket
import sys
import traceback
from dataclasses import asdict

from megatron_espo.errors import UserError
from megatron_espo.sandbox.jail.channel import receive, send
from megatron_espo.tasks import BUILT_IN, Blend, Example, load_task
from megatron_espo.tasks.checking import checked_score

OUT_OF_MEMORY = 77
"""Exit code of a worker that ran out of memory; the pool counts it as a crash."""
_MEMORY = 4 << 30  # address space of a built-in task: far more than any needs
_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Have the kernel end this process when its parent ends, however that comes about.

    Args:
        parent: the parent's process id; this process leaves at once if it is gone already.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)


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
    if BUILT_IN.keys() >= set(names):
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    send(connection, {"ready": True})
    while (job := receive(connection)) is not None:
        prompt = job["prompt"]
        example = Example(prompt if isinstance(prompt, str) else tuple(prompt), job["answer"])
        try:
            returned = task.score(example, job["completion"])
        except MemoryError:
            os._exit(OUT_OF_MEMORY)
        except Exception as error:
            send(connection, _failure(error))
            continue
        try:
            score = checked_score(task.name, example, returned)
        except UserError as error:
            send(connection, {"mistake": str(error)})
        else:
            send(connection, asdict(score))


def _failure(error: Exception) -> dict[str, str]:
    return {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
