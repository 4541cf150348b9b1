"""The parts of a completion that its task scores, and what each is worth: Owen-Shapley values.

A task that can say what some of a completion would earn has two functions more (`PartedTask`).
Parts are the players of a game whose coalitions are runs of neighbours.
"""

from collections.abc import Mapping, Sequence
from math import comb, isfinite
from typing import NamedTuple, Protocol, runtime_checkable

from megatron_espo.errors import UserError
from megatron_espo.tasks.base import Example, Task

type Span = tuple[int, int]
"""First and one past the last: characters of a completion, or parts of a run."""
type Worth = tuple[int, int, float]
"""A part's span of characters and its value."""


class Coalitions(NamedTuple):
    """Which coalitions are asked for, and how their differences are weighed.

    Attributes:
        width: most parts of a run; all parts together are asked for in any case.
        most: number of coalitions, that of no part among them.
        even: whether a part's weights are brought to the sum 1, see :func:`owen_shapley`.
    """

    width: int
    most: int
    even: bool = False


@runtime_checkable
class PartedTask(Task, Protocol):
    """A task that scores parts of a completion; like `score` neither function may raise or hang."""

    def segments(self, example: Example, completion: str) -> Sequence[Span]:
        """Return the parts as spans of characters: ascending, disjoint, none of them empty."""
        ...

    def score_segments(
        self, example: Example, completion: str, kept: Sequence[Sequence[int]]
    ) -> Sequence[float]:
        """Return what the completion would earn with these parts alone, for each set of numbers."""
        ...


def scores_parts(task: object) -> bool:
    """Whether a task is a `PartedTask`."""
    return all(callable(getattr(task, name, None)) for name in ("segments", "score_segments"))


def runs(n: int, asked: Coalitions) -> list[Span]:
    """List runs of neighbours: the narrowest first, as many as are asked for, then all together.

    Args:
        n: number of parts, at least 1.
        asked: width and number; that of no part counts.

    Returns:
        ``(start, stop)`` of each.
    """
    widths = range(1, min(asked.width, n - 1) + 1)
    some = [(a, a + width) for width in widths for a in range(n - width + 1)]
    return [*some[: max(asked.most - 2, 0)], (0, n)]


def owen_shapley(values: Mapping[Span, float], n: int, even: bool = False) -> list[float]:
    """Credit parts with what they add to the coalitions that are known.

    phi_i = sum over S without i, S and S + i both known, of (v(S + i) - v(S)) / (n C(n - 1, |S|)),
    Shapley's value where every coalition is known (one or two parts): only then is their sum the
    value of all. Runs know few coalitions of many parts, and more of those at both ends: with
    ``even`` the weights of each part are divided by their sum, so that a part which always adds
    the same is credited with just that.

    Args:
        values: v by run ``(start, stop)``, finite; v of no part is 0 and not among them.
        n: number of parts.
        even: see above.

    Returns:
        n values; 0 of a part of which no pair is known.
    """
    credit, weights = [0.0] * n, [0.0] * n

    def add(part: int, size: int, difference: float) -> None:
        weight = 1.0 / (n * comb(n - 1, size))
        credit[part] += weight * difference
        weights[part] += weight

    for (start, stop), value in values.items():
        if stop - start == 1:
            add(start, 0, value)
            continue
        for part, rest in ((start, (start + 1, stop)), (stop - 1, (start, stop - 1))):
            if rest in values:
                add(part, stop - start - 1, value - values[rest])
    if even:
        return [c / w if w else 0.0 for c, w in zip(credit, weights, strict=True)]
    return credit


def part_worths(
    task: Task, example: Example, completion: str, asked: Coalitions
) -> tuple[Worth, ...]:
    """Ask a task for the parts of a completion and credit each.

    Neighbours are taken together where there are more parts than coalitions.

    Args:
        task: a `PartedTask`.
        example: the problem.
        completion: its text.
        asked: which coalitions.

    Returns:
        Spans and values in the order of the text; none where there are fewer than two parts.

    Raises:
        UserError: the task returned something that cannot be used.
    """
    assert isinstance(task, PartedTask)
    spans = _checked_spans(task.name, completion, task.segments(example, completion))
    if len(spans) < 2:
        return ()
    n = min(len(spans), max(asked.most - 2, 1))
    cuts = [k * len(spans) // n for k in range(n + 1)]
    known = runs(n, asked)
    found = task.score_segments(
        example, completion, [range(cuts[start], cuts[stop]) for start, stop in known]
    )
    values = dict(zip(known, _checked_values(task.name, found, len(known)), strict=True))
    credit = owen_shapley(values, n, asked.even)
    return tuple(
        (*spans[part], credit[group])
        for group in range(n)
        for part in range(cuts[group], cuts[group + 1])
    )


def _checked_spans(name: str, completion: str, found: object) -> list[Span]:
    spans: list[Span] = []
    end = 0
    try:
        for start, stop in found:  # type: ignore[attr-defined]
            spans.append((int(start), int(stop)))
            if not end <= spans[-1][0] < spans[-1][1] <= len(completion):
                raise ValueError
            end = spans[-1][1]
    except (TypeError, ValueError):
        raise UserError(
            f"task {name}: segments returned {ascii(found)[:200]}; return ascending spans (start, "
            f"stop) within the completion's {len(completion)} characters, none of them empty"
        ) from None
    return spans


def _checked_values(name: str, found: object, count: int) -> list[float]:
    try:
        values = [float(value) for value in found]  # type: ignore[attr-defined]
    except (TypeError, ValueError, OverflowError):
        values = []
    if len(values) != count or not all(map(isfinite, values)):
        raise UserError(
            f"task {name}: score_segments returned {ascii(found)[:200]}; return {count} finite "
            "numbers, one for each set of parts"
        )
    return values
