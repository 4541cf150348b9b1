"""Held-out accuracy of a policy on a task."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from megatron_espo.config import RolloutConfig
from megatron_espo.generation.sampler import Interrupted, generate
from megatron_espo.model.handle import DiffusionModel
from megatron_espo.parallel.layout import sum_over_data_parallel
from megatron_espo.rl.rollout import completion_lengths, decode_completions, score_completions
from megatron_espo.tasks.base import Example, Task


@dataclass(frozen=True)
class Evaluation:
    """Means over all held-out problems, equal on all ranks.

    Attributes:
        accuracy: share of exact successes.
        reward: mean reward.
        completion_length: mean tokens before the end of sequence.
        num_problems: problems evaluated.
    """

    accuracy: float
    reward: float
    completion_length: float
    num_problems: int


def evaluate_task(
    model: DiffusionModel,
    task: Task,
    examples: Sequence[Example],
    encoded: Sequence[tuple[int, ...]],
    tokenizer: PreTrainedTokenizerFast,
    config: RolloutConfig,
    seed: int,
    on_step: Callable[[Tensor], None] | None = None,
) -> Evaluation | None:
    """Complete each problem once, greedily, and score it.

    Args:
        model: the policy, in evaluation mode.
        task: the task.
        examples: held-out problems, the same on every rank; split over data-parallel ranks.
        encoded: their prompts.
        tokenizer: the tokenizer.
        config: sampling settings; the temperature is taken as 0.
        seed: seed of orders that are random.
        on_step: see generation.sampler.

    Returns:
        The means, or None if ``on_step`` broke the sampling off on some rank.
    """
    layout = model.layout
    mine = list(range(layout.dp_rank, len(examples), layout.dp_size))
    greedy = replace(config, temperature=0.0)
    sums = torch.zeros(5, dtype=torch.float64)
    try:
        generation = generate(
            model,
            [encoded[i] for i in mine],
            torch.tensor(mine),
            greedy,
            seed,
            "evaluation",
            on_step,
        )
    except Interrupted:
        sums[4] = 1.0
    else:
        texts = decode_completions(generation.completions, tokenizer, model.stop_token_ids)
        scores = score_completions(task, [examples[i] for i in mine], texts, layout)
        lengths = completion_lengths(generation.completions, model.stop_token_ids)
        sums[0] = sum(score.correct for score in scores)
        sums[1] = sum(score.reward for score in scores)
        sums[2] = float(lengths.sum())
        sums[3] = len(mine)
    # One copy of the model may be interrupted when another is not: the flag travels with the sums.
    totals = sum_over_data_parallel(sums.to(model.device), layout).tolist()
    correct, reward, length, count, interrupted = totals
    if interrupted:
        return None
    return Evaluation(correct / count, reward / count, length / count, int(count))
