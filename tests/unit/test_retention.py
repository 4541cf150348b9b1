"""Which checkpoints stay, and that a clean-up that is cut short loses nothing."""

import errno
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_espo.checkpoint.retention import (
    BEST,
    Best,
    Keeper,
    Retention,
    clean_up,
    read_best,
    write_best,
)
from megatron_espo.checkpoint.tracker import TRACKER, iteration_folder, repair_tracker
from megatron_espo.data.atomic_folder import full_disk_named
from megatron_espo.errors import UserError
from megatron_espo.rl import state


def save(root: Path, step: int, finished: bool = True) -> None:
    """Lay out a checkpoint as Megatron does, the tracker last."""
    folder = Path(iteration_folder(str(root), step))
    (folder / "espo").mkdir(parents=True)
    for name in ("__0_0.distcp", "common.pt", "espo/state.pt"):
        (folder / name).write_text(name)
    if finished:
        (folder / "metadata.json").write_text("{}")
        (root / TRACKER).write_text(str(step))


def steps(root: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("iter_")) for path in root.glob("iter_*"))


@pytest.mark.parametrize(
    ("last", "every", "best", "left"),
    [
        (0, None, 4, [2, 4, 6, 8, 10, 12]),
        (2, None, None, [10, 12]),
        (2, None, 4, [4, 10, 12]),
        (1, 4, 6, [4, 6, 8, 12]),
        (0, 6, None, [6, 12]),
        (9, None, None, [2, 4, 6, 8, 10, 12]),
        (1, None, 12, [12]),
    ],
)
def test_what_stays(
    tmp_path: Path, last: int, every: int | None, best: int | None, left: list[int]
) -> None:
    for step in range(2, 14, 2):
        save(tmp_path, step)
    if best is not None:
        write_best(str(tmp_path), Best(best, 0.5))
    removed = clean_up(str(tmp_path), Retention(last, every))
    assert steps(tmp_path) == left and sorted(removed + left) == [2, 4, 6, 8, 10, 12]
    others = {path.name for path in tmp_path.iterdir() if not path.name.startswith("iter_")}
    assert others == {TRACKER} | ({BEST} if best else set())


def test_what_a_kill_left_goes_and_what_is_newer_or_a_link_stays(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        save(tmp_path, step)
    save(tmp_path, 5, finished=False)
    save(tmp_path, 8, finished=False)  # being written
    (tmp_path / "iter_0000001").symlink_to(tmp_path / "iter_0000006")
    clean_up(str(tmp_path), Retention(last=2))
    assert steps(tmp_path) == [1, 4, 6, 8] and (tmp_path / "iter_0000006" / "common.pt").exists()


@pytest.mark.parametrize("mark", [None, "release", ""])
def test_without_a_latest_iteration_nothing_is_removed(tmp_path: Path, mark: str | None) -> None:
    save(tmp_path, 2, finished=False)
    if mark is not None:
        (tmp_path / TRACKER).write_text(mark)
    assert clean_up(str(tmp_path), Retention(last=1)) == [] and steps(tmp_path) == [2]


class Killed(BaseException):
    """The process is gone: no handler of errors runs."""


class Fuse:
    """Kills before the change of the disk with this number.

    Args:
        left: changes before it.
    """

    def __init__(self, left: int) -> None:
        self.left = left

    def guard(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise Killed
            return function(*arguments, **named)

        return call


def test_a_clean_up_that_is_cut_short_anywhere_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before each single change on the disk, in turn."""
    for number in count():
        root, fuse = tmp_path / str(number), Fuse(number)
        root.mkdir()
        for step in (2, 4, 6, 8):
            save(root, step)
        write_best(str(root), Best(4, 0.5))
        with monkeypatch.context() as patch, suppress(Killed):
            for name in ("rename", "unlink", "rmdir", "replace"):
                patch.setattr(os, name, fuse.guard(getattr(os, name)))
            clean_up(str(root), Retention(last=1))
        # Every folder that looks like a checkpoint is whole, the latest and the best among them.
        for step in steps(root):
            files = sorted(p.name for p in Path(iteration_folder(str(root), step)).rglob("*"))
            assert files == ["__0_0.distcp", "common.pt", "espo", "metadata.json", "state.pt"]
        assert {4, 8} <= set(steps(root)) and read_best(str(root)) == Best(4, 0.5)
        (root / TRACKER).write_text("")
        repair_tracker(str(root))
        assert (root / TRACKER).read_text() == "8"
        # The next one ends the work.
        clean_up(str(root), Retention(last=1))
        kept = {BEST, "iter_0000004", "iter_0000008", TRACKER}
        assert {path.name for path in root.iterdir()} == kept
        if fuse.left >= 0:
            assert number > 10
            return


def test_the_best_is_kept_over_restarts(tmp_path: Path) -> None:
    def keeper() -> Keeper:
        return Keeper(str(tmp_path), Retention(last=1), keep_best=True)

    def go_on(ours: Keeper, step: int, accuracy: float) -> bool:
        ours.evaluated(step, accuracy)
        better = ours.is_best(step)
        save(tmp_path, step)
        ours.saved(step, writes=True)
        return better

    first = keeper()
    assert go_on(first, 2, 0.3) and go_on(first, 4, 0.5) and not go_on(first, 6, 0.5)
    assert steps(tmp_path) == [4, 6] and not first.is_best(8)
    # A rank that writes nothing comes to the same decisions.
    second, other = keeper(), keeper()
    other.evaluated(8, 0.7)
    assert not go_on(second, 7, 0.4) and go_on(second, 8, 0.7) and other.is_best(8)
    assert steps(tmp_path) == [8] and read_best(str(tmp_path)) == Best(8, 0.7)
    shutil.rmtree(tmp_path / "iter_0000008")
    assert read_best(str(tmp_path)) is None
    (tmp_path / BEST).write_text("{")
    assert read_best(str(tmp_path)) is None


def test_without_the_flag_no_best_is_written(tmp_path: Path) -> None:
    keeper = Keeper(str(tmp_path), Retention(last=1), keep_best=False)
    keeper.evaluated(2, 0.9)
    save(tmp_path, 2)
    keeper.saved(2, writes=True)
    assert not (tmp_path / BEST).exists() and not keeper.is_best(2)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A run that saves every four steps, with stand-ins for Megatron's part."""
    args = SimpleNamespace(
        save=str(tmp_path), save_interval=4, iteration=0, train_iters=20, global_batch_size=2,
        tensorboard_dir=None,
    )  # fmt: skip
    monkeypatch.setattr(state, "get_args", lambda: args)
    monkeypatch.setattr(state.dist, "get_rank", lambda: 0)

    def write(step: int, *_: object) -> None:
        (Path(iteration_folder(args.save, step)) / "metadata.json").write_text("{}")
        (tmp_path / TRACKER).write_text(str(step))

    monkeypatch.setattr(state, "save_checkpoint", write)
    return args


def checkpoints(run: SimpleNamespace) -> state.Checkpoints:
    keeper = Keeper(run.save, Retention(last=1), keep_best=True)
    return state.Checkpoints([], None, None, None, {}, None, keeper)


def taken_up(root: str, step: int) -> state.RunState:
    return state.load_run_state(root, step, state.read_state(root, step), None)


def test_a_better_step_is_saved_although_it_is_not_due(run: SimpleNamespace) -> None:
    ours = checkpoints(run)
    ours.evaluated(0, 0.9)  # the base is no checkpoint
    ours.evaluated(2, 0.2)
    assert ours.is_due(2)
    ours.save(state.RunState(2))
    ours.evaluated(3, 0.1)
    assert not ours.is_due(3) and ours.is_due(4)
    ours.save(state.RunState(4))
    assert steps(Path(run.save)) == [2, 4] and read_best(run.save) == Best(2, 0.2)
    assert taken_up(run.save, 2).accuracy == 0.2
    assert taken_up(run.save, 4).accuracy is None


def test_an_evaluation_after_its_save_counts_and_so_does_one_before_a_kill(
    run: SimpleNamespace,
) -> None:
    first = checkpoints(run)
    first.evaluated(4, 0.2)
    first.save(state.RunState(4))
    # Killed after the save, before the best was written.
    Path(run.save, BEST).unlink()
    run.iteration = 4
    second = checkpoints(run)
    second.evaluated(4, taken_up(run.save, 4).accuracy)
    assert read_best(run.save) == Best(4, 0.2)
    # SIGTERM broke the evaluation of step 8 off; it is done after the restart.
    second.save(state.RunState(8, evaluation_due=True))
    second.evaluated(8, 0.6)
    assert read_best(run.save) == Best(8, 0.6)


def test_a_full_disk_is_named(run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = checkpoints(run)

    def full(*_: object) -> None:
        raise RuntimeError("worker 0") from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(state, "save_checkpoint", full)
    with pytest.raises(UserError, match=f"--save {run.save}: no space left on its disk"):
        ours.save(state.RunState(4))
    with pytest.raises(RuntimeError, match="another"), full_disk_named("--save"):
        raise RuntimeError("another")
