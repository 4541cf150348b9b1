"""What the doctor reports, and what it is told of GPUs."""

from dataclasses import dataclass
from typing import Literal

GB = 10**9


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        level: ok, warning (a run works, but not all or not as well), problem (no run can start).
        text: what was found; of a warning or problem one sentence that says what to do.
    """

    level: Literal["ok", "warning", "problem"]
    text: str


@dataclass(frozen=True)
class Gpu:
    """A visible GPU.

    Attributes:
        name: product name.
        memory: bytes.
        capability: compute capability.
    """

    name: str
    memory: int
    capability: tuple[int, int]


def dotted(capability: tuple[int, int]) -> str:
    """Write a compute capability as NVIDIA does."""
    return f"{capability[0]}.{capability[1]}"
