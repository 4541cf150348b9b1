"""One run at a time writes a --save folder: a file with the run's name and a heartbeat.

A process that is gone holds nothing: on the same machine the next run sees that at once, from
another machine by a heart that does not beat. Locks of the file system would do neither on the
shared disks that clusters have.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_espo.errors import UserError

_PROC = Path("/proc")
LOCK = "run.lock"

_BEAT = 5.0
"""Seconds between two beats."""
_SILENCE = 60.0
"""Seconds without a beat after which the owner on another machine counts as gone."""


@dataclass(frozen=True)
class Owner:
    """A run that writes a folder, named by the process of its rank 0.

    Attributes:
        host: machine and space of process numbers.
        pid: the process.
        since: when it started, in clock ticks of its machine: numbers are used again.
        launcher: number of the process that started it; None where that is no torchrun.
        job: what stays when the job is started again: Slurm's number and torchrun's.
        attempt: how often Slurm and torchrun have started it again.
        name: made up, for this owner alone.
        beat: counts up while it lives.
        leaving: whether it saves and ends.
    """

    host: str
    pid: int
    since: int
    launcher: int | None
    job: str
    attempt: tuple[int, int]
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    beat: int = 0
    leaving: bool = False


def this_owner(environment: Mapping[str, str] = os.environ) -> Owner:
    """Describe this process.

    Args:
        environment: as Slurm and torchrun set it.
    """
    torchrun = environment.get("TORCHELASTIC_RUN_ID")
    host = _host()
    # A job that torchrun was given no name for is known by torchrun itself.
    name = torchrun if torchrun not in (None, "none") else f"{host}:{os.getppid()}"
    return Owner(
        host=host,
        pid=os.getpid(),
        since=_since(os.getpid()) or 0,
        launcher=None if torchrun is None else os.getppid(),
        job=f"{environment.get('SLURM_JOB_ID', '')}/{name}",
        attempt=(
            int(environment.get("SLURM_RESTART_COUNT") or 0),
            int(environment.get("TORCHELASTIC_RESTART_COUNT") or 0),
        ),
    )


def _host() -> str:
    """Name this machine and its space of process numbers: containers have their own."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _since(pid: int) -> int | None:
    """When a process started, or None where there is none, or only what is left of one.

    Without Linux's /proc it is 0 for a process that there is: a number that was given again counts
    as the same process then.
    """
    if not (_PROC / "self/stat").exists():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass  # somebody else's
        return 0
    try:
        # The command's name in parentheses may hold spaces.
        words = (_PROC / f"{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if words[0] in "ZX" else int(words[19])


class FolderLock:
    """Holds a folder from :meth:`take` to :meth:`release`."""

    def __init__(
        self,
        folder: str,
        me: Owner | None = None,
        beat: float = _BEAT,
        silence: float = _SILENCE,
        say: Callable[[str], None] = lambda line: print(line, flush=True),
    ) -> None:
        """Name the folder.

        Args:
            folder: a --save folder that exists.
            me: this run; None looks.
            beat: seconds between two beats.
            silence: seconds without a beat after which an owner elsewhere counts as gone.
            say: shows what is waited for.
        """
        self._folder, self._path = folder, Path(folder, LOCK)
        self._me = me or this_owner()
        self._beat, self._silence, self._say = beat, silence, say
        self._mutex, self._over = threading.Lock(), threading.Event()

    def take(self) -> None:
        """Take the folder; waits for a run before that is ending.

        Raises:
            UserError: another run writes there.
        """
        said = False
        while True:
            theirs = self._read()
            if theirs is None or self._is_gone(theirs):
                self._write(self._me)
                # Two that came at once have both written: the last one holds it.
                time.sleep(min(0.2, self._beat))
                if self._is_mine():
                    return
                continue
            if not self._ends(theirs):
                machine = theirs.host.partition(" ")[0]
                raise UserError(
                    f"--save {self._folder}: another run is writing there (process {theirs.pid} "
                    f"on {machine}); end that one or choose another folder."
                )
            if not said:
                self._say(
                    f"--save {self._folder}: waiting for process {theirs.pid} of the run before, "
                    "which saves and ends"
                )
                said = True
            time.sleep(min(1.0, self._beat))

    def wait(self) -> None:
        """Wait, on a rank that does not take the folder, for a run before that is ending."""
        while (theirs := self._read()) and self._ends(theirs) and not self._is_gone(theirs):
            time.sleep(min(1.0, self._beat))

    def start_beating(self, lost: Callable[[str], None]) -> None:
        """Beat until the release.

        Args:
            lost: called once, with a sentence, if another run has taken the folder.
        """

        def beat() -> None:
            while not self._over.wait(self._beat):
                # A disk that does not answer for a while is no loss.
                with contextlib.suppress(OSError), self._mutex:
                    if self._over.is_set():
                        return
                    if not self._is_mine():
                        lost(f"--save {self._folder}: another run has taken the folder over.")
                        return
                    self._me = replace(self._me, beat=self._me.beat + 1)
                    self._write(self._me)

        threading.Thread(target=beat, name="folder lock", daemon=True).start()

    def leave(self) -> None:
        """Say that this run saves and ends, so that the next one waits instead of giving up."""
        with contextlib.suppress(OSError), self._mutex:
            if self._is_mine():
                self._me = replace(self._me, leaving=True)
                self._write(self._me)

    def release(self) -> None:
        """Give the folder free."""
        self._over.set()
        with contextlib.suppress(OSError), self._mutex:
            if self._is_mine():
                self._path.unlink()

    def _is_gone(self, theirs: Owner) -> bool:
        """Whether an owner is no more."""
        if theirs.host == self._me.host:
            return _since(theirs.pid) != theirs.since
        if theirs.job == self._me.job and theirs.attempt < self._me.attempt:
            return True  # Slurm or torchrun ended it before it started this one
        end = time.monotonic() + self._silence
        while time.monotonic() < end:
            time.sleep(min(1.0, self._beat))
            now = self._read()
            if now is None or (now.name, now.beat) != (theirs.name, theirs.beat):
                return now is None
        return True

    def _ends(self, theirs: Owner) -> bool:
        """Whether an owner that lives is ending: it says so, or torchrun has left it alone."""
        orphan = theirs.launcher is not None and _since(theirs.launcher) is None
        restarted = theirs.job == self._me.job and theirs.attempt < self._me.attempt
        return theirs.leaving or (theirs.host == self._me.host and (orphan or restarted))

    def _is_mine(self) -> bool:
        theirs = self._read()
        return theirs is not None and theirs.name == self._me.name

    def _read(self) -> Owner | None:
        try:
            known: dict[str, Any] = json.loads(self._path.read_text())
            return Owner(**known | {"attempt": tuple(known["attempt"])})
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return None  # files appear as a whole: what cannot be read is not ours

    def _write(self, owner: Owner) -> None:
        partial = self._path.with_name(f".{LOCK}.{owner.name}")
        partial.write_text(json.dumps(asdict(owner)))
        partial.replace(self._path)


@contextlib.contextmanager
def held(lock: FolderLock, lost: Callable[[str], None]) -> Iterator[FolderLock]:
    """Hold a folder inside the context.

    Args:
        lock: of the folder.
        lost: see :meth:`FolderLock.start_beating`.

    Raises:
        UserError: another run writes there.
    """
    lock.take()
    lock.start_beating(lost)
    try:
        yield lock
    finally:
        lock.release()
