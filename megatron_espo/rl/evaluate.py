"""Held-out accuracy of a policy on a task."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedTokenizerFast

from megatron_espo.config import RolloutConfig
from megatron_espo.generation.sampler import generate
from megatron_espo.model.handle import DiffusionModel
from megatron_espo.parallel.layout import sum_over_data_parallel
from megatron_espo.rl.rollout import completion_lengths, score_completions
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
) -> Evaluation:
    """Complete each problem once, greedily, and score it.

    Args:
        model: the policy, in evaluation mode.
        task: the task.
        examples: held-out problems, the same on every rank; split over data-parallel ranks.
        encoded: their prompts.
        tokenizer: the tokenizer.
        config: sampling settings; the temperature is taken as 0.
        seed: seed of orders that are random.

    Returns:
        The means.
    """
    layout = model.layout
    mine = list(range(layout.dp_rank, len(examples), layout.dp_size))
    greedy = replace(config, temperature=0.0)
    generation = generate(
        model, [encoded[i] for i in mine], torch.tensor(mine), greedy, seed, "evaluation"
    )
    _, scores = score_completions(
        task,
        [examples[i] for i in mine],
        generation.completions,
        tokenizer,
        model.stop_token_ids,
        layout,
    )
    lengths = completion_lengths(generation.completions, model.stop_token_ids)
    sums = torch.tensor(
        [
            float(sum(score.correct for score in scores)),
            sum(score.reward for score in scores),
            float(lengths.sum()),
            float(len(mine)),
        ],
        dtype=torch.float64,
        device=model.device,
    )
    correct, reward, length, count = sum_over_data_parallel(sums, layout).tolist()
    return Evaluation(correct / count, reward / count, length / count, int(count))
