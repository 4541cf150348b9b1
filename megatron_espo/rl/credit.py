"""Token advantages of a rollout, from the parts that its task has scored (objectives.ospo)."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from megatron_espo.config import EspoConfig
from megatron_espo.data.encoding import token_spans
from megatron_espo.data.tokenizer import FastTokenizer
from megatron_espo.errors import UserError
from megatron_espo.model.handle import DiffusionModel
from megatron_espo.monitor.metrics import gather_columns
from megatron_espo.objectives import objective_of
from megatron_espo.objectives.credit import split_advantages
from megatron_espo.rl.types import Rollout
from megatron_espo.tasks import load_task
from megatron_espo.tasks.blend import without_parts
from megatron_espo.tasks.parts import Coalitions, Worth


def coalitions_of(espo: EspoConfig) -> Coalitions | None:
    """Say which parts of a completion are scored besides the whole; None for none."""
    credit = objective_of(espo).credit()
    return None if credit is None else Coalitions(credit.width, credit.coalitions, credit.even)


def check_parts(espo: EspoConfig) -> None:
    """Refuse an objective that needs scores of parts with a task that has none.

    Args:
        espo: the run's settings; its task is loaded if it matters.

    Raises:
        UserError: naming task and objective, or there is no such task.
    """
    if coalitions_of(espo) is None:
        return
    if names := without_parts(load_task(espo.task, flag="--espo-task")):
        raise UserError(
            f"--espo-objective {espo.objective} credits parts of a completion, and task {names[0]} "
            "scores none (docs/tasks.md: segments and score_segments); use sudoku, code, a task of "
            "your own that has both, or another objective, as espo."
        )


def with_credit(
    rollout: Rollout, model: DiffusionModel, tokenizer: FastTokenizer, espo: EspoConfig
) -> Rollout:
    """Split the advantages of a rollout over its tokens, on all ranks together.

    Args:
        rollout: scored completions of this rank.
        model: the policy.
        tokenizer: made the texts.
        espo: the run's settings.

    Returns:
        The rollout with token advantages; as it is where the objective does not ask for them.
    """
    credit = objective_of(espo).credit()
    if credit is None:
        return rollout
    completions = rollout.sequences.completions()
    worth = torch.zeros(completions.shape, dtype=torch.float64)
    inside = torch.zeros(completions.shape, dtype=torch.bool)
    for row, (ids, score) in enumerate(zip(completions.tolist(), rollout.scores, strict=True)):
        if score.parts:
            spans = token_spans(tokenizer, ids, model.stop_token_ids)
            worth[row], inside[row] = token_worths(spans, score.parts, completions.size(1))
    bound = torch.inf
    if credit.limit:
        # Over all ranks' completions, so that it does not depend on how they are split.
        every = gather_columns({"advantage": rollout.advantages.tolist()}, model.layout)
        bound = credit.limit * float(np.std(every["advantage"], ddof=1))
    split = split_advantages(rollout.advantages.double(), worth, inside, bound, credit.blame)
    return replace(rollout, token_advantages=split.float())


def token_worths(
    spans: Sequence[tuple[int, int]], parts: Sequence[Worth], length: int
) -> tuple[Tensor, Tensor]:
    """Give each token the worth of its part; of several, their mean by shared characters.

    Args:
        spans: characters of the tokens, of some of l.
        parts: characters of the parts, and their worths.
        length: l.

    Returns:
        float64 ``[l]``, and bool ``[l]``, the tokens that share a character with a part.
    """
    worth, inside = torch.zeros(length, dtype=torch.float64), torch.zeros(length, dtype=torch.bool)
    first = 0
    for token, (start, stop) in enumerate(spans):
        while first < len(parts) and parts[first][1] <= start:
            first += 1
        shared, total = 0, 0.0
        for begin, end, value in parts[first:]:
            if begin >= stop:
                break
            characters = min(end, stop) - max(begin, start)
            shared, total = shared + characters, total + characters * value
        if shared:
            worth[token], inside[token] = total / shared, True
    return worth, inside
