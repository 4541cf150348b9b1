"""Which rows x positions a micro-batch has: exact ones, or few different ones.

Every position of padding is computed for nothing, so on a CPU a micro-batch is as wide as its
longest row and has no more rows than there are. On a GPU cuDNN's attention, which Transformer
Engine calls, builds a graph for each new shape and keeps it to the end of the run; with rows that
leave one by one and prompts of all lengths there would be thousands. There the shapes come from a
short list that is the same for the whole run:

* ELBOs and updates, whose micro-batches are always full, have 16 widths, from the longest row of
  the data (where it is not known, of --seq-length) down to the shortest, in equal ratios: 16 shapes
  at most.
* Passes of a rollout have every second of these widths, and a full micro-batch of rows, a third,
  an eighth or a sixteenth of one: 32 shapes at most.
* Micro-batches of fine-tuning, whose rows differ most, have 32 widths between the shortest and the
  longest row of the data.

A denoising step cuts its rows into such passes (generation/cut.py). docs/performance.md counts
shapes and padding. With --seq-length 656 and completions of 256 a row of an ELBO is at most 6% too
wide, one of a rollout 12%, and half of that on average.
"""

from collections.abc import Sequence
from dataclasses import dataclass

_NUM_WIDTHS = 16
# Passes of a rollout have every n-th width,
_COARSE = 2
# and these parts of a full micro-batch: of those tried they left the least padding in simulated
# rollouts with micro-batches of 16 to 64 rows, groups of 6 to 16 and prompts of three kinds.
_PARTS = (1, 3, 8, 16)


def round_up(width: int, multiple: int) -> int:
    """Round a number of positions up to a multiple."""
    return -(-width // multiple) * multiple


def few_widths(
    shortest: int, longest: int, multiple: int, number: int = _NUM_WIDTHS
) -> tuple[int, ...]:
    """Spread a few widths evenly, by their ratio, over all that rows can have.

    Args:
        shortest: positions of the shortest row.
        longest: positions of the longest row.
        multiple: widths are multiples of this.
        number: how many they are at most.

    Returns:
        Widths in ascending order; the last one holds the longest row.
    """
    ratio = max(longest / shortest, 1.0) ** (1 / number)
    steps = (round(longest / ratio**i) for i in range(number))
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

    def width(self, needed: int) -> int:
        """Choose the positions of a micro-batch of an ELBO or an update.

        Args:
            needed: positions of its longest row.

        Returns:
            At least ``needed``. Rows beyond the widest width get their own.
        """
        return self._first(self.widths, needed)

    def sampled_width(self, needed: int) -> int:
        """Choose the positions of a pass of a rollout; see :meth:`width`."""
        return self._first(self.widths[::-1][::_COARSE][::-1], needed)

    def _first(self, widths: Sequence[int], needed: int) -> int:
        fitting = (width for width in widths if width >= needed)
        return next(fitting, round_up(needed, self.multiple))

    def sampled_rows(self, most: int) -> tuple[int, ...]:
        """Say how many rows a pass of a rollout may have.

        Args:
            most: rows of a full micro-batch.

        Returns:
            The numbers, in ascending order; the last one is ``most``.
        """
        return tuple(sorted({-(-most // part) for part in _PARTS}))
