"""Further prompts in the place of those whose completions all have the same reward.

Such a group has no advantages and, without a KL penalty, no gradient (DAPO, arXiv 2503.14476,
section 3.2, samples until every group has some). Which prompt goes where follows from the rewards
of all ranks, so that it does not depend on the layout.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_espo.evaluation.scoring import completion_lengths
from megatron_espo.generation.sampler import Generation
from megatron_espo.parallel.layout import Layout
from megatron_espo.rl.types import Discarded, Prompt, Refill
from megatron_espo.tasks.base import Score


class Completed(NamedTuple):
    """Scored completions of some prompts, group by group.

    Attributes:
        prompts: p prompts.
        generation: their p G completions.
        texts: the completions as text.
        scores: their scores.
    """

    prompts: Sequence[Prompt]
    generation: Generation
    texts: Sequence[str]
    scores: Sequence[Score]

    def with_spread(self, group_size: int) -> list[bool]:
        """Say which groups have more than one reward."""
        rewards = [score.reward for score in self.scores]
        groups = (rewards[i : i + group_size] for i in range(0, len(rewards), group_size))
        return [min(group) != max(group) for group in groups]


class Unscored(NamedTuple):
    """Completions of some prompts whose scores are on their way.

    Attributes:
        prompts: p prompts.
        generation: their p G completions.
        score: waits for the completions as text and their scores, on all ranks together.
    """

    prompts: Sequence[Prompt]
    generation: Generation
    score: Callable[[], tuple[Sequence[str], Sequence[Score]]]

    def scored(self) -> Completed:
        """Wait for the scores."""
        return Completed(self.prompts, self.generation, *self.score())


class Refilled(NamedTuple):
    """A rollout with further prompts.

    Attributes:
        completed: this rank's completions, one group for each of its places.
        refills: the further prompts of all ranks and their places.
        discarded: this rank's other completions; None where none were looked for.
    """

    completed: Completed
    refills: tuple[Refill, ...]
    discarded: Discarded | None


def refill(
    first: Completed,
    further: Sequence[Prompt],
    complete: Callable[[Sequence[Prompt]], Completed | None],
    group_size: int,
    layout: Layout,
    stop_token_ids: Sequence[int],
) -> Refilled | None:
    """Replace groups without spread, as long as there are any and further prompts for them.

    The places without spread, in ascending order, each get the next further prompt; of these, those
    that have spread stay, and the other places get the next ones.

    Args:
        first: this rank's completions.
        further: prompts, in the order in which they are taken.
        complete: samples and scores prompts; called on all ranks together, with the prompts of each
            rank's own places. None where the run is told to stop, on all ranks.
        group_size: G.
        layout: process groups.
        stop_token_ids: ids that end a completion.

    Returns:
        The completions, or None where the run is told to stop.
    """
    share = len(first.prompts)
    start = layout.dp_rank * share
    parts = [first]
    # By place of this rank: the part and the group there that is learnt from.
    kept, refills = [(0, group) for group in range(share)], dict[int, int]()
    rest: list[tuple[int, int, int]] = []  # places, parts and groups of the others
    used = 0
    missing = _places_without_spread(
        first.with_spread(group_size), range(start, start + share), layout
    )
    while missing and used < len(further):
        asked = dict(zip(missing, range(used, len(further)), strict=False))
        used += len(asked)
        mine = [place for place in asked if start <= place < start + share]
        part = complete([further[asked[place]] for place in mine])
        if part is None:
            return None
        spread = part.with_spread(group_size)
        for group, (place, stays) in enumerate(zip(mine, spread, strict=True)):
            new = (len(parts), group)
            rest.append((place, *(kept[place - start] if stays else new)))
            kept[place - start] = new if stays else kept[place - start]
        parts.append(part)
        without = set(_places_without_spread(spread, mine, layout))
        refills |= {place: number for place, number in asked.items() if place not in without}
        missing = sorted(without | (set(missing) - set(asked)))
    every = tuple(Refill(place, number) for place, number in sorted(refills.items()))
    rest.sort()
    left = _take(parts, [entry[1:] for entry in rest], group_size)
    return Refilled(
        _take(parts, kept, group_size),
        every,
        Discarded(
            places=torch.tensor([place for place, *_ in rest], dtype=torch.int64),
            scores=left.scores,
            completion_lengths=completion_lengths(left.generation.completions, stop_token_ids),
            num_evaluations=left.generation.num_evaluations,
            num_committed=left.generation.num_committed,
            mean_confidence=left.generation.mean_confidence,
            work=left.generation.work,
        ),
    )


def _places_without_spread(
    spread: Sequence[bool], places: Sequence[int], layout: Layout
) -> list[int]:
    """Bring together, over the data-parallel ranks, the places whose group has no spread."""
    mine = [place for place, has in zip(places, spread, strict=True) if not has]
    every: list[list[int]] = [mine]
    if layout.dp_size > 1:
        every = [mine] * layout.dp_size
        dist.all_gather_object(every, mine, group=layout.dp)
    return sorted(place for part in every for place in part)


def _take(
    parts: Sequence[Completed], picks: Sequence[tuple[int, int]], group_size: int
) -> Completed:
    """Put groups of several parts, ``(part, group)`` each, side by side."""
    rows = [(p, g * group_size + i) for p, g in picks for i in range(group_size)]
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + len(part.scores))
    index = torch.tensor([starts[p] + row for p, row in rows], dtype=torch.int64)
    columns: list[Tensor] = [
        torch.cat(column)[index]
        for column in zip(*(part.generation for part in parts), strict=True)
    ]
    return Completed(
        [parts[p].prompts[g] for p, g in picks],
        Generation(*columns),
        [parts[p].texts[row] for p, row in rows],
        [parts[p].scores[row] for p, row in rows],
    )
