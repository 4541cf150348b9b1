"""A rollout as a record that a checkpoint can hold and that any layout can take up again.

The record lists the completions of the whole rollout in their global order, so it does not depend
on how they were split over data-parallel ranks. Prompts and masks are not in it: they are functions
of the run's seed and the rollout's number, and of which further prompts the rewards asked for
(rl.refill). A digest of the prompts is, see rl.provenance.
"""

from collections.abc import Mapping, Sequence
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
from megatron_espo.rl.credit import with_credit
from megatron_espo.rl.rollout import place_completions, with_scores
from megatron_espo.rl.types import Discarded, PreparedRollout, Prompt, Refill
from megatron_espo.tasks.base import Score

RolloutRecord = dict[str, Any]

# What sampling says of each completion besides its tokens, in Generation's order.
_SAMPLING = ("num_evaluations", "num_committed", "mean_confidence", "work")
# Tensors of the completions that further prompts replaced.
_DISCARDED = ("places", "completion_lengths", *_SAMPLING)
_SCORES = ("rewards", "correct", "metrics", "tasks", "parts")


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
        "commit_steps": rollout.commit_steps,
        **{name: getattr(rollout, name) for name in _SAMPLING},
        **_columns(rollout.scores),
        "elbo_old": _stack(prepared.elbo_old),
        "elbo_ref": _stack(prepared.elbo_ref),
    }
    if rollout.discarded is not None:
        kept = {name: getattr(rollout.discarded, name) for name in _DISCARDED}
        share["discarded"] = kept | _columns(rollout.discarded.scores)
    shares: list[Any] = [share]
    if layout.dp_size > 1:
        shares = [None] * layout.dp_size
        dist.all_gather_object(shares, share, group=layout.dp)
    record: RolloutRecord = {"prompts": prompts, "refills": [list(r) for r in rollout.refills]}
    record |= _join(shares, ("completions", "commit_steps", *_SAMPLING))
    if "discarded" in share:
        record["discarded"] = _join([part["discarded"] for part in shares], _DISCARDED)
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
    # A record from before there were step maps has none.
    steps = record.get("commit_steps", record["completions"][:, :0].int())[rows]
    columns = [*(record[name][rows] for name in _SAMPLING), steps]
    generation = Generation(completions, *columns)
    scored = with_scores(
        place_completions(model, prompts, generation, espo.group_size),
        decode_completions(completions, tokenizer, model.stop_token_ids),
        _scores(record)[rows],
        espo,
        [Refill(*pair) for pair in record.get("refills", ())],
        _discarded(record, rows, espo.group_size),
    )
    mu = espo.updates_per_rollout
    return PreparedRollout(
        with_credit(scored, model, tokenizer, espo),
        _unstack(record["elbo_old"], rows, mu),
        _unstack(record["elbo_ref"], rows, mu),
    )


def _columns(scores: Sequence[Score]) -> dict[str, Any]:
    return {
        "rewards": [float(score.reward) for score in scores],
        "correct": [bool(score.correct) for score in scores],
        "metrics": [dict(score.metrics) for score in scores],
        "tasks": [score.task for score in scores],
        "parts": [score.parts for score in scores],
    }


def _scores(record: Mapping[str, Any]) -> list[Score]:
    # A record from before there could be several tasks, or parts, has none.
    nothing = [None] * len(record["rewards"])
    known = {"tasks": nothing, "parts": nothing, **record}
    return [Score(*columns) for columns in zip(*(known[name] for name in _SCORES), strict=True)]


def _join(shares: Sequence[Mapping[str, Any]], tensors: Sequence[str]) -> dict[str, Any]:
    """Join the data-parallel ranks' columns of scores and their tensors."""
    joined: dict[str, Any] = {
        name: [value for part in shares for value in part[name]] for name in _SCORES
    }
    return joined | {name: torch.cat([part[name] for part in shares]) for name in tensors}


def _discarded(record: Mapping[str, Any], rows: slice, group_size: int) -> Discarded | None:
    """Take the replaced completions whose place is among this rank's rows."""
    every = record.get("discarded")
    if every is None:
        return None
    places = every["places"]
    mine = (places * group_size >= rows.start) & (places * group_size < rows.stop)
    index = (mine.nonzero() * group_size + torch.arange(group_size)).flatten()
    scores = _scores(every)
    return Discarded(
        places=places[mine],
        scores=[scores[i] for i in index.tolist()],
        **{name: every[name][index] for name in _DISCARDED if name != "places"},
    )


def _stack(draws: Sequence[Tensor | None]) -> Tensor | None:
    known = [part for part in draws if part is not None]
    return torch.stack(known) if known else None


def _unstack(draws: Tensor | None, rows: slice, mu: int) -> tuple[Tensor | None, ...]:
    return (None,) * mu if draws is None else tuple(draws[:, rows].clone())
