"""For all tests: interpreters that have imported already."""

import os
from pathlib import Path

import interpreter
import pytest

_folder: Path | None = None


def pytest_configure(config: pytest.Config) -> None:
    """Prepare them once, for all processes of a call."""
    global _folder
    if not hasattr(config, "workerinput") and "RANK" not in os.environ:
        _folder = interpreter.prepare()


def pytest_unconfigure() -> None:
    if _folder is not None:
        interpreter.clean_up(_folder)
