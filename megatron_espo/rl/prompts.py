"""The order in which a run sees a task's problems."""

from collections.abc import Sequence

from megatron_espo.random import permutation, stream
from megatron_espo.rl.types import Prompt
from megatron_espo.tasks.base import Example


def prompts_of_rollout(
    rollout: int,
    prompts_per_rollout: int,
    examples: Sequence[Example],
    encoded: Sequence[tuple[int, ...]],
    seed: int,
) -> list[Prompt]:
    """Pick the problems of one rollout: epochs over the data, each in an order of its own.

    Args:
        rollout: number of the rollout in the run.
        prompts_per_rollout: prompts over all ranks.
        examples: the data set.
        encoded: its prompts.
        seed: the run's seed.

    Returns:
        The same prompts on every rank; their group ids count through the run.
    """
    size = len(examples)
    orders: dict[int, list[int]] = {}
    prompts = []
    first = rollout * prompts_per_rollout
    for group_id in range(first, first + prompts_per_rollout):
        epoch, place = divmod(group_id, size)
        if epoch not in orders:
            orders[epoch] = permutation(stream(seed, "prompt-order", epoch), size).tolist()
        index = orders[epoch][place]
        prompts.append(Prompt(group_id, encoded[index], examples[index]))
    return prompts
