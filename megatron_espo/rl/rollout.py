"""Samples and scores the completions of a rollout on this data-parallel rank."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from megatron_espo.config import EspoConfig, RolloutConfig
from megatron_espo.data.batch import pack_sequences
from megatron_espo.data.tokenizer import decode_completion
from megatron_espo.generation.sampler import Generation, generate
from megatron_espo.model.handle import DiffusionModel
from megatron_espo.parallel.layout import Layout
from megatron_espo.rl.advantages import leave_one_out
from megatron_espo.rl.types import Prompt, Rollout
from megatron_espo.tasks.base import Example, Score, Task


def local_share(prompts: Sequence[Prompt], layout: Layout) -> list[Prompt]:
    """Take this data-parallel rank's prompts; a group never leaves its rank."""
    share = len(prompts) // layout.dp_size
    return list(prompts[layout.dp_rank * share : (layout.dp_rank + 1) * share])


def sample(
    model: DiffusionModel,
    prompts: Sequence[Prompt],
    config: RolloutConfig,
    group_size: int,
    seed: int,
) -> tuple[Generation, Tensor]:
    """Sample a group of completions for each prompt.

    Args:
        model: the policy, in evaluation mode.
        prompts: this rank's prompts.
        config: sampling settings.
        group_size: completions per prompt G.
        seed: the run's seed.

    Returns:
        The completions, group by group, and their global sample ids, int64 ``[n]``.
    """
    groups = torch.tensor([prompt.group_id for prompt in prompts], dtype=torch.int64)
    sample_ids = (groups[:, None] * group_size + torch.arange(group_size)).flatten()
    rows = [prompt.token_ids for prompt in prompts for _ in range(group_size)]
    return generate(model, rows, sample_ids, config, seed, "rollout"), sample_ids


def score_completions(
    task: Task,
    examples: Sequence[Example],
    completions: Tensor,
    tokenizer: PreTrainedTokenizerFast,
    stop_token_ids: Sequence[int],
    layout: Layout,
) -> tuple[list[str], list[Score]]:
    """Decode completions up to their first stop token and score them.

    One rank of each model-parallel group scores, the others receive: a reward may be costly, and
    one that depends on time must not differ between the ranks of one model.

    Args:
        task: the task.
        examples: the problem of each completion.
        completions: int64 ``[n, l]``.
        tokenizer: the tokenizer.
        stop_token_ids: tokens that end a completion.
        layout: process groups.

    Returns:
        Texts and scores, n each.
    """
    texts = [decode_completion(tokenizer, ids, stop_token_ids) for ids in completions.tolist()]
    scores: list[Score] = []
    if layout.mp.rank() == 0:
        scores = [task.score(e, text) for e, text in zip(examples, texts, strict=True)]
    if layout.mp.size() > 1:
        box = [scores]
        dist.broadcast_object_list(box, dist.get_global_rank(layout.mp, 0), group=layout.mp)
        scores = box[0]
    return texts, scores


def completion_lengths(completions: Tensor, stop_token_ids: Sequence[int]) -> Tensor:
    """Count the tokens before the first stop token: int64 ``[n]``."""
    stops = torch.isin(completions, torch.tensor(list(stop_token_ids)))
    return (stops.cumsum(dim=1) == 0).sum(dim=1)


def score_rollout(
    model: DiffusionModel,
    task: Task,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Prompt],
    generation: Generation,
    sample_ids: Tensor,
    espo: EspoConfig,
) -> Rollout:
    """Score sampled completions and compare each with its group.

    Args:
        model: the policy.
        task: the task.
        tokenizer: the tokenizer.
        prompts: this rank's prompts.
        generation: their completions, group by group.
        sample_ids: int64 ``[n]``.
        espo: group size and kind of advantage.

    Returns:
        The rollout.
    """
    examples = [prompt.example for prompt in prompts for _ in range(espo.group_size)]
    texts, scores = score_completions(
        task, examples, generation.completions, tokenizer, model.stop_token_ids, model.layout
    )
    rewards = torch.tensor([score.reward for score in scores], dtype=torch.float64)
    groups = rewards.view(len(prompts), espo.group_size)
    return Rollout(
        sequences=pack_sequences(
            [prompt.token_ids for prompt in prompts for _ in range(espo.group_size)],
            generation.completions,
            model.pad_token_id,
            model.pad_multiple,
        ),
        sample_ids=sample_ids,
        indices=sample_ids % espo.completions_per_rollout,
        scores=scores,
        rewards=rewards,
        advantages=leave_one_out(groups, espo.advantage_std_norm).flatten().float(),
        texts=texts,
        completion_lengths=completion_lengths(generation.completions, model.stop_token_ids),
        num_evaluations=generation.num_evaluations,
    )
