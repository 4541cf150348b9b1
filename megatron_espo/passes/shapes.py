"""Which rows x positions a micro-batch has: exact ones, or few different ones.

Every position of padding is computed for nothing, so on a CPU a micro-batch is as wide as its
longest row and has no more rows than there are. On a GPU cuDNN's attention, which Transformer
Engine calls, builds a graph for each new shape and keeps it to the end of the run; with rows that
leave one by one and prompts of all lengths there would be thousands. There the shapes come from a
short list that is the same for the whole run:

* 16 widths, from the longest that --seq-length allows down to the completion's, in equal ratios;
* full micro-batches and eighths of them, filled up with copies of a row; those that are not full,
  the last ones of a rollout whose rows leave early, have every fourth width only.

ELBOs and updates, whose micro-batches are always full, thus have 16 shapes at most. The grid of a
rollout has 16 + 7 x 4, of which a run visits fewer, because what is left at the end are the
shortest rows; docs/performance.md has counts. A row is at most one ratio too wide: 6% with
--seq-length 656 and completions of 256, 3% on average.
"""

from dataclasses import dataclass

_NUM_WIDTHS = 16
# Micro-batches that are not full have every n-th width.
_COARSE = 4
# Rows are multiples of this part of a full micro-batch.
_PARTS = 8


def round_up(width: int, multiple: int) -> int:
    """Round a number of positions up to a multiple."""
    return -(-width // multiple) * multiple


def few_widths(shortest: int, longest: int, multiple: int) -> tuple[int, ...]:
    """Spread a few widths evenly, by their ratio, over all that rows can have.

    Args:
        shortest: positions of the shortest row.
        longest: positions of the longest row.
        multiple: widths are multiples of this.

    Returns:
        Widths in ascending order; the last one holds the longest row.
    """
    ratio = max(longest / shortest, 1.0) ** (1 / _NUM_WIDTHS)
    steps = (round(longest / ratio**i) for i in range(_NUM_WIDTHS))
    return tuple(sorted({round_up(step, multiple) for step in steps}))


@dataclass(frozen=True)
class Shapes:
    """The shapes that micro-batches may have.

    Attributes:
        multiple: positions are a multiple of this.
        widths: the widths there are, in ascending order; empty: every multiple, and as many rows
            as there are.
    """

    multiple: int = 1
    widths: tuple[int, ...] = ()

    def width(self, needed: int, *, full: bool = True) -> int:
        """Choose the positions of a micro-batch.

        Args:
            needed: positions of its longest row.
            full: whether it has the most rows that one may have.

        Returns:
            At least ``needed``. Rows beyond the widest width get their own.
        """
        widths = self.widths if full else self.widths[::-1][::_COARSE][::-1]
        fitting = (width for width in widths if width >= needed)
        return next(fitting, round_up(needed, self.multiple))

    def rows(self, needed: int, most: int) -> int:
        """Choose the rows of a micro-batch.

        Args:
            needed: rows that there are.
            most: rows of a full micro-batch.

        Returns:
            At least ``needed``: as many eighths of ``most`` as it takes.
        """
        if not self.widths:
            return needed
        sizes = (round_up(most * part, _PARTS) // _PARTS for part in range(1, _PARTS + 1))
        return next(size for size in sizes if size >= needed)

    def fit(self, rows: int, longest: int, most: int) -> tuple[int, int]:
        """Choose rows and positions of a micro-batch that may be full or not.

        Args:
            rows: rows that there are.
            longest: positions of the longest of them.
            most: rows of a full micro-batch.

        Returns:
            Rows and positions.
        """
        size = self.rows(rows, most)
        return size, self.width(longest, full=size == most)

    def room(self, longest: int) -> int:
        """Positions of the widest micro-batch that a row may be in, full or not."""
        return max(self.width(longest), self.width(longest, full=False))
