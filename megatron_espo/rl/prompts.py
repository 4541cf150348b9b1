"""The order in which a run sees a task's problems."""

from collections.abc import Sequence

from megatron_espo.config import MOST_REFILLS
from megatron_espo.random import permutation, stream
from megatron_espo.rl.types import Prompt, Refill
from megatron_espo.tasks.base import Example

# Further prompts are numbered from here on, MOST_REFILLS for each rollout: no run gets so far.
_FURTHER = 2**40


def prompts_of_rollout(
    rollout: int,
    prompts_per_rollout: int,
    examples: Sequence[Example],
    encoded: Sequence[tuple[int, ...]],
    seed: int,
    refills: Sequence[Refill] = (),
) -> list[Prompt]:
    """Pick the problems of one rollout: epochs over the data, each in an order of its own.

    Args:
        rollout: number of the rollout in the run.
        prompts_per_rollout: prompts over all ranks.
        examples: the data set.
        encoded: its prompts.
        seed: the run's seed.
        refills: further prompts, and the places that they take.

    Returns:
        The same prompts on every rank; the group ids of those without ``refills`` count through the
        run.
    """
    indices = _indices(rollout, prompts_per_rollout, len(examples), seed)
    first = rollout * prompts_per_rollout
    prompts = [
        Prompt(first + place, encoded[index], examples[index])
        for place, index in enumerate(indices)
    ]
    if refills:
        further = further_prompts(rollout, prompts_per_rollout, examples, encoded, seed)
        for place, number in refills:
            # Of other data there may be fewer: then the prompts differ, which is found out.
            if place < len(prompts) and number < len(further):
                prompts[place] = further[number]
    return prompts


def further_prompts(
    rollout: int,
    prompts_per_rollout: int,
    examples: Sequence[Example],
    encoded: Sequence[tuple[int, ...]],
    seed: int,
) -> list[Prompt]:
    """Put the problems that a rollout does not have into an order of its own.

    Args:
        rollout: see :func:`prompts_of_rollout`.
        prompts_per_rollout: see :func:`prompts_of_rollout`.
        examples: see :func:`prompts_of_rollout`.
        encoded: see :func:`prompts_of_rollout`.
        seed: see :func:`prompts_of_rollout`.

    Returns:
        MOST_REFILLS of them at most, the same on every rank. Their group ids are theirs alone.
    """
    taken = set(_indices(rollout, prompts_per_rollout, len(examples), seed))
    order = permutation(stream(seed, "further-prompts", rollout), len(examples)).tolist()
    first = _FURTHER + rollout * MOST_REFILLS
    left = [index for index in order if index not in taken][:MOST_REFILLS]
    return [
        Prompt(first + number, encoded[index], examples[index]) for number, index in enumerate(left)
    ]


def _indices(rollout: int, prompts_per_rollout: int, size: int, seed: int) -> list[int]:
    """Places in the data of a rollout's problems."""
    orders: dict[int, list[int]] = {}
    indices = []
    first = rollout * prompts_per_rollout
    for group_id in range(first, first + prompts_per_rollout):
        epoch, place = divmod(group_id, size)
        if epoch not in orders:
            orders[epoch] = permutation(stream(seed, "prompt-order", epoch), size).tolist()
        indices.append(orders[epoch][place])
    return indices
