"""Samples completions from a masked-diffusion model, in any tensor/pipeline layout.

The rules are those of LLaDA's reference sampler (arXiv 2502.09992, algorithm 5 and its block-wise
form) and of Dream's, see ``remasking``. Rows are taken in the order of their prompts' lengths and
padded on the right to the longest of their micro-batch, so a row's completion starts right after
its own prompt and its positions are those it would have alone. The output head runs on the masked
positions of the current block only. A row that is done leaves, and the next one takes its place.

Symbols: n rows, a rows in flight, b rows of a micro-batch, s positions, l completion length,
k block length, r candidates of a step.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_espo.config import RolloutConfig
from megatron_espo.data.batch import round_up
from megatron_espo.device import no_interception
from megatron_espo.generation.flight import Flight, MicroBatch
from megatron_espo.generation.remasking import (
    commit_schedule,
    dream_commit_shares,
    rank_by,
    select_confident,
    select_highest,
)
from megatron_espo.generation.rows import Rows, lay_out_rows
from megatron_espo.model.handle import DiffusionModel
from megatron_espo.parallel.layout import broadcast_from_last_stage
from megatron_espo.parallel.passes import KeyValueCache
from megatron_espo.parallel.pipeline import RowBatch, forward_only
from megatron_espo.parallel.vocab import draw_tokens


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
        work: float64 ``[n, 4]``, what passed through the model for each completion: positions,
            positions times the keys that they attended to, hidden states that reached the output
            head, and these times their keys (``monitor.flops.passed_flops`` makes operations of
            them). Padding is counted, copies of rows that fill up a micro-batch are not.
    """

    completions: Tensor
    num_evaluations: Tensor
    num_committed: Tensor
    mean_confidence: Tensor
    work: Tensor

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
        work = torch.empty(0, 4, dtype=torch.float64)
        return Generation(nothing.view(0, length), nothing, nothing, torch.empty(0), work)
    rows = lay_out_rows(model, prompts, sample_ids, config)
    # Back to the caller's order.
    back = rows.order.argsort().to(model.device)
    flight = Flight.of(n, config, model.layout.pp_size)
    while flight.admit():
        # Megatron's pipeline schedules name the device "cuda".
        with no_interception() if model.layout.pp_size == 1 else nullcontext():
            final = _denoise(model, rows, flight, seed, purpose)
        if on_step is not None:
            on_step(rows.completions(back, length))
        if len(final) and on_finished is not None:
            found = rows.completions(final.to(model.device), length).cpu()
            on_finished(rows.order[final], found)
        flight.leave(final.tolist())
        rows.enter_next_block(torch.tensor(flight.to_next_block(rows.complete.tolist())).long())
    host = back.cpu()
    return Generation(
        rows.completions(back, length).cpu(),
        rows.num_evaluations[host],
        rows.num_committed[host],
        (rows.confidence[back].cpu() / rows.num_committed[host]).float(),
        rows.work[host],
    )


def _denoise(model: DiffusionModel, rows: Rows, flight: Flight, seed: int, purpose: str) -> Tensor:
    """Make one denoising step with all rows in flight whose block is not complete.

    With a cache a step passes either whole rows or windows: rows that want a whole pass wait until
    no other can go on with a window, so that they pass together.

    Returns:
        int64 ``[f]`` on the host: the rows that are final now.
    """
    config = flight.config
    host = torch.tensor(flight.rows)
    host = host[~rows.complete[host]]
    if config.cache != "none":
        whole = rows.want_whole_passes(host, config.cache_refresh_steps)
        flight.windows = not bool(whole.all())
        host = host[~whole] if flight.windows else host
    index = host.to(model.device)
    if config.temperature > 0.0 or config.remasking in ("random", "origin"):
        noise = rows.noise(index, seed, purpose)
    else:
        noise = torch.zeros(len(index), 2, config.block_length, device=index.device)
    counts = commit_schedule(config)[rows.step[host]].to(model.device)
    picked = _candidates(rows.masked[index], noise[:, 1], rows.step[host], config, counts)
    candidates = picked.sum(1).cpu()
    evaluated = candidates > 0
    if evaluated.any():
        place = {row: i for i, row in enumerate(host.tolist()) if evaluated[i]}
        parts = [[place[row] for row in batch.rows if row in place] for batch in flight.batches]
        draws = _evaluate(model, rows, flight, host, parts, picked, candidates, noise[:, 0])
        flight.passes += 1
        chosen, confidence = _choose(model, draws, picked, flight, counts)
        rows.commit(index, chosen, confidence)
        rows.num_evaluations[host] += evaluated
    stops = None
    if config.early_stop:
        stops = torch.tensor(model.stop_token_ids, device=model.device)
    blocks = config.completion_length // config.block_length
    return rows.end_step(host, blocks, stops, model.eos_token_id)


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
    flight: Flight,
    host: Tensor,
    parts: Sequence[list[int]],
    picked: Tensor,
    candidates: Tensor,
    uniforms: Tensor,
) -> Tensor:
    """Run the model and draw a token for every candidate.

    Args:
        model: the model.
        rows: the rows.
        flight: the micro-batches and their caches, which whole passes fill.
        host: int64 ``[a]`` on the host, the rows of this step.
        parts: places in ``host`` of the rows of each micro-batch that have candidates.
        picked: bool ``[a, k]``, the candidates.
        candidates: int64 ``[a]`` on the host, their number.
        uniforms: float64 ``[a, k]``.

    Returns:
        float64 ``[3, a, k]``: token, score and log-probability of each candidate; on the last
        pipeline stage only.
    """
    config, index = flight.config, host.to(model.device)
    one_shape = model.layout.pp_size > 1  # pipeline stages pass hidden states of one shape
    most = max(len(part) for part in parts)
    widths = [max((rows.widths[row] for row in batch.rows), default=0) for batch in flight.batches]
    made, found = [], []
    for batch, part, width in zip(flight.batches, parts, widths, strict=True):
        if not part:
            continue
        # Copies of a row, of which nothing is read, make micro-batches equally long.
        extra = most - len(part) if one_shape else 0
        own = torch.tensor(part + part[-1:] * extra, device=model.device)
        row, column = picked[own[: len(part)]].nonzero(as_tuple=True)
        found.append((own[row], column))
        mine = index[own]
        tokens, places = rows.tokens[mine], rows.places(mine)
        uncached = RowBatch(
            tokens[:, : round_up(max(widths) if one_shape else width, model.pad_multiple)],
            rows.prompt_lengths[mine] + config.completion_length,
            row,
            places[row, column],
            uniforms[own[row], column],
            sampling=True,
        )
        if config.guidance_scale > 0.0:
            made.append(_add_unconditional(uncached, rows.prompt_lengths[mine], model))
        elif config.cache == "none":
            made.append(uncached)
        else:
            names, starts = mine.tolist(), places[:, 0]
            made.append(_use_cache(uncached, tokens, batch, names, starts, flight, model))
        kept, copies = torch.tensor(part), 2 if config.guidance_scale > 0.0 else 1
        passed, cache = made[-1].tokens.size(1), made[-1].cache
        keys = passed if made[-1].offsets is None or cache is None else cache.width
        rows.count_pass(host[kept], copies * passed, keys, copies * candidates[kept])
        shortest = min(rows.widths[row] for row in host[kept].tolist())
        made[-1] = replace(made[-1], padded=shortest < keys)
    results = forward_only(
        model.chunks,
        made,
        partial(_draw, model=model, config=config),
        model.logit_shift,
        model.layout,
        # Only before the first step of a call; the next ones use the same FP8 copy of the weights.
        new_weights=not rows.num_evaluations.any(),
    )
    draws = torch.zeros(3, *picked.shape, dtype=torch.float64, device=model.device)
    if model.layout.is_last_stage:
        where, columns = (torch.cat(parts) for parts in zip(*found, strict=True))
        draws[:, where, columns] = torch.cat(results, dim=1)
    return draws


def _add_unconditional(batch: RowBatch, prompt_lengths: Tensor, model: DiffusionModel) -> RowBatch:
    """Let the rows be followed by themselves without the prompt, for guidance."""
    tokens = batch.tokens
    is_prompt = torch.arange(tokens.size(1), device=tokens.device) < prompt_lengths[:, None]
    return replace(
        batch,
        tokens=torch.cat((tokens, tokens.masked_fill(is_prompt, model.mask_token_id))),
        lengths=batch.lengths.repeat(2),
        rows=torch.cat((batch.rows, batch.rows + len(tokens))),
        positions=batch.positions.repeat(2),
    )


def _use_cache(
    whole: RowBatch,
    tokens: Tensor,
    batch: MicroBatch,
    names: list[int],
    starts: Tensor,
    flight: Flight,
    model: DiffusionModel,
) -> RowBatch:
    """Make a pass fill its micro-batch's cache, or pass only a window of its rows.

    Args:
        whole: the pass over whole rows.
        tokens: int64 ``[b, s]``, the rows, not cut to the pass's width.
        batch: the micro-batch.
        names: its b rows of this pass.
        starts: int64 ``[b]``, where their blocks start.
        flight: says which of the two the pass is.
        model: the model.

    Returns:
        The pass.
    """
    config = flight.config
    if flight.passes == 0:
        batch.cache, batch.cached = KeyValueCache(), names
        return replace(whole, cache=batch.cache)
    assert batch.cache is not None
    rows = None  # all of them: then nothing of the cache is copied
    if names != batch.cached:
        rows = torch.tensor([batch.cached.index(name) for name in names], device=model.device)
    if not flight.windows:
        # The cache keeps its width when the longest of its rows have left.
        whole = replace(whole, tokens=tokens[:, : batch.cache.width])
        return replace(whole, cache=batch.cache, cache_rows=rows)
    # The state that predicts a block's first token lies before it where logits are shifted.
    offsets = starts - int(model.logit_shift)
    # All rows are in the same block where windows reach to their ends.
    end = starts + config.block_length if config.cache == "dual" else whole.lengths
    window = torch.arange(int(end[0] - offsets[0]), device=model.device)
    return replace(
        whole,
        tokens=tokens.gather(1, offsets[:, None] + window),
        cache=batch.cache,
        offsets=offsets,
        cache_rows=rows,
    )


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
    model: DiffusionModel, draws: Tensor, picked: Tensor, flight: Flight, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """Decide which candidates are committed.

    Args:
        model: the model.
        draws: float64 ``[3, a, k]``, read on the last pipeline stage.
        picked: bool ``[a, k]``, the candidates.
        flight: says whether the draws come from windows of cached rows.
        counts: int64 ``[a]``, tokens that the schedule commits.

    Returns:
        int64 ``[a, k]``, the token for each place of the block or -1, and float64 ``[a, k]``,
        their probabilities; on every rank.
    """
    config, decision = flight.config, draws[:2].clone()
    if model.layout.is_last_stage:
        tokens, scores, log_confidence = draws
        kept = picked
        if config.remasking not in ("random", "origin"):
            scores = scores.masked_fill(~picked, -torch.inf)
            if config.is_parallel:
                least = 0 if flight.windows and config.cache_unsure == "refresh" else 1
                kept = select_confident(scores, config.threshold, config.factor, least)
            else:
                kept = picked & select_highest(scores, counts)
        decision = torch.stack((torch.where(kept, tokens, -1.0), log_confidence.exp()))
    decision = broadcast_from_last_stage(decision, model.layout)
    return decision[0].long(), decision[1]
