"""What benchmarks.peers compares: the same work on both sides, checked, then timed in turns."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.utils import unwrap_model
from safetensors.torch import load_file
from torch import Tensor

from benchmarks import workloads
from benchmarks.measure import largest_difference, ratios, spread
from benchmarks.models import llama_weights
from benchmarks.peer_link import Peer, published_gradients
from benchmarks.workloads import Update, Workload
from megatron_espo.diffusion.noise import ElboViews
from megatron_espo.errors import UserError
from megatron_espo.model.handle import DiffusionModel

# Relative to the largest entry; two orders of adding in float32.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Case:
    """A sampler of theirs and the settings with which this project does the same.

    Attributes:
        name: its row in the table.
        code: whose, by the name of the flag.
        settings: of RolloutConfig. Fast-dLLM commits the most confident token where none is
            confident enough, inside windows of cached keys, too: --rollout-cache-unsure commit.
    """

    name: str
    code: str
    settings: dict[str, Any] = field(default_factory=dict)


def alternate(
    theirs: Callable[[], float], ours: Callable[[], float], pairs: int
) -> tuple[list[float], list[float]]:
    """Let two sides take turns; every other round in the other order.

    Args:
        theirs: runs once and returns the seconds.
        ours: likewise.
        pairs: rounds.

    Returns:
        The seconds of each by round.
    """
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(pairs):
        order = (0, 1) if number % 2 == 0 else (1, 0)
        for side in order:
            seconds[side].append((theirs, ours)[side]())
    return seconds


def timed(work: Callable[[], Any]) -> float:
    """Run something once and return the seconds."""
    gc.collect()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare_rollouts(
    peer: Peer, model: DiffusionModel, work: Workload, case: Case, pairs: int
) -> dict[str, Any]:
    """Compare a sampler.

    Args:
        peer: their process, with the same weights.
        model: this project's model.
        work: sizes.
        case: the sampler.
        pairs: rounds.

    Returns:
        The row of the report.

    Raises:
        UserError: the tokens differ.
    """
    config = replace(work.rollout, **case.settings)
    prompts = work.prompts(work.rows)
    request = {
        "code": case.code,
        "prompts": list(map(list, prompts)),
        "mask_token_id": work.shape.mask_token_id,
        "completion_length": config.completion_length,
        "block_length": config.block_length,
        "denoising_steps": config.denoising_steps,
        "cache": config.cache,
        "threshold": config.threshold,
    }
    found = peer.ask("rollout", **request)
    result = workloads.our_rollout(model, work, config)
    differing = int((result.completions != torch.tensor(found["tokens"])).sum())
    if differing:
        raise UserError(
            f"{case.name}: {differing} of {result.completions.numel()} tokens differ, so the two "
            "do not do the same; nothing was timed."
        )
    seconds = alternate(
        lambda: float(peer.ask("rollout", **request)["seconds"]),
        lambda: timed(lambda: workloads.our_rollout(model, work, config)),
        pairs,
    )
    tokens = result.completions.numel()
    return {
        **_row(seconds, tokens),
        "evaluations": (found["evaluations"], float(result.num_evaluations.float().mean())),
    }


def compare_updates(
    peer: Peer, model: DiffusionModel, work: Workload, pairs: int, folder: Path
) -> dict[str, Any]:
    """Compare the loss and the gradient of an ESPO update.

    Args:
        peer: their process, with the same weights.
        model: this project's model, with gradient buffers.
        work: sizes.
        pairs: rounds.
        folder: gets their gradients.

    Returns:
        The row of the report.

    Raises:
        UserError: ELBOs or gradients differ by more than rounding.
    """
    update = workloads.make_update(work)
    tokens = torch.cat((torch.tensor(update.prompts), update.completions), dim=1).tolist()
    seeds = list(range(1, work.num_mc + 1))
    drawn = peer.ask("masks", tokens=tokens, prompt_length=work.prompt_length, seeds=seeds)
    update = replace(update, views=coupled_views(torch.tensor(drawn).bool().transpose(0, 1)))
    request = {
        "tokens": tokens,
        "prompt_length": work.prompt_length,
        "mask_token_id": work.shape.mask_token_id,
        "seeds": seeds,
        "elbo_old": update.elbo_old.mean(1).tolist(),
        "advantages": update.advantages.tolist(),
    }
    file = folder / "gradients.safetensors"
    found = peer.ask("update", **request, gradients=str(file))
    elbo = run_update(model, work, update).mean(1)
    (chunk,) = unwrap_model(list(model.chunks))
    buffers = {name: p.main_grad for name, p in chunk.named_parameters()}
    ours = published_gradients(llama_weights(model, work.shape, buffers), work.shape)
    theirs = load_file(file)
    if ours.keys() != theirs.keys():
        raise UserError(f"ESPO: gradients of {sorted(ours.keys() ^ theirs.keys())[0]} on one side.")
    differences = {
        "ELBO": largest_difference(elbo, torch.tensor(found["elbo"])),
        "gradient": max(largest_difference(ours[name], theirs[name]) for name in theirs),
    }
    if max(differences.values()) > TOLERANCE:
        raise UserError(f"ESPO: ELBOs or gradients differ ({differences}); nothing was timed.")
    seconds = alternate(
        lambda: float(peer.ask("update", **request)["seconds"]),
        lambda: timed(lambda: run_update(model, work, update)),
        pairs,
    )
    return {
        **_row(seconds, work.sequences * work.rollout.completion_length),
        # Passes forward and back: theirs one per draw and side, ours one per sequence.
        "evaluations": (2 * work.num_mc, work.sequences),
        "largest difference": differences,
    }


def run_update(model: DiffusionModel, work: Workload, update: Update) -> Tensor:
    """Add the gradient with this project's defaults; returns the ELBO draws."""
    return workloads.our_update(model, work, "auto", update=update)


def coupled_views(masks: Tensor) -> ElboViews:
    """Make the views of an ELBO from masks that someone else drew.

    Args:
        masks: bool ``[b, m, l]``; the complements are added.

    Returns:
        The views, with the coupled estimator's weights.
    """
    length = masks.size(-1)
    pairs = torch.stack((masks, ~masks), dim=2)
    counts = pairs.sum(-1)
    weights = torch.where(counts > 0, (length + 1) / (2 * counts.clamp(min=1)), 0.0)
    return ElboViews(pairs, weights.float())


def _row(seconds: tuple[list[float], list[float]], tokens: int) -> dict[str, Any]:
    theirs, ours = seconds
    return {
        "their seconds": spread(theirs),
        "our seconds": spread(ours),
        "times as fast": ratios(theirs, ours),
        "tokens per second": (tokens / spread(theirs).median, tokens / spread(ours).median),
    }
