"""Which checkpoints of a run stay: the last ones, every so many, and the best one.

A checkpoint leaves in two steps: its folder gets another name, and then its files go. So one that
was cut short while it was removed is no checkpoint, and the next clean-up ends the work.
"""

import contextlib
import json
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from megatron_espo.checkpoint.tracker import (
    is_finished,
    iteration_folder,
    iteration_folders,
    latest_checkpoint,
)

BEST = "best_checkpoint.json"
_REMOVED = ".removed."


@dataclass(frozen=True)
class Retention:
    """What stays.

    Attributes:
        last: number of the newest checkpoints; 0 keeps all, unless ``every`` is given.
        every: iterations that are a multiple of it; None: none.
    """

    last: int = 0
    every: int | None = None

    def kept(self, iterations: Collection[int], best: int | None) -> set[int]:
        """Choose what stays.

        Args:
            iterations: of all checkpoints up to the latest finished one.
            best: the best one's, or None.
        """
        if not (self.last or self.every):
            return set(iterations)
        last = max(self.last, 1)
        stay = set(sorted(iterations)[-last:])
        if self.every:
            stay |= {iteration for iteration in iterations if iteration % self.every == 0}
        return stay | {iteration for iteration in iterations if iteration == best}


@dataclass(frozen=True)
class Best:
    """The best checkpoint so far.

    Attributes:
        iteration: which one.
        accuracy: on the held-out problems.
    """

    iteration: int
    accuracy: float


def read_best(root: str) -> Best | None:
    """Read which checkpoint is the best; None where that is not known, or it is gone."""
    try:
        known = json.loads(Path(root, BEST).read_text())
        best = Best(int(known["iteration"]), float(known["accuracy"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return best if Path(iteration_folder(root, best.iteration)).is_dir() else None


def write_best(root: str, best: Best) -> None:
    """Write which checkpoint is the best."""
    partial = Path(root, f".{BEST}")
    partial.write_text(json.dumps({"iteration": best.iteration, "accuracy": best.accuracy}) + "\n")
    partial.replace(Path(root, BEST))


def clean_up(root: str, retention: Retention) -> list[int]:
    """Remove the checkpoints that do not stay; one process at a time.

    What is newer than the latest checkpoint is left alone, and so are links.

    Args:
        root: a --save folder whose tracker names the latest checkpoint.
        retention: what stays.

    Returns:
        Iterations of what was removed.
    """
    for left in Path(root).glob(f"{_REMOVED}*"):
        shutil.rmtree(left, ignore_errors=True)
    try:
        latest = int(latest_checkpoint(root))
    except (OSError, ValueError):
        return []
    older = {
        iteration: path
        for iteration, path in iteration_folders(root).items()
        if iteration <= latest and not path.is_symlink()
    }
    # What is not finished is what a kill has left.
    finished = {iteration for iteration, path in older.items() if is_finished(path)} | {latest}
    best = read_best(root)
    stay = retention.kept(finished, best.iteration if best else None)
    removed = sorted(older.keys() - stay) if retention.last or retention.every else []
    for iteration in removed:
        path = older[iteration]
        aside = path.with_name(_REMOVED + path.name)
        with contextlib.suppress(OSError):  # a disk that is busy: the next clean-up tries again
            path.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
    return removed


class Keeper:
    """Remembers the best checkpoint of a run, and removes after each save what does not stay."""

    def __init__(self, root: str, retention: Retention, keep_best: bool) -> None:
        """Read what an earlier process of the run left; all ranks find the same.

        Args:
            root: the --save folder.
            retention: what stays.
            keep_best: whether the best checkpoint is saved and stays.
        """
        self._root, self._retention, self._keep_best = root, retention, keep_best
        self._best = read_best(root) if keep_best else None
        self._evaluated: Best | None = None

    def evaluated(self, step: int, accuracy: float) -> None:
        """Take the held-out accuracy of a step."""
        self._evaluated = Best(step, accuracy)

    def accuracy(self, step: int) -> float | None:
        """The held-out accuracy of a step, if it was evaluated last."""
        known = self._evaluated
        return known.accuracy if known is not None and known.iteration == step else None

    def is_best(self, step: int) -> bool:
        """Whether a step that was evaluated is better than the best checkpoint."""
        accuracy = self.accuracy(step)
        if not self._keep_best or accuracy is None:
            return False
        return self._best is None or accuracy > self._best.accuracy

    def saved(self, step: int, writes: bool) -> None:
        """A checkpoint of the step is there, as a whole.

        Args:
            step: which one.
            writes: whether this rank removes what does not stay.
        """
        if self.is_best(step):
            self._best = self._evaluated
            if writes and self._best is not None:
                write_best(self._root, self._best)
        if writes:
            clean_up(self._root, self._retention)
