"""Checks what a task's `score` returned, whoever wrote the task."""

import json
from collections.abc import Mapping
from math import isfinite

from megatron_espo.errors import UserError
from megatron_espo.tasks.base import Example, Score

_SHOWN = 200  # characters of a value in an error message
RESERVED_METRICS = frozenset(
    {"mean", "std", "min", "max", "correct", "completions", "advantage", "by_task"}
    | {"zero_std_groups", "timeouts", "crashes"}
)
"""Names under reward/ that the trainer logs itself; no metric of a task may take one."""


def checked_score(task: str, example: Example, score: object) -> Score:
    """Check what a task's `score` returned, whoever wrote the task.

    Args:
        task: the task's name.
        example: the problem, for the error.
        score: what was returned.

    Returns:
        The score in plain numbers: a float, a bool, floats.

    Raises:
        UserError: It is no `Score`, its reward or a metric is no finite number, or a metric has a
            reserved name.
    """
    record = json.dumps(dict(example.answer), default=repr, ensure_ascii=True)
    where = f"task {task}, record {record[:_SHOWN]}{'...' if len(record) > _SHOWN else ''}"
    if not isinstance(score, Score):
        raise UserError(
            f"{where}: score returned {_shown(score)}; return a megatron_espo.tasks.base.Score"
        )
    if not isinstance(score.metrics, Mapping):
        raise UserError(f"{where}: metrics is {_shown(score.metrics)}; make it a dict of numbers")
    for name in score.metrics:
        if not isinstance(name, str) or not name or name.partition("/")[0] in RESERVED_METRICS:
            raise UserError(
                f"{where}: a metric is called {name!r}, a name that is reserved; call it otherwise"
            )
    numbers = {"the reward": score.reward} | {
        f"the metric {name!r}": value for name, value in score.metrics.items()
    }
    for what, value in numbers.items():
        if not _is_finite(value):
            raise UserError(f"{where}: {what} is {_shown(value)}; make it a finite number")
    metrics = {name: float(value) for name, value in score.metrics.items()}
    try:
        return Score(float(score.reward), bool(score.correct), metrics, score.task)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{where}: correct is {_shown(score.correct)}; make it True or False"
        ) from error


def _is_finite(value: object) -> bool:
    if isinstance(value, str | bytes | None):
        return False
    try:
        return isfinite(float(value))  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return False


def _shown(value: object) -> str:
    text = ascii(value)
    return f"{text[:_SHOWN]}{'...' if len(text) > _SHOWN else ''} ({type(value).__name__})"
