"""Completions as text, their lengths, and their scores."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future

import torch
from torch import Tensor

from megatron_espo.data.encoding import decode_completion
from megatron_espo.data.tokenizer import FastTokenizer
from megatron_espo.parallel.layout import Layout, object_from_first_of_samples
from megatron_espo.rewards.workers import RewardWorkers, collect
from megatron_espo.tasks.base import Example, Score, Task


def decode_completions(
    completions: Tensor, tokenizer: FastTokenizer, stop_token_ids: Sequence[int]
) -> list[str]:
    """Turn completions into text up to their first stop token."""
    return [decode_completion(tokenizer, ids, stop_token_ids) for ids in completions.tolist()]


def completion_lengths(completions: Tensor, stop_token_ids: Sequence[int]) -> Tensor:
    """Count the tokens before the first stop token: int64 ``[n]``."""
    stops = torch.isin(completions, torch.tensor(list(stop_token_ids)))
    return (stops.cumsum(dim=1) == 0).sum(dim=1)


def score_completions(
    task: Task,
    examples: Sequence[Example],
    texts: Sequence[str],
    layout: Layout,
    ahead: Mapping[int, "Future[Score]"] | None = None,
) -> list[Score]:
    """Score completions.

    One of the ranks that hold these samples scores, the others receive: a reward may be costly, and
    one that depends on time must not differ between the ranks of one model.

    Args:
        task: the task; with workers, completions are scored several at once.
        examples: the problem of each completion.
        texts: the completions.
        layout: process groups.
        ahead: what the task's workers are at already, by place in ``texts``.

    Returns:
        Their scores.

    Raises:
        RewardError: the task's score raised an exception in a worker.
    """
    scores: list[Score] = []
    if layout.is_first_of_samples:
        if isinstance(task, RewardWorkers):
            known = ahead or {}
            pairs = enumerate(zip(examples, texts, strict=True))
            futures = [known.get(row) or task.submit(e, text) for row, (e, text) in pairs]
            scores = collect(futures)
        else:
            scores = [task.score(e, text) for e, text in zip(examples, texts, strict=True)]
    return object_from_first_of_samples(scores, layout)
