"""Held-out accuracy of a policy on a task."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_espo.config import RolloutConfig
from megatron_espo.data.tokenizer import FastTokenizer
from megatron_espo.errors import UserError
from megatron_espo.evaluation.problems import blend_of
from megatron_espo.evaluation.scoring import (
    completion_lengths,
    decode_completions,
    score_completions,
)
from megatron_espo.generation.sampler import Interrupted, generate
from megatron_espo.model.handle import DiffusionModel
from megatron_espo.parallel.layout import raise_on_all, sum_over_data_parallel
from megatron_espo.tasks.base import Example, Score, Task
from megatron_espo.transfer import on_device

# Completions of one problem draw their noise under ids this far apart; the first one's id is the
# problem's number.
_SAMPLES_APART = 1 << 32


class Scored(NamedTuple):
    """Completions of some problems and their scores.

    Attributes:
        completions: int64 ``[n, l]`` on the host.
        texts: n texts before the end of sequence.
        scores: n scores.
        lengths: int64 ``[n]``, tokens before the end of sequence.
        num_evaluations: int64 ``[n]``, model evaluations.
        num_committed: int64 ``[n]``, tokens that the model decided.
        mean_confidence: float32 ``[n]``, their mean probability when they were committed.
    """

    completions: Tensor
    texts: list[str]
    scores: list[Score]
    lengths: Tensor
    num_evaluations: Tensor
    num_committed: Tensor
    mean_confidence: Tensor


def complete_problems(
    model: DiffusionModel,
    task: Task,
    examples: Sequence[Example],
    encoded: Sequence[tuple[int, ...]],
    items: Sequence[tuple[int, int]],
    tokenizer: FastTokenizer,
    config: RolloutConfig,
    seed: int,
    on_step: Callable[[Tensor], None] | None = None,
) -> Scored:
    """Complete problems and score the completions.

    A completion is a function of the seed, its problem's number and its own: it does not depend on
    what is completed beside it.

    Args:
        model: the policy, in evaluation mode.
        task: scores, in reward workers where it has some.
        examples: all problems.
        encoded: their prompts.
        items: n pairs of a problem's number and a sample's number: this rank's share.
        tokenizer: decodes what is scored.
        config: sampling settings.
        seed: seed of orders and tokens that are random.
        on_step: see generation.sampler.

    Returns:
        The completions, in the order of ``items``.

    Raises:
        Interrupted: ``on_step`` broke the sampling off.
        UserError: see `score_completions`.
    """
    ids = torch.tensor([problem + sample * _SAMPLES_APART for problem, sample in items])
    generation = generate(
        model,
        [encoded[problem] for problem, _ in items],
        ids.long(),
        config,
        seed,
        "evaluation",
        on_step,
    )
    completions = generation.completions
    texts = decode_completions(completions, tokenizer, model.stop_token_ids)
    scores = score_completions(
        task, [examples[problem] for problem, _ in items], texts, model.layout
    )
    return Scored(
        completions,
        texts,
        scores,
        completion_lengths(completions, model.stop_token_ids),
        generation.num_evaluations,
        generation.num_committed,
        generation.mean_confidence,
    )


class TaskResult(NamedTuple):
    """Means over the held-out problems of one task of several."""

    accuracy: float
    reward: float
    num_problems: int


@dataclass(frozen=True)
class Evaluation:
    """Means over all held-out problems, equal on all ranks.

    Attributes:
        accuracy: share of exact successes.
        reward: mean reward.
        completion_length: mean tokens before the end of sequence.
        num_problems: problems evaluated.
        nfe: mean model evaluations per completion.
        tokens_per_step: tokens that a model evaluation committed on average.
        confidence: mean probability of the committed tokens.
        by_task: of several tasks, those that have held-out problems.
    """

    accuracy: float
    reward: float
    completion_length: float
    num_problems: int
    nfe: float
    tokens_per_step: float
    confidence: float
    by_task: Mapping[str, TaskResult] = field(default_factory=dict)


def evaluate_task(
    model: DiffusionModel,
    task: Task,
    examples: Sequence[Example],
    encoded: Sequence[tuple[int, ...]],
    tokenizer: FastTokenizer,
    config: RolloutConfig,
    seed: int,
    on_step: Callable[[Tensor], None] | None = None,
) -> Evaluation | None:
    """Complete each problem once, greedily, and score it.

    Args:
        model: the policy, in evaluation mode.
        task: scores, in reward workers where it has some.
        examples: held-out problems, the same on every rank; split over data-parallel ranks.
        encoded: their prompts.
        tokenizer: decodes what is scored.
        config: sampling settings; taken at temperature 0.
        seed: seed of orders that are random.
        on_step: see generation.sampler.

    Returns:
        The means, or None if ``on_step`` broke the sampling off on some rank.

    Raises:
        UserError: the task's score returned something that cannot be used; on every rank.
    """
    layout = model.layout
    mine = [(i, 0) for i in range(layout.dp_rank, len(examples), layout.dp_size)]
    greedy = config.greedy()
    blend = blend_of(task)
    names = list(blend.parts) if blend else []
    sums, mistake = torch.zeros(9 + 3 * len(names), dtype=torch.float64), None
    try:
        scored = complete_problems(
            model, task, examples, encoded, mine, tokenizer, greedy, seed, on_step
        )
    except Interrupted:
        sums[4] = 1.0
    except UserError as error:
        sums[8], mistake = 1.0, error
    else:
        sums[0] = sum(score.correct for score in scored.scores)
        sums[1] = sum(score.reward for score in scored.scores)
        sums[2] = float(scored.lengths.sum())
        sums[3] = len(mine)
        sums[5] = float(scored.num_evaluations.sum())
        sums[6] = float(scored.num_committed.sum())
        sums[7] = float(scored.mean_confidence.double().sum())
        for place, name in enumerate(names):
            own = [score for score in scored.scores if score.task == name]
            found = (sum(s.correct for s in own), sum(s.reward for s in own), len(own))
            sums[9 + 3 * place : 12 + 3 * place] = torch.tensor(found, dtype=torch.float64)
    # One copy of the model may be interrupted when another is not: the flag travels with the sums.
    totals = sum_over_data_parallel(on_device(sums, model.device), layout).tolist()
    of_all, of_tasks = totals[:9], totals[9:]
    correct, reward, length, count, interrupted, evaluations, committed, confidence, wrong = of_all
    parts = zip(names, of_tasks[::3], of_tasks[1::3], of_tasks[2::3], strict=True)
    if wrong:
        raise_on_all(mistake, layout)
    if interrupted:
        return None
    return Evaluation(
        accuracy=correct / count,
        reward=reward / count,
        completion_length=length / count,
        num_problems=int(count),
        nfe=evaluations / count,
        tokens_per_step=committed / evaluations,
        confidence=confidence / count,
        by_task={name: TaskResult(c / n, r / n, int(n)) for name, c, r, n in parts if n},
    )
