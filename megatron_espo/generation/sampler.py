"""Samples completions from a masked-diffusion model, in any tensor/pipeline layout.

The rules are those of LLaDA's reference sampler (arXiv 2502.09992, algorithm 5 and its block-wise
form) and of Dream's, see ``remasking``. Prompts of different lengths share a batch: rows are
padded on the right, so a row's completion starts right after its own prompt and its positions are
those it would have alone. The output head runs on the masked positions of the current block only.

Symbols: b rows, s positions, l completion length, k block length, c candidates of a step.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_espo.config import RolloutConfig
from megatron_espo.generation.remasking import (
    DREAM_ORDERS,
    commit_counts,
    dream_commit_counts,
    dream_commit_shares,
    rank_by,
    select_highest,
)
from megatron_espo.model.handle import DiffusionModel
from megatron_espo.parallel.layout import broadcast_from_last_stage
from megatron_espo.parallel.pipeline import RowBatch, forward_only
from megatron_espo.parallel.vocab import draw_tokens
from megatron_espo.random import stream, uniform


class Interrupted(Exception):
    """Raised by an ``on_step`` hook to break sampling off, on all ranks of the model together."""


class Generation(NamedTuple):
    """Completions and what they cost.

    Attributes:
        completions: int64 ``[b, l]`` on the host, equal on all ranks of the model-parallel group.
        num_evaluations: model evaluations per completion (NFE).
    """

    completions: Tensor
    num_evaluations: int


@torch.no_grad()
def generate(
    model: DiffusionModel,
    prompts: Sequence[Sequence[int]],
    sample_ids: Tensor,
    config: RolloutConfig,
    seed: int,
    purpose: str,
    on_step: Callable[[Tensor], None] | None = None,
) -> Generation:
    """Sample one completion per prompt.

    Each row's random numbers depend on the seed, the purpose and the row's sample id alone, so a
    row's tokens do not depend on the batch, the micro-batches or the layout.

    Args:
        model: the model, in evaluation mode.
        prompts: token ids, one list per row; the same on all ranks of the model-parallel group.
        sample_ids: int64 ``[b]`` on the host, global ids of the rows.
        config: sampling settings.
        seed: the run's seed.
        purpose: name of these draws, such as ``"rollout/7"``.
        on_step: called with the completions so far, int64 ``[b, l]`` with the mask token where
            nothing is committed yet, after every step. May raise Interrupted.

    Returns:
        The completions.
    """
    length, k = config.completion_length, config.block_length
    num_rows = len(prompts)
    if num_rows == 0:
        return Generation(torch.empty(0, length, dtype=torch.int64), 0)
    if model.layout.pp_size > 1 and num_rows > config.micro_batch_size:
        # The pipeline passes micro-batches of one shape: fill up the last with copies.
        extra = -num_rows % config.micro_batch_size
        prompts = [*prompts, *[prompts[-1]] * extra]
        sample_ids = torch.cat((sample_ids, sample_ids[-1:].expand(extra)))
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    tokens = _layout_rows(model, prompts, length).to(model.device)
    ids = sample_ids.to(model.device)
    steps = config.denoising_steps // (length // k)
    counts = (dream_commit_counts if config.remasking in DREAM_ORDERS else commit_counts)(k, steps)
    evaluations = 0
    for block in range(length // k):
        key = stream(seed, f"token/{purpose}", block)
        noise = uniform(key, ids, 2 * steps * k).view(-1, steps, 2, k)
        places = prompt_lengths[:, None] + block * k + torch.arange(k, device=model.device)[None]
        masked = torch.ones_like(places, dtype=torch.bool)
        for step in range(steps):
            candidates, valid = _candidates(masked, noise[:, step, 1], config, step, counts)
            if candidates.size(1) == 0:
                continue
            chosen = _denoise(
                model,
                tokens,
                prompt_lengths,
                places,
                candidates,
                valid,
                noise[:, step, 0],
                config,
                counts[step],
            )
            committed = chosen >= 0
            block_tokens = torch.where(committed, chosen, tokens.gather(1, places))
            tokens.scatter_(1, places, block_tokens)
            masked &= ~committed
            evaluations += 1
            if on_step is not None:
                on_step(_read_completions(tokens, prompt_lengths, length)[:num_rows])
    completions = _read_completions(tokens, prompt_lengths, length)[:num_rows]
    return Generation(completions.cpu(), evaluations)


def _layout_rows(model: DiffusionModel, prompts: Sequence[Sequence[int]], length: int) -> Tensor:
    """Lay out [prompt][masks][padding] rows: int64 ``[b, s]``."""
    longest = max(len(prompt) for prompt in prompts) + length
    s = -(-longest // model.pad_multiple) * model.pad_multiple
    rows = torch.full((len(prompts), s), model.pad_token_id)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt, dtype=torch.int64)
        row[len(prompt) : len(prompt) + length] = model.mask_token_id
    return rows


def _read_completions(tokens: Tensor, prompt_lengths: Tensor, length: int) -> Tensor:
    """Gather the completions, int64 ``[b, l]``, out of the rows."""
    places = prompt_lengths[:, None] + torch.arange(length, device=tokens.device)[None]
    return tokens.gather(1, places)


def _candidates(
    masked: Tensor,
    order_noise: Tensor,
    config: RolloutConfig,
    step: int,
    counts: list[int],
) -> tuple[Tensor, Tensor]:
    """Choose the positions that a step evaluates.

    Orders that do not look at the model's output are decided before the model runs, so that the
    output head sees just the tokens that will be committed.

    Returns:
        Places in the block, int64 ``[b, c]``, and which of them count, bool ``[b, c]``.
    """
    if counts[step] == 0 and config.remasking != "origin":
        return masked.new_empty(masked.size(0), 0, dtype=torch.int64), masked[:, :0]
    if config.remasking == "origin":
        picked = masked & (order_noise < dream_commit_shares(len(counts))[step].item())
        width = int(picked.sum(dim=1).max())
    elif config.remasking == "random":
        picked = select_highest(order_noise.masked_fill(~masked, -1.0), counts[step])
        width = counts[step]
    else:
        picked = masked
        # Every row has committed the same number of tokens.
        width = masked.size(1) - sum(counts[:step])
    places = picked.int().argsort(dim=1, descending=True, stable=True)[:, :width]
    return places, picked.gather(1, places)


def _denoise(
    model: DiffusionModel,
    tokens: Tensor,
    prompt_lengths: Tensor,
    places: Tensor,
    candidates: Tensor,
    valid: Tensor,
    noise: Tensor,
    config: RolloutConfig,
    count: int,
) -> Tensor:
    """Run one denoising step.

    Args:
        model: the model.
        tokens: int64 ``[b, s]``.
        prompt_lengths: int64 ``[b]``.
        places: int64 ``[b, k]``, positions of the block in the rows.
        candidates: int64 ``[b, c]``, places in the block to evaluate.
        valid: bool ``[b, c]``.
        noise: float64 ``[b, k]``, uniform numbers for the tokens.
        config: sampling settings.
        count: tokens to commit per row, for orders that rank the candidates.

    Returns:
        int64 ``[b, k]``: the token committed at each place of the block, or -1.
    """
    lengths = prompt_lengths + config.completion_length
    where = places.gather(1, candidates)
    batches = [
        _row_batch(
            model,
            tokens[rows],
            lengths[rows],
            prompt_lengths[rows],
            where[rows],
            noise[rows].gather(1, candidates[rows]),
            config,
        )
        for rows in _slices(tokens.size(0), config.micro_batch_size)
    ]
    draws = forward_only(
        model.chunks,
        batches,
        partial(_draw, model=model, config=config),
        model.logit_shift,
        model.layout,
    )
    chosen = torch.full_like(places, -1)
    if model.layout.is_last_stage:
        drawn, scores = (part.view_as(candidates) for part in torch.cat(draws, dim=1))
        decided = config.remasking in ("random", "origin")
        kept = valid if decided else select_highest(scores, count)
        chosen.scatter_(1, candidates, torch.where(kept, drawn.long(), -1))
    return broadcast_from_last_stage(chosen, model.layout)


def _slices(rows: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _row_batch(
    model: DiffusionModel,
    tokens: Tensor,
    lengths: Tensor,
    prompt_lengths: Tensor,
    where: Tensor,
    uniforms: Tensor,
    config: RolloutConfig,
) -> RowBatch:
    """Make the micro-batch of some rows; with guidance, their unconditional twins follow them."""
    b, c = where.shape
    rows = torch.arange(b, device=tokens.device).repeat_interleave(c)
    positions = where.flatten()
    if config.guidance_scale > 0.0:
        is_prompt = torch.arange(tokens.size(1), device=tokens.device) < prompt_lengths[:, None]
        tokens = torch.cat((tokens, tokens.masked_fill(is_prompt, model.mask_token_id)))
        lengths = lengths.repeat(2)
        rows, positions = torch.cat((rows, rows + b)), positions.repeat(2)
    return RowBatch(tokens, lengths, rows, positions, uniforms.flatten())


def _draw(logits: Tensor, uniforms: Any, *, model: DiffusionModel, config: RolloutConfig) -> Tensor:
    """Turn the logits of a micro-batch into drawn tokens and their scores: float64 ``[2, r]``."""
    logits = logits.float()
    if config.guidance_scale > 0.0:
        conditional, unconditional = logits.chunk(2)
        logits = unconditional + (config.guidance_scale + 1) * (conditional - unconditional)
    draw = draw_tokens(
        logits,
        uniforms,
        config.temperature,
        model.vocab_size,
        model.mask_token_id,
        model.layout.tp,
        margin=config.remasking == "topk_margin",
        entropy=config.remasking == "entropy",
    )
    if config.remasking in ("random", "origin"):
        scores = torch.zeros_like(draw.log_confidence)
    else:
        scores = rank_by(config.remasking, draw)
    return torch.stack((draw.tokens.double(), scores.double()))
