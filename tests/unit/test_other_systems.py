"""What stands in for Linux's own calls where a system has none of them."""

import os
import resource
import subprocess
import threading
from pathlib import Path

import pytest

from megatron_espo.checkpoint import lock
from megatron_espo.errors import UserError
from megatron_espo.monitor import hardware
from megatron_espo.rewards import worker
from megatron_espo.sandbox import run as sandbox


def test_a_reward_worker_ends_with_its_parent_without_prctl(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parents, gone = [7], threading.Event()
    monkeypatch.setattr(worker.ctypes, "CDLL", lambda *_, **__: object())
    monkeypatch.setattr(worker.os, "getppid", lambda: parents[-1])
    monkeypatch.setattr(worker.os, "_exit", lambda status: gone.set())
    monkeypatch.setattr(worker, "_LOOK_SECONDS", 0.01)
    worker.die_with_parent(7)
    assert not gone.wait(0.1)
    parents.append(1)  # the parent's end: the process has another one
    assert gone.wait(10.0)


def test_a_limit_that_the_system_refuses_does_not_end_a_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def refuse(kind: int, limits: tuple[int, int]) -> None:
        asked.append(kind)
        if kind == resource.RLIMIT_AS:
            raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(worker.resource, "setrlimit", refuse)
    worker.limit_memory(1 << 30)
    assert asked == [resource.RLIMIT_AS, resource.RLIMIT_CORE]


def test_a_folder_is_held_without_proc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    process = subprocess.Popen(["sleep", "60"])
    seen = lock._since(process.pid)
    assert seen is not None and seen > 0
    monkeypatch.setattr(lock, "_PROC", tmp_path)
    assert lock._since(os.getpid()) == lock._since(process.pid) == 0
    process.kill()
    process.wait()
    assert lock._since(process.pid) is None


def test_generated_code_wants_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox.sandbox_mode.cache_clear()
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    with pytest.raises(UserError, match=r"Linux alone has, and this is darwin.*container"):
        sandbox.sandbox_mode()
    sandbox.sandbox_mode.cache_clear()


def test_macos_counts_memory_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    here = hardware.local_hardware(None)["host_peak_gib"]
    monkeypatch.setattr(hardware.sys, "platform", "darwin")
    assert hardware.local_hardware(None)["host_peak_gib"] == pytest.approx(here / 1024, rel=0.1)
