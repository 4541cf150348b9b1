"""Samples and scores the completions of a rollout on this data-parallel rank."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_espo.config import EspoConfig, RolloutConfig
from megatron_espo.data.tokenizer import FastTokenizer
from megatron_espo.evaluation.scoring import completion_lengths, decode_completions
from megatron_espo.generation.sampler import Generation, generate
from megatron_espo.model.handle import DiffusionModel
from megatron_espo.objectives.advantages import load_advantage
from megatron_espo.parallel.layout import Layout
from megatron_espo.passes.batch import pack_sequences
from megatron_espo.rewards.workers import Failures, RewardWorkers
from megatron_espo.rl.types import Discarded, Prompt, Refill, Rollout, SampledRollout
from megatron_espo.tasks.base import Example, Score, Task
from megatron_espo.tasks.parts import Coalitions


def local_share(prompts: Sequence[Prompt], layout: Layout) -> list[Prompt]:
    """Take this data-parallel rank's prompts; a group never leaves its rank."""
    share = len(prompts) // layout.dp_size
    return list(prompts[layout.dp_rank * share : (layout.dp_rank + 1) * share])


def sample_ids(prompts: Sequence[Prompt], group_size: int) -> Tensor:
    """Number the completions of prompts through the run: int64 ``[n]``, group by group."""
    groups = torch.tensor([prompt.group_id for prompt in prompts], dtype=torch.int64)
    return (groups[:, None] * group_size + torch.arange(group_size)).flatten()


def sample(
    model: DiffusionModel,
    prompts: Sequence[Prompt],
    config: RolloutConfig,
    group_size: int,
    seed: int,
    on_step: Callable[[Tensor], None] | None = None,
    on_finished: Callable[[Tensor, Tensor], None] | None = None,
    record_steps: bool = False,
) -> Generation:
    """Sample a group of completions for each prompt.

    Args:
        model: the policy, in evaluation mode.
        prompts: this rank's prompts.
        config: sampling settings.
        group_size: completions per prompt G.
        seed: the run's seed.
        on_step: see generation.sampler.
        on_finished: see generation.sampler; rows are numbered group by group.
        record_steps: see generation.sampler.

    Returns:
        The completions, group by group.
    """
    rows = [prompt.token_ids for prompt in prompts for _ in range(group_size)]
    ids = sample_ids(prompts, group_size)
    return generate(model, rows, ids, config, seed, "rollout", on_step, on_finished, record_steps)


class ScoringAhead:
    """Hands completions to reward workers while others are still being sampled.

    Args:
        task: the task; without workers nothing is done ahead.
        examples: the problem of each completion.
        tokenizer: the tokenizer.
        stop_token_ids: ids that end a completion.
        layout: process groups; one rank of each model-parallel group scores.
        coalitions: of parts that are to be scored, too.
    """

    def __init__(
        self,
        task: Task,
        examples: Sequence[Example],
        tokenizer: FastTokenizer,
        stop_token_ids: Sequence[int],
        layout: Layout,
        coalitions: Coalitions | None = None,
    ) -> None:
        self.futures: dict[int, Future[Score]] = {}
        self._workers = (
            task if isinstance(task, RewardWorkers) and layout.is_first_of_samples else None
        )
        self._examples, self._tokenizer, self._stops = examples, tokenizer, stop_token_ids
        self._coalitions = coalitions

    def __call__(self, rows: Tensor, completions: Tensor) -> None:
        """Take finished rows: the sampler's ``on_finished`` hook."""
        if self._workers is None:
            return
        texts = decode_completions(completions, self._tokenizer, self._stops)
        for row, text in zip(rows.tolist(), texts, strict=True):
            self.futures[row] = self._workers.submit(self._examples[row], text, self._coalitions)

    def cancel(self) -> None:
        """Give up what was handed over: the rollout was broken off."""
        for future in self.futures.values():
            future.cancel()


def take_failures(task: Task, layout: Layout) -> Failures:
    """Count what went wrong in all reward workers of the run since the last call.

    Args:
        task: the task, with or without workers.
        layout: process groups.

    Returns:
        The same numbers on every rank.
    """
    mine = task.take_failures() if isinstance(task, RewardWorkers) else Failures(0, 0)
    if dist.get_world_size() > 1:
        # Only the first of the ranks that hold the same samples has workers.
        for group in (layout.mp, layout.cp, layout.dp):
            shares: list[Failures] = [mine] * group.size()
            dist.all_gather_object(shares, mine, group=group)
            mine = Failures(*(sum(column) for column in zip(*shares, strict=True)))
    return mine


def place_completions(
    model: DiffusionModel, prompts: Sequence[Prompt], generation: Generation, group_size: int
) -> SampledRollout:
    """Put completions behind their prompts, and number them through the run.

    Args:
        model: the policy.
        prompts: this rank's prompts.
        generation: their completions, group by group.
        group_size: completions per prompt G.

    Returns:
        The completions, without scores.
    """
    ids = sample_ids(prompts, group_size)
    return SampledRollout(
        sequences=pack_sequences(
            [prompt.token_ids for prompt in prompts for _ in range(group_size)],
            generation.completions,
            model.pad_token_id,
            model.shapes,
        ),
        sample_ids=ids,
        indices=model.layout.dp_rank * len(ids) + torch.arange(len(ids)),
        completion_lengths=completion_lengths(generation.completions, model.stop_token_ids),
        num_evaluations=generation.num_evaluations,
        num_committed=generation.num_committed,
        mean_confidence=generation.mean_confidence,
        work=generation.work,
        commit_steps=generation.commit_steps,
    )


def with_scores(
    sampled: SampledRollout,
    texts: Sequence[str],
    scores: Sequence[Score],
    espo: EspoConfig,
    refills: Sequence[Refill] = (),
    discarded: Discarded | None = None,
) -> Rollout:
    """Give completions their scores, and compare each with its group.

    Args:
        sampled: the completions.
        texts: the completions as text.
        scores: their scores.
        espo: group size and kind of advantage.
        refills: further prompts among those of all ranks.
        discarded: completions that they replaced.

    Returns:
        The rollout.
    """
    rewards = torch.tensor([score.reward for score in scores], dtype=torch.float64)
    advantages = load_advantage(espo.advantage)(rewards.view(-1, espo.group_size))
    return Rollout(
        **vars(sampled),
        scores=scores,
        rewards=rewards,
        advantages=advantages.flatten().float(),
        texts=texts,
        refills=tuple(refills),
        discarded=discarded,
    )
