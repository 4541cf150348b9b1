"""Completions as text, their lengths, and their scores."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace

import torch
from torch import Tensor

from megatron_espo.data.encoding import decode_completion
from megatron_espo.data.tokenizer import FastTokenizer
from megatron_espo.errors import UserError
from megatron_espo.parallel.layout import Layout, object_from_first_of_samples
from megatron_espo.rewards.workers import RewardWorkers, collect
from megatron_espo.tasks.base import Example, Score, Task
from megatron_espo.tasks.checking import checked_score
from megatron_espo.tasks.parts import Coalitions, part_worths


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
    coalitions: Coalitions | None = None,
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
        coalitions: of parts that are to be scored, too; None for none. What workers are at already
            was handed over with the same.

    Returns:
        Their scores.

    Raises:
        RewardError: the task's score raised an exception in a worker.
        UserError: the task's score returned something that cannot be used; raised on every rank
            that works on these samples. `parallel.layout.raise_on_all` tells the others.
    """
    scores: list[Score] | UserError = []
    if layout.is_first_of_samples:
        try:
            scores = _score(task, examples, texts, ahead or {}, coalitions)
        except UserError as error:
            scores = error
    scores = object_from_first_of_samples(scores, layout)
    if isinstance(scores, UserError):
        raise scores
    return scores


def _score(
    task: Task,
    examples: Sequence[Example],
    texts: Sequence[str],
    ahead: Mapping[int, "Future[Score]"],
    coalitions: Coalitions | None,
) -> list[Score]:
    pairs = list(zip(examples, texts, strict=True))
    if isinstance(task, RewardWorkers):
        return collect(
            [ahead.get(i) or task.submit(*pair, coalitions) for i, pair in enumerate(pairs)]
        )
    scores = [checked_score(task.name, e, task.score(e, text)) for e, text in pairs]
    if coalitions is None:
        return scores
    return [
        replace(score, parts=part_worths(task, *pair, coalitions))
        for score, pair in zip(scores, pairs, strict=True)
    ]
