"""Removes what code leaves in folders, however it is made."""

import os
import secrets
import shutil
from collections.abc import Collection
from contextlib import suppress


def clear_folder(folder: str, kept: Collection[str] = ()) -> None:
    """Remove what is in a folder.

    Folders may be nested deeper than a path can say or a recursion follow: one in another is moved
    up first. What cannot be removed stays.

    Args:
        folder: stays itself, empty.
        kept: names in it that stay.
    """
    mark, count = secrets.token_hex(8), 0
    queue = []
    with suppress(OSError):
        for entry in list(os.scandir(folder)):
            if entry.name not in kept:
                queue.append(entry.path)
    while queue:
        path = queue.pop()
        with suppress(OSError):
            if os.path.islink(path) or not os.path.isdir(path):
                os.unlink(path)
                continue
            os.chmod(path, 0o700)
            for name in os.listdir(path):
                count += 1
                moved = f"{folder}/{mark}.{count}"
                os.rename(f"{path}/{name}", moved)
                queue.append(moved)
            os.rmdir(path)


def remove_folder(folder: str) -> None:
    """Remove a folder with what is in it."""
    clear_folder(folder)
    shutil.rmtree(folder, ignore_errors=True)
