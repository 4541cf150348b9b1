"""How many tokens' experts change between policies: what re-routing does to ratios of ELBOs.

A router's choice is discontinuous. Where an update, or the reference, has other experts for a
token, its part of the ratio moves by more than the weights did. Compared are the tokens of one
micro-batch of each update, which all policies pass.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.utils import get_model_config

from megatron_espo.model.handle import DiffusionModel
from megatron_espo.passes.batch import ViewBatch
from megatron_espo.passes.state import RoutingLog


def watch_routing(batches: list[ViewBatch], model: DiffusionModel) -> list[ViewBatch]:
    """Let routers note what they choose for the first micro-batch.

    Args:
        batches: the micro-batches of an update.
        model: the model; without experts nothing is noted.

    Returns:
        The micro-batches.
    """
    config: Any = get_model_config(model.chunks[0])
    if config.num_moe_experts is None:
        return batches
    first = replace(batches[0].batch, routing=RoutingLog())
    return [replace(batches[0], batch=first), *batches[1:]]


def _logs(updates: Sequence[list[ViewBatch]]) -> list[RoutingLog]:
    logs = (batches[0].batch.routing for batches in updates)
    return [log for log in logs if log is not None]


@contextlib.contextmanager
def noted_as(policy: str, updates: Sequence[list[ViewBatch]]) -> Iterator[None]:
    """Note choices as those of a policy inside the context.

    Args:
        policy: "old", "reference" or "current".
        updates: the micro-batches of some updates.
    """
    for log in _logs(updates):
        log.policy = policy
    try:
        yield
    finally:
        for log in _logs(updates):
            log.policy = None


def routing_scalars(batches: list[ViewBatch], model: DiffusionModel) -> dict[str, float]:
    """Say how many tokens have other experts under the current policy; a collective.

    Args:
        batches: the micro-batches of an update, after it.
        model: the model.

    Returns:
        Shares of all tokens and mixture layers, equal on all ranks; nothing of policies that did
        not pass, or for a model without experts.
    """
    logs = _logs([batches])
    if not logs:
        return {}
    others = ("old", "reference")
    counts = torch.tensor([logs[0].changed(other, "current") for other in others])
    counts = counts.to(model.device)
    if dist.get_world_size() > 1:
        dist.all_reduce(counts)
    return {
        f"policy/rerouted_from_{other}": changed / total
        for other, (changed, total) in zip(others, counts.tolist(), strict=True)
        if total
    }
