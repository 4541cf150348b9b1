"""A rollout as a record that a checkpoint can hold and that any layout can take up again.

The record lists the completions of the whole rollout in their global order, so it does not depend
on how they were split over data-parallel ranks. Prompts and masks are not in it: they are functions
of the run's seed and the rollout's number. A digest of the prompts is, see rl.provenance.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_espo.config import EspoConfig
from megatron_espo.data.tokenizer import FastTokenizer
from megatron_espo.evaluation.scoring import decode_completions
from megatron_espo.generation.sampler import Generation
from megatron_espo.model.handle import DiffusionModel
from megatron_espo.parallel.layout import Layout
from megatron_espo.rl.rollout import assemble_rollout
from megatron_espo.rl.types import PreparedRollout, Prompt
from megatron_espo.tasks.base import Score

RolloutRecord = dict[str, Any]

# What sampling says of each completion besides its tokens, in Generation's order.
_SAMPLING = ("num_evaluations", "num_committed", "mean_confidence", "work")


def record_rollout(prepared: PreparedRollout, layout: Layout, prompts: str) -> RolloutRecord:
    """Gather a rollout from the data-parallel ranks.

    Args:
        prepared: this rank's share; its first update has been made.
        layout: process groups.
        prompts: digest of the prompts of all ranks.

    Returns:
        Tensors and plain values, the same on every rank.
    """
    rollout = prepared.rollout
    share = {
        "completions": rollout.sequences.completions(),
        **{name: getattr(rollout, name) for name in _SAMPLING},
        "rewards": [float(score.reward) for score in rollout.scores],
        "correct": [bool(score.correct) for score in rollout.scores],
        "metrics": [dict(score.metrics) for score in rollout.scores],
        "tasks": [score.task for score in rollout.scores],
        "elbo_old": _stack(prepared.elbo_old),
        "elbo_ref": _stack(prepared.elbo_ref),
    }
    shares: list[Any] = [share]
    if layout.dp_size > 1:
        shares = [None] * layout.dp_size
        dist.all_gather_object(shares, share, group=layout.dp)
    record: RolloutRecord = {"prompts": prompts}
    for name in ("rewards", "correct", "metrics", "tasks"):
        record[name] = [value for part in shares for value in part[name]]
    for name in ("completions", *_SAMPLING):
        record[name] = torch.cat([part[name] for part in shares])
    for name in ("elbo_old", "elbo_ref"):
        parts = [part[name] for part in shares]
        record[name] = None if parts[0] is None else torch.cat(parts, dim=1)
    return record


def restore_rollout(
    record: RolloutRecord,
    prompts: Sequence[Prompt],
    model: DiffusionModel,
    tokenizer: FastTokenizer,
    espo: EspoConfig,
) -> PreparedRollout:
    """Take this rank's share of a recorded rollout.

    Args:
        record: from :func:`record_rollout`, in any layout.
        prompts: this rank's prompts of that rollout.
        model: the policy.
        tokenizer: the tokenizer.
        espo: the run's settings.

    Returns:
        The share, as it was when the record was made.
    """
    n = len(prompts) * espo.group_size
    rows = slice(model.layout.dp_rank * n, (model.layout.dp_rank + 1) * n)
    completions = record["completions"][rows]
    # A record from before there could be several tasks names none.
    tasks = record.get("tasks") or [None] * len(record["rewards"])
    columns = [record["rewards"], record["correct"], record["metrics"], tasks]
    scores = [Score(*score) for score in zip(*(column[rows] for column in columns), strict=True)]
    rollout = assemble_rollout(
        model,
        prompts,
        Generation(completions, *(record[name][rows] for name in _SAMPLING)),
        decode_completions(completions, tokenizer, model.stop_token_ids),
        scores,
        espo,
    )
    mu = espo.updates_per_rollout
    return PreparedRollout(
        rollout,
        _unstack(record["elbo_old"], rows, mu),
        _unstack(record["elbo_ref"], rows, mu),
    )


def _stack(draws: Sequence[Tensor | None]) -> Tensor | None:
    known = [part for part in draws if part is not None]
    return torch.stack(known) if known else None


def _unstack(draws: Tensor | None, rows: slice, mu: int) -> tuple[Tensor | None, ...]:
    return (None,) * mu if draws is None else tuple(draws[:, rows].clone())
