"""The --save folder belongs to one run, which can write it; who is gone holds nothing."""

import argparse
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_espo.checkpoint.lock import LOCK, FolderLock, Owner, held, this_owner
from megatron_espo.errors import UserError
from megatron_espo.startup import save_folder
from megatron_espo.startup.save_folder import check_writable, own_save_folder

ME = this_owner({})
ELSEWHERE = replace(ME, host="another machine", job="7/run", name="other")
# A hundred beats: what a loaded machine may hold a thread back is no silence.
SILENCE = 2.0


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that lives until it is killed."""
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


def owner_of(pid: int, **values: object) -> Owner:
    since = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return replace(ME, pid=pid, since=since, name=f"owner {pid}", **values)


def lock(folder: Path, me: Owner = ME, say: Callable[[str], None] = print) -> FolderLock:
    return FolderLock(str(folder), me, beat=0.02, silence=SILENCE, say=say)


def put(folder: Path, owner: Owner) -> None:
    """Write a lock as its owner does."""
    lock(folder, owner)._write(owner)


def test_a_second_run_is_refused_while_the_first_one_lives(tmp_path: Path, sleeper) -> None:
    put(tmp_path, owner_of(sleeper.pid))
    with pytest.raises(UserError, match=f"--save {tmp_path}: another run .*process {sleeper.pid}"):
        lock(tmp_path).take()
    sleeper.kill()
    sleeper.wait()
    refused = pytest.raises(UserError, match=f"process {os.getpid()}")
    with held(lock(tmp_path), pytest.fail), refused:
        lock(tmp_path, replace(ME, name="another")).take()
    assert not list(tmp_path.iterdir())


def test_a_number_that_is_used_again_holds_nothing(tmp_path: Path, sleeper) -> None:
    put(tmp_path, replace(owner_of(sleeper.pid), since=1))
    lock(tmp_path).take()


def test_an_owner_elsewhere_is_known_by_its_heart(tmp_path: Path) -> None:
    other = lock(tmp_path, ELSEWHERE)
    other.take()
    other.start_beating(pytest.fail)
    with pytest.raises(UserError, match=r"another run is writing there .* on another"):
        lock(tmp_path).take()
    with other._mutex:  # no beat is under way
        other._over.set()
    started = time.monotonic()
    lock(tmp_path).take()
    assert SILENCE <= time.monotonic() - started < 30


@pytest.mark.parametrize(
    ("ours", "taken"),
    [
        ({"job": "7/run", "attempt": (1, 0)}, True),  # put back into the queue by Slurm
        ({"job": "7/run", "attempt": (0, 1)}, True),  # torchrun's restart
        ({"job": "7/run", "attempt": (0, 0)}, False),
        ({"job": "8/run", "attempt": (1, 1)}, False),
    ],
)
def test_a_job_that_starts_again_takes_over_at_once(
    tmp_path: Path, ours: dict, taken: bool
) -> None:
    other = lock(tmp_path, replace(ELSEWHERE, attempt=(0, 0)))
    other.take()
    lost = threading.Event()
    other.start_beating(lambda message: lost.set())
    mine = lock(tmp_path, replace(ME, **ours))
    if taken:
        mine.take()
        assert lost.wait(30), "the run before does not notice"
        assert mine._is_mine()
    else:
        with pytest.raises(UserError):
            mine.take()
    other.release()
    assert (tmp_path / LOCK).exists() == taken, "it gave another run's lock free"


@pytest.mark.parametrize("how", ["it says so", "torchrun is gone", "restarted by torchrun"])
def test_a_run_that_ends_is_waited_for(tmp_path: Path, sleeper, how: str) -> None:
    owner = {
        "it says so": owner_of(sleeper.pid, leaving=True),
        "torchrun is gone": owner_of(sleeper.pid, launcher=2**22 + 1),
        "restarted by torchrun": owner_of(sleeper.pid, attempt=(0, -1)),
    }[how]
    put(tmp_path, owner)
    said: list[str] = []
    threading.Timer(0.3, lambda: (sleeper.kill(), sleeper.wait())).start()
    lock(tmp_path, say=said.append).take()
    assert sleeper.poll() is not None and len(said) == 1 and str(sleeper.pid) in said[0]


@pytest.mark.parametrize("leaving", [True, False])
def test_other_ranks_wait_for_the_run_before_and_not_for_their_own(
    tmp_path: Path, sleeper, leaving: bool
) -> None:
    lock(tmp_path).wait()
    put(tmp_path, owner_of(sleeper.pid, leaving=leaving))
    threading.Timer(0.5, lambda: (sleeper.kill(), sleeper.wait())).start()
    lock(tmp_path).wait()
    assert (sleeper.poll() is not None) == leaving


def test_of_two_that_come_at_once_one_holds_it(tmp_path: Path) -> None:
    results: list[str] = []

    def take(name: str) -> None:
        try:
            lock(tmp_path, replace(ME, name=name)).take()
            results.append(name)
        except UserError:
            results.append("refused")

    threads = [threading.Thread(target=take, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results.count("refused") == 3 and len(results) == 4


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"host": 1}'])
def test_a_lock_that_says_nothing_holds_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK).write_text(content)
    lock(tmp_path).take()


def test_jobs_are_told_apart_by_slurm_and_torchrun() -> None:
    def owner(slurm: str, name: str, *counts: str) -> Owner:
        return this_owner({
            "SLURM_JOB_ID": slurm, "TORCHELASTIC_RUN_ID": name,
            "SLURM_RESTART_COUNT": counts[0], "TORCHELASTIC_RESTART_COUNT": counts[1],
        })  # fmt: skip

    first = owner("7", "run", "0", "1")
    assert first.job == owner("7", "run", "1", "0").job and first.attempt == (0, 1)
    assert len({first.job, owner("8", "run", "0", "0").job, owner("7", "x", "0", "0").job}) == 3
    # torchrun's word for no name: the process of torchrun stands for it.
    assert str(os.getppid()) in owner("", "none", "0", "0").job
    assert first.launcher == os.getppid() and this_owner({}).launcher is None


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "run", Path("/proc/run")):
        with pytest.raises(UserError, match=f"--save {folder}: cannot be written .*; choose an"):
            check_writable("--save", str(folder), 0)
    check_writable("--save", str(tmp_path / "a" / "b"), 0)
    assert not list((tmp_path / "a" / "b").iterdir())


class FullDisk(type(Path())):
    """Paths of a disk without room."""

    def write_bytes(self, data: bytes) -> int:
        with Path("/dev/full").open("wb", buffering=0) as file:
            return file.write(data)


def test_a_full_disk_is_found_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save_folder, "Path", FullDisk)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
        check_writable("--save", str(tmp_path), 0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_end_as_after_sigterm_when_torchrun_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, capfd
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setattr(save_folder, "_LOOK", 0.02)
    told = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        with own_save_folder(argparse.Namespace(save=str(tmp_path), rank=rank, world_size=2)):
            time.sleep(0.2)
            assert not told.is_set() and (tmp_path / LOCK).exists() == (rank == 0)
            # As the system does with a process whose parent ends.
            monkeypatch.setattr(os, "getppid", lambda: 1)
            assert told.wait(30)
            if rank == 0:
                assert '"leaving": true' in (tmp_path / LOCK).read_text()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ("torchrun is gone" in capfd.readouterr().out) == (rank == 0)
    assert [path.name for path in tmp_path.iterdir()] == (["run.json"] if rank == 0 else [])


def test_a_run_leaves_its_command_and_settings(tmp_path: Path) -> None:
    settings = {"lr": 1e-3, "dtype": torch.bfloat16, "data": ["a", Path("b")], "none": None}
    args = argparse.Namespace(save=str(tmp_path), rank=0, world_size=2, **settings)
    with own_save_folder(args):
        known = json.loads((tmp_path / "run.json").read_text())
    assert known["settings"] == vars(args) | {"dtype": "torch.bfloat16", "data": ["a", "b"]}
    assert known["world_size"] == 2 and known["command"][1:] == sys.argv
    assert known["versions"]["torch"] == importlib.metadata.version("torch")
    # A run that is refused the folder does not write there.
    (tmp_path / "run.json").unlink()
    put(tmp_path, replace(owner_of(os.getppid()), name="another"))
    with pytest.raises(UserError), own_save_folder(args):
        pass
    assert not (tmp_path / "run.json").exists()


def test_without_a_folder_nothing_is_held() -> None:
    with own_save_folder(argparse.Namespace(save=None, rank=0)):
        pass


RANK = """
import argparse, os, pathlib, signal, sys, threading
from megatron_espo.checkpoint.lock import LOCK
from megatron_espo.startup.save_folder import own_save_folder

told, folder, rank = threading.Event(), pathlib.Path(sys.argv[1]), os.environ["RANK"]
signal.signal(signal.SIGTERM, lambda *_: told.set())
with own_save_folder(argparse.Namespace(save=str(folder), rank=int(rank), world_size=2)):
    (folder / f"ready.{rank}").touch()
    told.wait(300)
    left = '"leaving": true' in (folder / LOCK).read_text() if rank == "0" else ""
(folder / f"ended.{rank}").write_text(str(left))
"""


def test_ranks_of_a_torchrun_that_is_killed_are_told(tmp_path: Path) -> None:
    """Ranks that torchrun itself has started: a forked interpreter has another parent."""
    script, folder = tmp_path / "rank.py", tmp_path / "run"
    script.write_text(RANK)
    folder.mkdir()
    torchrun = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(script), str(folder)],
        env={k: v for k, v in os.environ.items() if k != "PYTHON_EXEC"}
        | {"PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def appear(name: str) -> bool:
        end = time.monotonic() + 120
        while time.monotonic() < end and torchrun.poll() in (None, -signal.SIGKILL):
            if all((folder / f"{name}.{rank}").exists() for rank in range(2)):
                return True
            time.sleep(0.1)
        return False

    try:
        assert appear("ready")
    finally:
        torchrun.kill()
        torchrun.wait()
    assert appear("ended")
    assert (folder / "ended.0").read_text() == "True", "the next run would not wait"
    assert not (folder / LOCK).exists()
