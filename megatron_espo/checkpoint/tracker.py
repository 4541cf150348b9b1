"""Where the parts of a checkpoint lie, and the tracker file that names the latest one."""

import argparse
import os
import re
import sys
import time
from pathlib import Path

from megatron_espo.errors import UserError

TRACKER = "latest_checkpointed_iteration.txt"


def has_checkpoint(root: str | None) -> bool:
    """Return whether a --save folder holds a checkpoint."""
    return root is not None and os.path.isfile(os.path.join(root, TRACKER))


def iteration_folder(root: str, iteration: int) -> str:
    """Name the folder of one checkpoint."""
    return os.path.join(root, f"iter_{iteration:07d}")


def checkpoint_folder(root: str, iteration: int | None = None) -> str:
    """Name the folder of a checkpoint that is there.

    Args:
        root: a --save folder.
        iteration: which one; None takes the latest.

    Raises:
        UserError: There is none.
    """
    if iteration is not None:
        folder = iteration_folder(root, iteration)
    elif not has_checkpoint(root):
        raise UserError(f"{root}: no checkpoint there; it holds no {TRACKER}.")
    else:
        mark = latest_checkpoint(root)
        folder = (
            os.path.join(root, mark) if mark == "release" else iteration_folder(root, int(mark))
        )
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such checkpoint.")
    return folder


def tokenizer_folder(root: str | Path) -> Path:
    """Name the folder of the tokenizer that a converted checkpoint brings."""
    return Path(root, "tokenizer")


def stored_tokenizer(root: str, args: argparse.Namespace) -> str | None:
    """Find the tokenizer of a checkpoint.

    Args:
        root: the --save folder, which may have been moved.
        args: the arguments stored in it.

    Returns:
        The folder beside the checkpoint, else the one that it was trained with, if any.
    """
    beside = tokenizer_folder(root)
    return str(beside) if beside.is_dir() else getattr(args, "tokenizer_model", None)


def espo_folder(root: str, iteration: int) -> str:
    """Name the folder of ESPO's part of a checkpoint."""
    return os.path.join(iteration_folder(root, iteration), "espo")


def reference_folder(root: str, iteration: int) -> str:
    """Name the folder of the reference policy in a checkpoint."""
    return os.path.join(espo_folder(root, iteration), "reference")


def latest_checkpoint(root: str) -> str:
    """Read what the tracker file names: an iteration, or "release".

    Raises:
        OSError: There is no tracker file.
    """
    return Path(root, TRACKER).read_text().strip()


def resumed_iteration(args: argparse.Namespace) -> int:
    """Find the iteration that a run goes on from.

    Args:
        args: Megatron's arguments.

    Returns:
        The iteration of --load, or 0 for a run that starts.
    """
    if not has_checkpoint(args.load) or args.finetune:
        return 0
    mark = str(args.ckpt_step or latest_checkpoint(args.load))
    return int(mark) if mark.isdigit() else 0


def iteration_folders(root: str) -> dict[int, Path]:
    """Find the folders of a run's iterations, finished or not, by their numbers."""
    return {
        int(path.name.removeprefix("iter_")): path
        for path in Path(root).glob("iter_*")
        if path.name.removeprefix("iter_").isdecimal()
    }


def is_finished(folder: Path) -> bool:
    """Say whether an iteration is whole: Megatron writes metadata.json last."""
    return (folder / "metadata.json").is_file()


def repair_tracker(root: str) -> None:
    """Mend a tracker file that was cut short when the run was killed, or the disk was full.

    Megatron empties the file before it writes the new number, and refuses an empty one. The newest
    checkpoint that was finished takes its place. All ranks may call this at once: each writes the
    same content and moves it into place as a whole.

    Args:
        root: a --save folder.

    Raises:
        UserError: The tracker file is broken and no finished checkpoint was found.
    """
    tracker = Path(root, TRACKER)
    for _ in range(2):
        if not has_checkpoint(root) or re.fullmatch(r"\d+|release", latest_checkpoint(root)):
            return
        time.sleep(0.5)  # a run that is still ending may be writing it
    finished = [number for number, path in iteration_folders(root).items() if is_finished(path)]
    if not finished:
        raise UserError(
            f"{tracker}: names no iteration, and no finished checkpoint lies beside it; remove the "
            "folder or pass another one."
        )
    own = tracker.with_suffix(f".{os.environ.get('RANK', '0')}.tmp")
    own.write_text(str(max(finished)))
    own.replace(tracker)
    print(
        f"warning: {tracker} was cut short; going on from iteration {max(finished)}.",
        file=sys.stderr,
        flush=True,
    )
