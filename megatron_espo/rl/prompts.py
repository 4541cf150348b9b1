"""The order in which a run sees a task's problems."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

from megatron_espo.data.tokenizer import encode_prompt
from megatron_espo.random import permutation, stream
from megatron_espo.rl.types import Prompt
from megatron_espo.tasks.base import Example


def encode_examples(
    tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example], room: int, source: str
) -> list[tuple[int, ...]]:
    """Tokenize the prompts of a data set.

    Args:
        tokenizer: the tokenizer.
        examples: the problems.
        room: most tokens a prompt may have.
        source: where they come from, for the error message.

    Returns:
        Token ids per example.

    Raises:
        ValueError: for a prompt that is empty or does not fit; prompts are never cut.
    """
    encoded = [tuple(encode_prompt(tokenizer, example.prompt)) for example in examples]
    for number, ids in enumerate(encoded, start=1):
        if not 0 < len(ids) <= room:
            raise ValueError(
                f"{source}: the prompt of problem {number} has {len(ids)} tokens but 1 to {room} "
                "fit; raise --seq-length, lower --rollout-completion-length or drop the problem."
            )
    return encoded


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
