"""What a user can mend is one sentence; everything else keeps its traceback."""

import importlib
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_espo import megatron_patches
from megatron_espo.errors import UserError
from megatron_espo.startup import setup
from megatron_espo.tasks.base import Example, Score, read_examples


class _Left(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def leave(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    statuses: list[int] = []

    def left(status: int) -> None:
        statuses.append(status)
        raise _Left

    monkeypatch.setattr(setup.os, "_exit", left)
    monkeypatch.setenv("RANK", "0")
    return statuses


def raising(error: BaseException):
    def main(argv: Sequence[str]) -> None:
        raise error

    return main


def test_a_users_mistake_is_one_sentence(
    leave: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(_Left):
        setup.run_entry_point(raising(UserError("--lr -1: make it positive.")))
    assert leave == [2] and capsys.readouterr().err == "error: --lr -1: make it positive.\n"


@pytest.mark.parametrize("error", [ValueError("shapes differ"), RuntimeError("no"), KeyError("k")])
def test_a_fault_of_the_program_keeps_its_traceback(error: Exception, leave: list[int]) -> None:
    with pytest.raises(type(error)) as caught:
        setup.run_entry_point(raising(error))
    assert caught.value is error and not leave


@pytest.mark.parametrize(
    ("flag", "code", "status"),
    [
        ("--help", 0, [0]),
        ("-h", None, [0]),
        ("--help", 3, []),
        # So Megatron ends a training at --exit-interval.
        ("--exit-interval", 0, []),
    ],
)
def test_help_leaves_at_once_and_other_ends_stay(
    flag: str, code: int | None, status: list[int], leave: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(setup.sys, "argv", ["program", flag])
    with pytest.raises((_Left, SystemExit)):
        setup.run_entry_point(raising(SystemExit(code)))
    assert leave == status


def test_what_a_task_of_ones_own_says_of_a_line_is_a_users_mistake(tmp_path: Path) -> None:
    class Task:
        name = "mine"

        def read(self, path: object) -> list[Example]:
            raise ValueError(f"{path}:3: no answer")

        def score(self, example: Example, completion: str) -> Score:
            raise NotImplementedError

    with pytest.raises(UserError, match=r"file:3: no answer$"):
        read_examples(Task(), "file")


PATCHES = {
    "skip_compiled_helpers": ("megatron.core.datasets.utils", "compile_helpers"),
    "report_in_this_process": (
        "megatron.core.dist_checkpointing.strategies.filesystem_async", "_results_queue",
    ),
    "run_without_cuda": ("megatron.core.tensor_parallel.random", "_get_cuda_rng_state"),
}  # fmt: skip


@pytest.mark.parametrize("patch", PATCHES)
def test_a_name_that_megatron_has_no_more_is_said(
    patch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, name = PATCHES[patch]
    monkeypatch.delattr(importlib.import_module(module), name)
    with pytest.raises(UserError, match=rf"has no {module}\.{name}.*install megatron-core 0\.19"):
        getattr(megatron_patches, patch)()


def test_timers_know_the_run_of_wandb_without_importing_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from megatron.core import timers

    assert isinstance(timers.wandb, megatron_patches._WandbOfTheRun)
    monkeypatch.delitem(megatron_patches.sys.modules, "wandb", raising=False)
    assert timers.wandb != object() and timers.wandb != None  # noqa: E711
    writer = object()
    monkeypatch.setitem(megatron_patches.sys.modules, "wandb", writer)
    assert writer == timers.wandb and object() != timers.wandb
