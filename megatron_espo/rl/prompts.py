"""The order in which a run sees a task's problems."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_espo.config import MOST_REFILLS
from megatron_espo.evaluation.problems import Share
from megatron_espo.random import permutation, stream, uniform
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
    shares: Sequence[Share] = (),
    refills: Sequence[Refill] = (),
) -> list[Prompt]:
    """Pick the problems of one rollout: epochs over the data, each in an order of its own.

    With several tasks each group is of one of them, drawn by the weights; each task has its own
    epochs.

    Args:
        rollout: number of the rollout in the run.
        prompts_per_rollout: prompts over all ranks.
        examples: the data set.
        encoded: its prompts.
        seed: the run's seed.
        shares: of several tasks, which problems are of which.
        refills: further prompts, and the places that they take.

    Returns:
        The same prompts on every rank; the group ids of those without ``refills`` count through the
        run.
    """
    groups = range(rollout * prompts_per_rollout, (rollout + 1) * prompts_per_rollout)
    places = _indices(groups, len(examples), seed, shares)
    prompts = [Prompt(group, encoded[places[group]], examples[places[group]]) for group in groups]
    if refills:
        further = further_prompts(rollout, prompts_per_rollout, examples, encoded, seed, shares)
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
    shares: Sequence[Share] = (),
) -> list[Prompt]:
    """Put the problems that a rollout does not have into an order of its own.

    With several tasks they are of any, as many of each as its data has: weights do not count.

    Args:
        rollout: see :func:`prompts_of_rollout`.
        prompts_per_rollout: see :func:`prompts_of_rollout`.
        examples: see :func:`prompts_of_rollout`.
        encoded: see :func:`prompts_of_rollout`.
        seed: see :func:`prompts_of_rollout`.
        shares: see :func:`prompts_of_rollout`.

    Returns:
        MOST_REFILLS of them at most, the same on every rank. Their group ids are theirs alone.
    """
    groups = range(rollout * prompts_per_rollout, (rollout + 1) * prompts_per_rollout)
    taken = set(_indices(groups, len(examples), seed, shares).values())
    order = permutation(stream(seed, "further-prompts", rollout), len(examples)).tolist()
    first = _FURTHER + rollout * MOST_REFILLS
    left = [index for index in order if index not in taken][:MOST_REFILLS]
    return [
        Prompt(first + number, encoded[index], examples[index]) for number, index in enumerate(left)
    ]


def _indices(groups: range, size: int, seed: int, shares: Sequence[Share]) -> dict[int, int]:
    """Places in the data of the problems of groups."""
    if not shares:
        return _places(groups, size, seed, "prompt-order")
    places: dict[int, int] = {}
    # All groups of the run so far: which problem of its task comes next is their number.
    tasks = task_draws(groups.stop, shares, seed)
    for number, share in enumerate(shares):
        own = (tasks == number).nonzero()[:, 0].tolist()
        wanted = [place for place, group in enumerate(own) if group >= groups.start]
        found = _places(wanted, share.size, seed, f"prompt-order/{share.task}")
        places |= {own[place]: share.first + index for place, index in found.items()}
    return places


def task_draws(count: int, shares: Sequence[Share], seed: int) -> Tensor:
    """Draw the tasks of the first groups of a run.

    Args:
        count: groups.
        shares: the tasks.
        seed: the run's seed.

    Returns:
        int64 ``[count]``, places in ``shares``; a task's share of them is that of its weight.
    """
    weights = torch.tensor([share.weight for share in shares], dtype=torch.float64)
    ends = weights.cumsum(0) / weights.sum()
    draws = uniform(stream(seed, "task-of-group"), torch.arange(count), 1)[:, 0]
    return torch.bucketize(draws, ends[:-1])


def _places(numbers: Sequence[int], size: int, seed: int, purpose: str) -> dict[int, int]:
    """Look problems up by their numbers in the epochs of a data set."""
    orders: dict[int, list[int]] = {}
    found = {}
    for number in numbers:
        epoch, place = divmod(number, size)
        if epoch not in orders:
            orders[epoch] = permutation(stream(seed, purpose, epoch), size).tolist()
        found[number] = orders[epoch][place]
    return found
