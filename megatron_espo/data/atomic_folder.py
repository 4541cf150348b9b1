"""Folders that are there as a whole or not at all."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_espo.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def atomic_folder(out: str | Path, needed: int = 0) -> Iterator[Path]:
    """Fill a folder under another name and give it its own when it is finished.

    Args:
        out: the folder to make; must not exist, or be empty.
        needed: bytes that will be written, about; 0 if it is not known.

    Yields:
        ``OUT.partial``, an empty folder. It becomes ``out`` if the block ends without an error and
        is removed otherwise; one that a killed run left behind is replaced.

    Raises:
        UserError: there is something at ``out``, or the disk is full.
    """
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--out {out}: exists and is not an empty folder; choose another name.")
    partial = target.with_name(f"{target.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise UserError(
            f"--out {out}: {_gigabytes(needed)} are needed there and {_gigabytes(free)} are free; "
            "make room or choose another disk."
        )
    try:
        partial.mkdir()
        yield partial
        _sync(partial)
        os.replace(partial, target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if is_disk_full(error):
            raise UserError(
                f"--out {out}: the disk is full; make room or choose another disk."
            ) from error
        raise


@contextlib.contextmanager
def full_disk_named(what: str) -> Iterator[None]:
    """Say in one sentence that a disk is full, where something is written inside the context.

    Args:
        what: the flag and its folder.

    Raises:
        UserError: there is no space left.
    """
    try:
        yield
    # torch.distributed.checkpoint's own error is no Exception.
    except BaseException as error:
        if isinstance(error, UserError) or not is_disk_full(error):
            raise
        raise UserError(
            f"{what}: no space left on its disk; make room, and the same command goes on from what "
            "was finished."
        ) from error


def is_disk_full(error: BaseException) -> bool:
    """Say whether an error means that no more can be written."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _FULL:
            return True
        # Libraries in other languages keep the system's words only.
        if any(os.strerror(number).lower() in str(cause).lower() for number in _FULL):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _sync(folder: Path) -> None:
    """Bring everything to the disk, so that a power cut leaves no finished name on lost files."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"
