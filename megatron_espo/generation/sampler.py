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
from megatron_espo.device import no_interception
from megatron_espo.generation.block_steps import evaluate_blocks
from megatron_espo.generation.editing import select_edits
from megatron_espo.generation.remasking import (
    dream_commit_shares,
    rank_by,
    select_confident,
    select_highest,
)
from megatron_espo.generation.rows import Rows, lay_out_rows
from megatron_espo.generation.scheduler import MicroBatch, Scheduler
from megatron_espo.model.handle import DiffusionModel
from megatron_espo.parallel.layout import broadcast_from_last_stage
from megatron_espo.parallel.vocab import draw_tokens
from megatron_espo.passes.head import ByRows
from megatron_espo.passes.pipeline import RowBatch, forward_only, keep_company
from megatron_espo.passes.state import KeyValueCache


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
            committed, the last time, before temperature (with guidance: under the guided
            distribution).
        work: float64 ``[n, 4]``, what passed through the model for each completion: positions,
            positions times the keys that they attended to, hidden states that reached the output
            head, and these times their keys (``monitor.flops.passed_flops`` makes operations of
            them). Padding is counted, copies of rows that fill up a micro-batch are not.
        commit_steps: int32 ``[n, l]``, the step map: which of its completion's model evaluations,
            counted from 0 through all blocks, committed each token, the last time; -1 for tokens
            that were filled in. ``[n, 0]`` where it was not asked for.
    """

    completions: Tensor
    num_evaluations: Tensor
    num_committed: Tensor
    mean_confidence: Tensor
    work: Tensor
    commit_steps: Tensor

    @property
    def tokens_per_step(self) -> Tensor:
        """Tokens that a model evaluation committed on average: float32 ``[n]``."""
        return self.num_committed / self.num_evaluations


def generate(
    model: DiffusionModel,
    prompts: Sequence[Sequence[int]],
    sample_ids: Tensor,
    config: RolloutConfig,
    seed: int,
    purpose: str,
    on_step: Callable[[Tensor], None] | None = None,
    on_finished: Callable[[Tensor, Tensor], None] | None = None,
    record_steps: bool = False,
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
        on_step: called with the completions so far, int64 ``[n, l]`` on the host with the mask
            token where nothing is committed yet, after every step; the next step changes them. May
            raise Interrupted.
        on_finished: called as soon as some rows are final, with their numbers, int64 ``[f]``, and
            their completions, int64 ``[f, l]``, both on the host, while others are still to be
            sampled. Each row is reported once, on every rank of the model-parallel group.
        record_steps: keep the step map.

    Returns:
        The completions in the order of the prompts.
    """
    try:
        found = _generate(
            model, prompts, sample_ids, config, seed, purpose, on_step, on_finished, record_steps
        )
    except Interrupted:
        keep_company(model.chunks, model.layout)
        raise
    # Ranks that share experts go on together until the last one has its completions.
    keep_company(model.chunks, model.layout)
    return found


@torch.no_grad()
def _generate(
    model: DiffusionModel,
    prompts: Sequence[Sequence[int]],
    sample_ids: Tensor,
    config: RolloutConfig,
    seed: int,
    purpose: str,
    on_step: Callable[[Tensor], None] | None,
    on_finished: Callable[[Tensor, Tensor], None] | None,
    record_steps: bool,
) -> Generation:
    """Sample this rank's completions; see :func:`generate`."""
    length, n = config.completion_length, len(prompts)
    if n == 0:
        nothing = torch.empty(0, dtype=torch.int64)
        work = torch.empty(0, 4, dtype=torch.float64)
        steps = torch.empty(0, length if record_steps else 0, dtype=torch.int32)
        return Generation(nothing.view(0, length), nothing, nothing, torch.empty(0), work, steps)
    scheduler = Scheduler.of(n, config, model.layout.pp_size)
    rows = lay_out_rows(model, prompts, sample_ids, config, len(scheduler.schedule), record_steps)
    while scheduler.admit():
        # Megatron's pipeline schedules name the device "cuda".
        with no_interception() if model.layout.pp_size == 1 else nullcontext():
            final = _denoise(model, rows, scheduler, seed, purpose)
        if on_step is not None:
            on_step(rows.completions)
        if len(final) and on_finished is not None:
            numbers = rows.order[final]
            on_finished(numbers, rows.completions[numbers])
        scheduler.leave(final.tolist())
        rows.enter_next_block(torch.tensor(scheduler.to_next_block(rows.complete.tolist())).long())
    back = rows.order.argsort()  # to the caller's order
    return Generation(
        rows.completions,
        rows.num_evaluations[back],
        rows.num_committed[back],
        (rows.confidence[back] / rows.num_committed[back]).float(),
        rows.work[back],
        torch.empty(n, 0, dtype=torch.int32) if rows.commit_steps is None else rows.commit_steps,
    )


def _denoise(
    model: DiffusionModel, rows: Rows, scheduler: Scheduler, seed: int, purpose: str
) -> Tensor:
    """Make one denoising step with all rows in flight whose block is not complete.

    With a cache a step passes either whole rows or windows: rows that want a whole pass wait until
    no other can go on with a window, so that they pass together.

    Returns:
        int64 ``[f]``: the rows that are final now.
    """
    config = scheduler.config
    index = torch.tensor(scheduler.rows)
    if config.cache != "exact":
        # With this cache a complete block is passed once more, and its row goes on by itself.
        index = index[~rows.complete[index]]
    if config.cache in ("prefix", "dual"):
        whole = rows.want_whole_passes(index, config.cache_refresh_steps)
        scheduler.windows = not bool(whole.all())
        index = index[~whole] if scheduler.windows else index
    if config.temperature > 0.0 or config.remasking in ("random", "origin"):
        noise = rows.noise(index, seed, purpose)
    else:
        noise = torch.zeros(len(index), 2, config.block_length, dtype=torch.float64)
    step = rows.step[index]
    finished = index[rows.complete[index]]
    counts = scheduler.schedule[step.clamp(max=len(scheduler.schedule) - 1)]
    picked = _candidates(rows.masked[index], noise[:, 1], step, config, counts)
    if config.is_editing:
        # Committed tokens, too: all of the completion in blocks that are not final.
        picked = rows.places(index) & ~rows.complete[index, None]
    evaluated = picked.any(1)
    if evaluated.any() or len(finished):
        draws = _evaluate(model, rows, scheduler, index, picked, noise[:, 0])
        scheduler.passes += 1
        rows.commit(index, *_choose(draws, picked, rows, index, scheduler, counts))
        rows.num_evaluations[index] += evaluated
    rows.enter_next_block(finished)
    stops = torch.tensor(model.stop_token_ids) if config.early_stop else None
    open_rows = index[~torch.isin(index, finished)]
    return rows.end_step(open_rows, stops, model.eos_token_id)


def _candidates(
    masked: Tensor, order_noise: Tensor, step: Tensor, config: RolloutConfig, counts: Tensor
) -> Tensor:
    """Choose the positions that a step evaluates.

    Orders that do not look at the model's output are decided before the model runs, so that the
    output head sees just the tokens that will be committed.

    Args:
        masked: bool ``[a, k]``.
        order_noise: float64 ``[a, k]``.
        step: int64 ``[a]``.
        config: sampling settings.
        counts: int64 ``[a]``, tokens that the schedule commits.

    Returns:
        bool ``[a, k]``.
    """
    if config.remasking == "origin":
        shares = dream_commit_shares(config.steps_per_block)[step].double()
        return masked & (order_noise < shares[:, None])
    if config.remasking == "random":
        # A block that is cut short may have fewer masked positions than the schedule commits.
        return masked & select_highest(order_noise.masked_fill(~masked, -1.0), counts)
    return masked & (counts > 0)[:, None]


def _evaluate(
    model: DiffusionModel,
    rows: Rows,
    scheduler: Scheduler,
    index: Tensor,
    picked: Tensor,
    uniforms: Tensor,
) -> Tensor:
    """Run the model and draw a token for every candidate.

    Args:
        model: the model.
        rows: the rows.
        scheduler: the micro-batches and their caches, which whole passes fill.
        index: int64 ``[a]``, the rows of this step.
        picked: bool ``[a, k]``, the candidates.
        uniforms: float64 ``[a, k]``.

    Returns:
        float64 ``[4, a, k]`` on the host, on every rank: of each candidate the token, its score,
        the probability that the score is the logarithm of, and the token's probability.
    """
    config = scheduler.config
    # A row of logits without the prompt beside each, for guidance.
    copies = 2 if config.guidance_scale > 0.0 else 1
    draw = ByRows(partial(_draw, model=model, config=config), _uniforms, _drawn, copies)
    if model.blocks is not None:
        return evaluate_blocks(model, rows, scheduler, index, picked, uniforms, draw)
    place = {row: i for i, row in enumerate(index.tolist())}
    taking_part = index[picked.any(1)].tolist()
    # Virtual pipeline stages take passes in rounds of one per stage.
    together = model.layout.pp_size if len(model.chunks) > 1 else 1
    made, found = [], []
    for batch, part, number, positions in scheduler.passes_of_step(
        taking_part, rows.widths, model.shapes, together
    ):
        # Copies of a row, of which nothing is read, fill a pass up.
        own = torch.tensor([place[row] for row in part + part[-1:] * (number - len(part))])
        kept = own[: len(part)]
        row, column = picked[kept].nonzero(as_tuple=True)
        found.append((kept[row], column))
        mine = index[own]
        tokens, starts = rows.tokens[mine], rows.starts(mine)
        uncached = RowBatch(
            tokens[:, :positions],
            rows.prompt_lengths[mine] + config.completion_length,
            row,
            starts[row] + column,
            uniforms[kept[row], column],
            sampling=True,
        )
        if config.guidance_scale > 0.0:
            made.append(_add_unconditional(uncached, rows.prompt_lengths[mine], model))
        elif config.cache == "none":
            made.append(uncached)
        else:
            made.append(
                _use_cache(uncached, tokens, batch, mine.tolist(), starts, scheduler, model)
            )
        copies = 2 if config.guidance_scale > 0.0 else 1
        passed, cache = made[-1].tokens.size(1), made[-1].cache
        keys = passed if made[-1].offsets is None or cache is None else cache.width
        real = index[kept]
        rows.count_pass(real, copies * passed, keys, copies * picked[kept].sum(1))
        shortest = min(rows.widths[row] for row in real.tolist())
        made[-1] = replace(made[-1], padded=shortest < keys)
    results = forward_only(
        model.chunks,
        made,
        draw,
        model.logit_shift,
        model.layout,
        # Only before the first step of a call; the next ones use the same FP8 copy of the weights.
        new_weights=not rows.num_evaluations.any(),
    )
    where, columns = (torch.cat(places) for places in zip(*found, strict=True))
    if model.layout.is_last_stage:
        drawn = torch.cat(results, dim=1)
    else:
        drawn = torch.empty(4, len(where), dtype=torch.float64, device=model.device)
    draws = torch.zeros(4, *picked.shape, dtype=torch.float64)
    draws[:, where, columns] = broadcast_from_last_stage(drawn, model.layout).cpu()
    return draws


def _add_unconditional(batch: RowBatch, prompt_lengths: Tensor, model: DiffusionModel) -> RowBatch:
    """Let the rows be followed by themselves without the prompt, for guidance."""
    tokens = batch.tokens
    is_prompt = torch.arange(tokens.size(1)) < prompt_lengths[:, None]
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
    scheduler: Scheduler,
    model: DiffusionModel,
) -> RowBatch:
    """Make a pass fill its micro-batch's cache, or pass only a window of its rows.

    Args:
        whole: the pass over whole rows.
        tokens: int64 ``[b, s]``, the rows, not cut to the pass's width.
        batch: the micro-batch.
        names: its b rows of this pass.
        starts: int64 ``[b]``, where their blocks start.
        scheduler: says which of the two the pass is.
        model: the model.

    Returns:
        The pass.
    """
    config = scheduler.config
    if scheduler.passes == 0:
        batch.cache, batch.cached = KeyValueCache(), names
        return replace(whole, cache=batch.cache)
    assert batch.cache is not None
    rows = None  # all of them: then nothing of the cache is copied
    if names != batch.cached:
        rows = torch.tensor([batch.cached.index(name) for name in names])
    if not scheduler.windows:
        # The cache keeps its width when the longest of its rows have left.
        whole = replace(whole, tokens=tokens[:, : batch.cache.width])
        return replace(whole, cache=batch.cache, cache_rows=rows)
    # The state that predicts a block's first token lies before it where logits are shifted.
    offsets = starts - int(model.logit_shift)
    # All rows are in the same block where windows reach to their ends.
    end = starts + config.block_length if config.cache == "dual" else whole.lengths
    window = torch.arange(int(end[0] - offsets[0]))
    return replace(
        whole,
        tokens=tokens.gather(1, offsets[:, None] + window),
        cache=batch.cache,
        offsets=offsets,
        cache_rows=rows,
    )


def _uniforms(payload: Tensor) -> Tensor:
    return payload


def _drawn(draws: Tensor, payload: Tensor) -> Tensor:
    return draws


def _draw(
    logits: Tensor, uniforms: Tensor, _: Any, *, model: DiffusionModel, config: RolloutConfig
) -> Tensor:
    """Draw a token from each row of logits: float64 ``[4, r]``, as :func:`_evaluate` gives them."""
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
        top_p=config.top_p,
        top_k=config.top_k,
        margin=config.remasking == "topk_margin",
        entropy=config.remasking == "entropy",
    )
    decided = config.remasking in ("random", "origin")
    scores = draw.log_confidence if decided else rank_by(config.remasking, draw)
    scores = torch.stack((scores, draw.log_confidence)).double()
    return torch.cat((draw.tokens.double()[None], scores[:1], scores.exp()))


def _choose(
    draws: Tensor, picked: Tensor, rows: Rows, index: Tensor, scheduler: Scheduler, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """Decide which candidates are committed.

    Args:
        draws: float64 ``[4, a, k]``, from :func:`_evaluate`.
        picked: bool ``[a, k]``, the candidates.
        rows: the rows.
        index: int64 ``[a]``, those of this step.
        scheduler: says whether the draws come from windows of cached rows.
        counts: int64 ``[a]``, tokens that the schedule commits.

    Returns:
        int64 ``[a, k]``, the token for each place of the block or -1, and float64 ``[a, k]``,
        their probabilities.
    """
    config, kept = scheduler.config, picked
    tokens, scores, likelihood, confidence = draws
    masked = rows.masked[index] & picked
    if config.remasking not in ("random", "origin"):
        scores = scores.masked_fill(~masked, -torch.inf)
        if config.is_parallel:
            least = 0 if scheduler.windows and config.cache_unsure == "refresh" else 1
            kept = select_confident(scores, likelihood, config.threshold, config.factor, least)
        else:
            kept = picked & select_highest(scores, counts)
    if config.editing_threshold is not None:
        kept = kept | select_edits(
            tokens.long(),
            likelihood,
            rows.block_tokens(index),
            picked & ~masked,
            config.editing_threshold,
        )
    return torch.where(kept, tokens, -1.0).long(), confidence
