"""The order in which a run sees a task's problems."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_espo.evaluation.problems import Share
from megatron_espo.random import permutation, stream, uniform
from megatron_espo.rl.types import Prompt
from megatron_espo.tasks.base import Example


def prompts_of_rollout(
    rollout: int,
    prompts_per_rollout: int,
    examples: Sequence[Example],
    encoded: Sequence[tuple[int, ...]],
    seed: int,
    shares: Sequence[Share] = (),
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

    Returns:
        The same prompts on every rank; their group ids count through the run.
    """
    first = rollout * prompts_per_rollout
    groups = range(first, first + prompts_per_rollout)
    if not shares:
        places = _places(groups, len(examples), seed, "prompt-order")
    else:
        places = {}
        # All groups of the run so far: which problem of its task comes next is their number.
        tasks = task_draws(groups.stop, shares, seed)
        for number, share in enumerate(shares):
            own = (tasks == number).nonzero()[:, 0].tolist()
            wanted = [place for place, group in enumerate(own) if group >= first]
            found = _places(wanted, share.size, seed, f"prompt-order/{share.task}")
            places |= {own[place]: share.first + index for place, index in found.items()}
    return [Prompt(group, encoded[places[group]], examples[places[group]]) for group in groups]


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
