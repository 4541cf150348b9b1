"""Which rows pass through the model together, and which wait (no model, no process groups).

Without pipeline stages one micro-batch is in flight, with them as many as keep every stage busy. A
row that is final leaves, and the next one takes its place. Rows that share a cache go from block to
block together, since a block begins with a whole pass that fills it.

Each micro-batch makes one pass per denoising step. Where the shapes of passes must be few, all rows
in flight are instead cut into passes of like length, step by step.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from megatron_espo.config import RolloutConfig
from megatron_espo.generation.cut import cut
from megatron_espo.generation.remasking import commit_schedule
from megatron_espo.passes.shapes import Shapes, round_up
from megatron_espo.passes.state import KeyValueCache

# Micro-batches in flight per pipeline stage: of p stages each waits for p - 1 passes in 4p + p - 1.
_BATCHES_PER_STAGE = 4


def micro_batches(n: int, most_rows: int, pp_size: int) -> tuple[int, int]:
    """Say how many micro-batches are in flight, and of how many rows.

    Args:
        n: rows to be sampled.
        most_rows: --rollout-micro-batch-size.
        pp_size: pipeline stages.

    Returns:
        Their number and the places of each.
    """
    # Fewer rows than the stages have places for are spread over them.
    size = min(most_rows, -(-n // pp_size))
    most = 1 if pp_size == 1 else _BATCHES_PER_STAGE * pp_size
    return min(most, -(-n // size)), size


@dataclass
class MicroBatch:
    """Places of a micro-batch and the rows that have them.

    Attributes:
        size: rows at most.
        rows: the rows.
        cache: keys and values of the rows in ``cached``, since the last whole pass.
        cached: the rows of the cache, in its order.
    """

    size: int
    rows: list[int] = field(default_factory=list)
    cache: KeyValueCache | None = None
    cached: list[int] = field(default_factory=list)


class Pass(NamedTuple):
    """Rows that pass through the model together in one denoising step.

    Attributes:
        batch: their micro-batch, for its cache; the first one where the rows were cut anew.
        rows: the rows.
        size: rows of the pass; copies fill it up.
        positions: its positions.
    """

    batch: MicroBatch
    rows: list[int]
    size: int
    positions: int


@dataclass
class Scheduler:
    """Rows in flight and rows that wait.

    Attributes:
        config: sampling settings.
        schedule: int64 ``[steps]``, tokens that each step of a block commits.
        waiting: rows that have not begun, in order.
        batches: the micro-batches in flight.
        pp_size: pipeline stages.
        passes: model passes since the rows entered their blocks; counted for caches.
        windows: whether the step under way passes windows of cached rows, not whole rows.
    """

    config: RolloutConfig
    schedule: Tensor
    waiting: deque[int]
    batches: list[MicroBatch]
    pp_size: int = 1
    passes: int = 0
    windows: bool = False

    @classmethod
    def of(cls, n: int, config: RolloutConfig, pp_size: int) -> "Scheduler":
        """Let n rows wait for their turn.

        Args:
            n: rows.
            config: sampling settings.
            pp_size: pipeline stages.
        """
        number, size = micro_batches(n, config.micro_batch_size, pp_size)
        batches = [MicroBatch(size) for _ in range(number)]
        return cls(config, commit_schedule(config), deque(range(n)), batches, pp_size)

    @property
    def rows(self) -> list[int]:
        """All rows in flight, micro-batch by micro-batch."""
        return [row for batch in self.batches for row in batch.rows]

    def admit(self) -> bool:
        """Give free places to waiting rows where they may enter; False when no row is left."""
        cache = self.config.cache
        # Between blocks; rows with windows up to their ends must be in the same block.
        between = self.passes == 0 and (cache == "dual" or not self.rows)
        if cache == "exact":
            for batch in self.batches:
                if batch.rows:
                    continue  # its cache has no place for others
                batch.cache = None
                while self.waiting and len(batch.rows) < batch.size:
                    batch.rows.append(self.waiting.popleft())
        elif cache == "none" or between:
            for batch in self.batches:
                while self.waiting and len(batch.rows) < batch.size:
                    batch.rows.append(self.waiting.popleft())
        return bool(self.rows)

    def passes_of_step(
        self, taking_part: Sequence[int], widths: Sequence[int], shapes: Shapes, together: int
    ) -> list[Pass]:
        """Say which passes a denoising step makes.

        Args:
            taking_part: rows in flight that something will be read of.
            widths: positions of all rows.
            shapes: the shapes that passes may have.
            together: see :func:`megatron_espo.generation.cut.cut`.

        Returns:
            The passes. With pipeline stages those of one shape stand side by side, and without few
            shapes all have one.
        """
        # Attention with caches has no graphs for which the shapes would have to be few.
        if shapes.widths and self.config.cache == "none":
            first = self.batches[0]
            rows = sorted(taking_part, key=lambda row: -widths[row])
            lengths = [widths[row] for row in rows]
            return [
                Pass(first, rows[one.start : one.stop], one.rows, one.positions)
                for one in cut(lengths, first.size, shapes, self.pp_size, together)
            ]
        named = set(taking_part)
        parts = [[row for row in batch.rows if row in named] for batch in self.batches]
        # As wide as the micro-batch's longest row, although that may not take part: caches are.
        longest = [max((widths[row] for row in batch.rows), default=0) for batch in self.batches]
        most, widest = max(len(part) for part in parts), max(longest)
        one_shape = self.pp_size > 1  # then all passes can be made by one call of the schedule
        return [
            Pass(
                batch,
                part,
                most if one_shape else len(part),
                round_up(widest if one_shape else width, shapes.multiple),
            )
            for batch, part, width in zip(self.batches, parts, longest, strict=True)
            if part
        ]

    def leave(self, final: Sequence[int]) -> None:
        """Take out rows that are final."""
        gone = set(final)
        for batch in self.batches:
            batch.rows = [row for row in batch.rows if row not in gone]

    def to_next_block(self, complete: Sequence[bool]) -> list[int]:
        """Say which rows enter their next block now.

        Args:
            complete: of all rows, whether their block is complete.

        Returns:
            The rows; without a cache those that are complete, with an approximate one all or none,
            with an exact one none: they go on by themselves.
        """
        rows = self.rows
        if self.config.cache == "exact":
            return []  # each has its block taken in first
        ready = [row for row in rows if complete[row]]
        if self.config.cache == "none":
            return ready
        if len(ready) < len(rows):
            return []
        self.passes = 0
        return ready
