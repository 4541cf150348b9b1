"""Programs and tests of tests/data/programs, and the modes that this machine has."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_espo.sandbox.run import MODES, run_tests
from megatron_espo.sandbox.warm import Limits, Mode

DATA = Path(__file__).parents[1] / "data/programs"


def _works(mode: Mode) -> bool:
    generous = Limits(test_seconds=20.0, total_seconds=20.0)
    try:
        return run_tests(["def f(x): return 5"], ["assert f(2) == 5"], generous, mode) == [True]
    except OSError:
        return False


WORKING = [mode for mode in MODES if _works(mode)]
MODE_MARKS = [
    pytest.param(mode, marks=[pytest.mark.slow] if mode != WORKING[0] else []) for mode in WORKING
]
"""The best mode, and the others with the long runs."""


def programs(name: str) -> Iterator[tuple[str, str, list[str]]]:
    """Read a file of programs.

    Args:
        name: "right", "wrong" or "hostile".

    Yields:
        What a program is, its source, and its tests.
    """
    for part in (DATA / f"{name}.txt").read_text("utf-8").split("### ")[1:]:
        title, _, rest = part.partition("\n")
        code, _, tests = rest.partition("#---\n")
        yield title, code, tests.split("#===\n") if tests else []
