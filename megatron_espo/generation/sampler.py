"""Samples completions from a masked-diffusion model, in any tensor/pipeline layout.

The rules are those of LLaDA's reference sampler (arXiv 2502.09992, algorithm 5 and its block-wise
form) and of Dream's, see ``remasking``. Rows are taken in the order of their prompts' lengths and
padded on the right to the longest of their micro-batch, so a row's completion starts right after
its own prompt and its positions are those it would have alone. The output head runs on the masked
positions of the current block only. A row that is done leaves, and the next one takes its place.

Symbols: n rows, a rows in flight, b rows of a micro-batch, s positions, l completion length,
k block length, r candidates of a step.
"""

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_espo.config import RolloutConfig
from megatron_espo.data.batch import round_up
from megatron_espo.generation.remasking import (
    commit_schedule,
    dream_commit_shares,
    rank_by,
    select_highest,
)
from megatron_espo.generation.rows import Rows, lay_out_rows
from megatron_espo.model.handle import DiffusionModel
from megatron_espo.parallel.layout import broadcast_from_last_stage
from megatron_espo.parallel.pipeline import RowBatch, forward_only
from megatron_espo.parallel.vocab import draw_tokens

# Micro-batches in flight per pipeline stage: of p stages each waits for p - 1 passes in 4p + p - 1.
_BATCHES_PER_STAGE = 4


class Interrupted(Exception):
    """Raised by an ``on_step`` hook to break sampling off, on all ranks of the model together."""


class Generation(NamedTuple):
    """Completions and what they cost, on the host, equal on all ranks of the model-parallel group.

    Attributes:
        completions: int64 ``[n, l]``.
        num_evaluations: int64 ``[n]``, model evaluations that each completion took part in (NFE;
            with guidance the two branches are one evaluation).
        num_committed: int64 ``[n]``, tokens that the model decided; what is left of ``l`` was
            filled in after the end of the sequence.
        mean_confidence: float32 ``[n]``, mean probability of these tokens when they were
            committed, before temperature (with guidance: under the guided distribution).
    """

    completions: Tensor
    num_evaluations: Tensor
    num_committed: Tensor
    mean_confidence: Tensor

    @property
    def tokens_per_step(self) -> Tensor:
        """Tokens that a model evaluation committed on average: float32 ``[n]``."""
        return self.num_committed / self.num_evaluations


@torch.no_grad()
def generate(
    model: DiffusionModel,
    prompts: Sequence[Sequence[int]],
    sample_ids: Tensor,
    config: RolloutConfig,
    seed: int,
    purpose: str,
    on_step: Callable[[Tensor], None] | None = None,
    on_finished: Callable[[Tensor, Tensor], None] | None = None,
) -> Generation:
    """Sample one completion per prompt.

    Each row's random numbers depend on the seed, the purpose and the row's sample id alone, so a
    row's tokens do not depend on the batch, the micro-batches or the layout.

    Args:
        model: the model, in evaluation mode.
        prompts: token ids, one list per row; the same on all ranks of the model-parallel group.
        sample_ids: int64 ``[n]`` on the host, global ids of the rows.
        config: sampling settings.
        seed: the run's seed.
        purpose: name of these draws, such as ``"rollout/7"``.
        on_step: called with the completions so far, int64 ``[n, l]`` with the mask token where
            nothing is committed yet, after every step. May raise Interrupted.
        on_finished: called as soon as some rows are final, with their numbers, int64 ``[f]``, and
            their completions, int64 ``[f, l]``, both on the host, while others are still to be
            sampled. Each row is reported once, on every rank of the model-parallel group.

    Returns:
        The completions in the order of the prompts.
    """
    length, n = config.completion_length, len(prompts)
    if n == 0:
        nothing = torch.empty(0, dtype=torch.int64)
        return Generation(nothing.view(0, length), nothing, nothing, torch.empty(0))
    rows = lay_out_rows(model, prompts, sample_ids, config)
    # Back to the caller's order.
    back = rows.order.argsort().to(model.device)
    waiting = deque(range(n))
    batches = _empty_batches(n, config.micro_batch_size, model.layout.pp_size)
    while _admit(waiting, batches):
        finished = _denoise(model, rows, batches, config, seed, purpose)
        if on_step is not None:
            on_step(rows.completions(back, length))
        if len(finished):
            left = set(finished.tolist())
            for batch in batches:
                batch.rows[:] = [row for row in batch.rows if row not in left]
            if on_finished is not None:
                found = rows.completions(finished.to(model.device), length).cpu()
                on_finished(rows.order[finished], found)
    host = back.cpu()
    num_committed = torch.full((n,), length)
    return Generation(
        rows.completions(back, length).cpu(),
        rows.num_evaluations[host],
        num_committed,
        (rows.confidence[back].cpu() / num_committed).float(),
    )


class _MicroBatch(NamedTuple):
    """Places of a micro-batch and the rows that have them."""

    size: int
    rows: list[int]


def _empty_batches(n: int, micro_batch_size: int, pp_size: int) -> list[_MicroBatch]:
    """Make the micro-batches that are in flight together: enough to keep every stage busy."""
    size = min(micro_batch_size, -(-n // pp_size))
    most = 1 if pp_size == 1 else _BATCHES_PER_STAGE * pp_size
    return [_MicroBatch(size, []) for _ in range(min(most, -(-n // size)))]


def _admit(waiting: deque[int], batches: Sequence[_MicroBatch]) -> bool:
    """Give free places to waiting rows; False when no row is left."""
    for batch in batches:
        while waiting and len(batch.rows) < batch.size:
            batch.rows.append(waiting.popleft())
    return any(batch.rows for batch in batches)


def _denoise(
    model: DiffusionModel,
    rows: Rows,
    batches: Sequence[_MicroBatch],
    config: RolloutConfig,
    seed: int,
    purpose: str,
) -> Tensor:
    """Make one denoising step with all rows in flight.

    Returns:
        int64 ``[f]`` on the host: the rows that are final now.
    """
    host = torch.tensor([row for batch in batches for row in batch.rows])
    index = host.to(model.device)
    noise = rows.noise(index, seed, purpose)
    counts = commit_schedule(config)[rows.step[host]].to(model.device)
    picked = _candidates(rows.masked[index], noise[:, 1], rows.step[index.cpu()], config, counts)
    evaluated = picked.any(1).cpu()
    if evaluated.any():
        parts, start = [], 0
        for batch in batches:
            own = torch.arange(start, start + len(batch.rows))
            own, start = own[evaluated[own]], start + len(batch.rows)
            if len(own):
                parts.append(own)
        draws = _evaluate(model, rows, index, parts, picked, noise[:, 0], config)
        chosen, confidence = _choose(model, draws, picked, config, counts)
        rows.commit(index, chosen, confidence)
        rows.num_evaluations[host] += evaluated
    return rows.advance(host, config.completion_length // config.block_length)


def _candidates(
    masked: Tensor, order_noise: Tensor, step: Tensor, config: RolloutConfig, counts: Tensor
) -> Tensor:
    """Choose the positions that a step evaluates.

    Orders that do not look at the model's output are decided before the model runs, so that the
    output head sees just the tokens that will be committed.

    Args:
        masked: bool ``[a, k]``.
        order_noise: float64 ``[a, k]``.
        step: int64 ``[a]`` on the host.
        config: sampling settings.
        counts: int64 ``[a]``, tokens that the schedule commits.

    Returns:
        bool ``[a, k]``.
    """
    if config.remasking == "origin":
        shares = dream_commit_shares(config.steps_per_block)[step].to(masked.device).double()
        return masked & (order_noise < shares[:, None])
    if config.remasking == "random":
        return select_highest(order_noise.masked_fill(~masked, -1.0), counts)
    return masked & (counts > 0)[:, None]


def _evaluate(
    model: DiffusionModel,
    rows: Rows,
    index: Tensor,
    parts: Sequence[Tensor],
    picked: Tensor,
    uniforms: Tensor,
    config: RolloutConfig,
) -> Tensor:
    """Run the model and draw a token for every candidate.

    Args:
        model: the model.
        rows: the rows.
        index: int64 ``[a]``, the rows in flight.
        parts: micro-batches, as places in ``index``.
        picked: bool ``[a, k]``, the candidates.
        uniforms: float64 ``[a, k]``.
        config: sampling settings.

    Returns:
        float64 ``[3, a, k]``: token, score and log-probability of each candidate; on the last
        pipeline stage only.
    """
    uneven = model.layout.pp_size == 1  # a pipeline passes micro-batches of one shape
    b = max(len(part) for part in parts)
    widths = [max(rows.widths[row] for row in index[part].tolist()) for part in parts]
    made, found = [], []
    for part, width in zip(parts, widths, strict=True):
        width = round_up(width if uneven else max(widths), model.pad_multiple)
        own = part.to(model.device)
        row, column = picked[own].nonzero(as_tuple=True)
        found.append((own[row], column))
        if not uneven:
            own = torch.cat((own, own[-1:].expand(b - len(own))))
        made.append(
            _row_batch(
                model,
                rows.tokens[index[own], :width],
                rows.prompt_lengths[index[own]],
                row,
                rows.places(index[own])[row, column],
                uniforms[own[row], column],
                config,
            )
        )
    results = forward_only(
        model.chunks,
        made,
        partial(_draw, model=model, config=config),
        model.logit_shift,
        model.layout,
    )
    draws = torch.zeros(3, *picked.shape, dtype=torch.float64, device=model.device)
    if model.layout.is_last_stage:
        where, columns = (torch.cat(places) for places in zip(*found, strict=True))
        draws[:, where, columns] = torch.cat(results, dim=1)
    return draws


def _row_batch(
    model: DiffusionModel,
    tokens: Tensor,
    prompt_lengths: Tensor,
    row: Tensor,
    positions: Tensor,
    uniforms: Tensor,
    config: RolloutConfig,
) -> RowBatch:
    """Make the micro-batch of some rows; with guidance, their unconditional twins follow them."""
    lengths = prompt_lengths + config.completion_length
    if config.guidance_scale > 0.0:
        is_prompt = torch.arange(tokens.size(1), device=tokens.device) < prompt_lengths[:, None]
        row, positions = torch.cat((row, row + len(tokens))), positions.repeat(2)
        tokens = torch.cat((tokens, tokens.masked_fill(is_prompt, model.mask_token_id)))
        lengths = lengths.repeat(2)
    return RowBatch(tokens, lengths, row, positions, uniforms)


def _draw(logits: Tensor, uniforms: Any, *, model: DiffusionModel, config: RolloutConfig) -> Tensor:
    """Turn logits into tokens, their scores and log-probabilities: float64 ``[3, r]``."""
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
    decided = config.remasking in ("random", "origin")
    scores = draw.log_confidence if decided else rank_by(config.remasking, draw)
    return torch.stack((draw.tokens.double(), scores.double(), draw.log_confidence.double()))


def _choose(
    model: DiffusionModel, draws: Tensor, picked: Tensor, config: RolloutConfig, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """Decide which candidates are committed.

    Args:
        model: the model.
        draws: float64 ``[3, a, k]``, read on the last pipeline stage.
        picked: bool ``[a, k]``, the candidates.
        config: sampling settings.
        counts: int64 ``[a]``, tokens that the schedule commits.

    Returns:
        int64 ``[a, k]``, the token for each place of the block or -1, and float64 ``[a, k]``,
        their probabilities; on every rank.
    """
    decision = draws[:2].clone()
    if model.layout.is_last_stage:
        tokens, scores, log_confidence = draws
        kept = picked
        if config.remasking not in ("random", "origin"):
            kept = picked & select_highest(scores.masked_fill(~picked, -torch.inf), counts)
        decision = torch.stack((torch.where(kept, tokens, -1.0), log_confidence.exp()))
    decision = broadcast_from_last_stage(decision, model.layout)
    return decision[0].long(), decision[1]
