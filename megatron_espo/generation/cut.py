"""Cuts the rows of a denoising step into passes of few shapes (no model, no process groups).

Rows of unlike length in one pass are padded to the longest of them, and a row count that is not on
the list is filled up with copies. More passes need less of both, but each has a cost of its own.
What is chosen takes the least time by this count: a pass of b rows and w positions costs b w +
``PASS``, in positions. Of p pipeline stages each begins the next pass when it has handed one on, so
that the last one ends after the sum of the passes and p - 1 times the longest.
"""

from collections.abc import Sequence
from typing import NamedTuple

from megatron_espo.passes.shapes import Shapes

# What a pass costs beside its positions. It reads all weights, which with 2 bytes each at 3.35 TB/s
# takes as long as 295 positions of 2 operations per weight at 989 TFLOPS (an H100's data sheet);
# tensor-parallel ranks share both alike. The rest stands for its launches.
PASS = 384


class Cut(NamedTuple):
    """Rows that pass together.

    Attributes:
        start: place of the first one.
        stop: place after the last one.
        rows: rows of the pass; more than there are where copies fill it up.
        positions: its positions.
    """

    start: int
    stop: int
    rows: int
    positions: int


def cut(
    lengths: Sequence[int], most: int, shapes: Shapes, stages: int = 1, together: int = 1
) -> list[Cut]:
    """Cut the rows of a step into passes.

    Args:
        lengths: positions of each row, in descending order.
        most: rows of a pass at most.
        shapes: the shapes that there are.
        stages: pipeline stages.
        together: passes of one shape are made in multiples of this: the interleaved schedule of
            virtual pipeline stages fills them up.

    Returns:
        The passes, in the order of the rows.
    """
    sizes = shapes.sampled_rows(most)
    widths = [shapes.sampled_width(length) for length in lengths]
    found: list[Cut] = []
    least = float("inf")
    # Which pass is the longest is known only afterwards: try every limit. Without stages the
    # largest sizes may just as well be left unused.
    for number in range(1 if stages > 1 else len(sizes), len(sizes) + 1):
        cost, cuts = _cheapest(widths, sizes[:number], together)
        cost += (stages - 1) * max(one.rows * one.positions + PASS for one in cuts)
        if cost < least:
            least, found = cost, cuts
    return found


def _cheapest(
    widths: Sequence[int], sizes: Sequence[int], together: int
) -> tuple[float, list[Cut]]:
    """Choose the passes with the least sum of costs, from the last row to the first.

    Args:
        widths: positions of a pass whose longest row is this one, in descending order.
        sizes: numbers of rows that a pass may have.
        together: see :func:`cut`.

    Returns:
        The sum and the passes.
    """
    n = len(widths)
    costs, chosen = [0.0] * (n + 1), [0] * n
    for i in range(n - 1, -1, -1):
        # A pass takes all the rows that it has places for: those after them only become fewer.
        costs[i], chosen[i] = min(
            (together * (size * widths[i] + PASS) + costs[min(i + together * size, n)], size)
            for size in sizes
        )
    cuts, i = [], 0
    while i < n:
        size, end = chosen[i], min(i + together * chosen[i], n)
        cuts += [Cut(j, min(j + size, end), size, widths[i]) for j in range(i, end, size)]
        i = end
    return costs[0], cuts
