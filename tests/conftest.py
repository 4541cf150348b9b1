"""For all tests: interpreters that have imported already, and what costs time again and again."""

import functools
import gc
import inspect
import os
from pathlib import Path

import interpreter
import pytest

_folder: Path | None = None


def pytest_configure(config: pytest.Config) -> None:
    """Prepare interpreters once, for all processes of a call."""
    global _folder
    # Megatron reads its own source for the help of its flags: a quarter of a second each start-up.
    inspect.getsource = functools.cache(inspect.getsource)
    if not hasattr(config, "workerinput") and "RANK" not in os.environ:
        _folder = interpreter.prepare()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # bindings complain at the end of what they cannot free
    if _folder is not None:
        interpreter.clean_up(_folder)


def pytest_collection_finish() -> None:
    """Leave what was imported out of all further collections of garbage."""
    gc.collect()
    gc.freeze()
