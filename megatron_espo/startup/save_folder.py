"""The --save folder of a run: it can be written, no other run writes it, and the run ends in it."""

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from megatron_espo.checkpoint.lock import FolderLock, held
from megatron_espo.checkpoint.retention import Keeper, Retention
from megatron_espo.console import say
from megatron_espo.data.atomic_folder import full_disk_named
from megatron_espo.environment import first_parent
from megatron_espo.errors import UserError
from megatron_espo.startup.run_file import write_run_file

_LOOK = 1.0
"""Seconds between looks at torchrun."""


@contextlib.contextmanager
def own_save_folder(args: argparse.Namespace) -> Iterator[None]:
    """Have the --save folder for this run alone inside the context; nothing without --save.

    Rank 0 holds it. All ranks save and end when torchrun is killed: it would not start them again,
    and nobody could end them together.

    Args:
        args: Megatron's arguments; the folder exists.

    Raises:
        UserError: another run writes there.
    """
    if args.save is None:
        yield
        return
    with contextlib.ExitStack() as stack:
        lock = None
        if args.rank == 0:
            lock = stack.enter_context(held(FolderLock(args.save, say=say), _end))
            with full_disk_named(f"--save {args.save}"):
                write_run_file(args)
        else:
            FolderLock(args.save).wait()
        over = _watch_torchrun(lock)
        stack.callback(over.set)
        yield


def open_keeper(args: argparse.Namespace) -> Keeper | None:
    """Make what decides which checkpoints of a run stay.

    Args:
        args: Megatron's arguments; its own way to remove checkpoints, which leaves parts of one
            that was cut short, is switched off.

    Returns:
        The keeper, or None without --save.
    """
    retention = Retention(args.save_keep_last, args.save_retain_interval)
    args.save_retain_interval = None
    return None if args.save is None else Keeper(args.save, retention, args.save_keep_best)


def check_writable(flag: str, folder: str, rank: int) -> None:
    """Make a folder, and a file in it for a moment.

    Args:
        flag: names the folder in the message.
        folder: made with its parents where it is missing.
        rank: of this process, so that ranks do not use one name at a time.

    Raises:
        UserError: naming the flag and what the system says.
    """
    probe = Path(folder, f".writable.{rank}.{os.getpid()}")
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"\0" * 4096)
        probe.unlink()
    except OSError as error:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
        raise UserError(
            f"{flag} {folder}: cannot be written ({error.strerror}); choose another folder."
        ) from error


def _end(message: str) -> None:
    """End this rank at once: what it would save now would spoil another run's checkpoints."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(1)


def _watch_torchrun(lock: FolderLock | None) -> threading.Event:
    """End as after SIGTERM when torchrun, which started this process, is gone.

    Args:
        lock: on rank 0, tells the next run that this one ends.

    Returns:
        What ends the watch.
    """
    # Start-up takes a while, in which torchrun may have gone.
    over, launcher = threading.Event(), first_parent()
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return over

    def look() -> None:
        while os.getppid() == launcher:
            if over.wait(_LOOK):
                return
        if lock is not None:
            lock.leave()
            with contextlib.suppress(OSError):  # torchrun may have been who reads it
                say("warning: torchrun is gone: saving and leaving.")
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=look, name="torchrun", daemon=True).start()
    return over
