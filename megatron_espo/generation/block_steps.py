"""Denoising steps of models whose tokens come block by block (passes/block_mask.py).

Blocks are counted from position 0 of a row: the first one that is opened may begin inside the
prompt, and the completion's last one may be cut short (SDAR, arXiv 2510.06303). What is finished
sees nothing that comes later, so that its keys and values are final. With ``--rollout-cache exact``
they are kept: one pass takes in the whole blocks of the prompts of a micro-batch, each finished
block is passed once more for its own, and a denoising step passes the open block alone. The tokens
are those of passes over whole rows, which are made without a cache. What a prompt's completions
have in common is taken in once for all of them in a micro-batch: it does not see them.

Rows of a micro-batch go from block to block each for itself; rows that are final leave the cache,
and others enter when all of them have left.

Symbols: a rows of a step, b rows of a pass, k block length, w positions of a pass, r candidates.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_espo.generation.rows import Rows
from megatron_espo.generation.scheduler import MicroBatch, Scheduler
from megatron_espo.model.handle import DiffusionModel
from megatron_espo.parallel.layout import broadcast_from_last_stage
from megatron_espo.passes.block_mask import BlockAttention
from megatron_espo.passes.head import LogitsFunction
from megatron_espo.passes.pipeline import RowBatch, forward_only
from megatron_espo.passes.shapes import round_up
from megatron_espo.passes.state import KeyValueCache


@dataclass(frozen=True)
class _Asked:
    """What a step asks of the model.

    Attributes:
        index: int64 ``[a]``, rows that are denoised or whose finished block is taken in.
        picked: bool ``[a, k]``, candidates; none in a finished block.
        uniforms: float64 ``[a, k]``.
    """

    index: Tensor
    picked: Tensor
    uniforms: Tensor


def evaluate_blocks(
    model: DiffusionModel,
    rows: Rows,
    scheduler: Scheduler,
    index: Tensor,
    picked: Tensor,
    uniforms: Tensor,
    draw: LogitsFunction,
) -> Tensor:
    """Run the model on open and finished blocks and draw a token for every candidate.

    Args:
        model: the model.
        rows: the rows.
        scheduler: the micro-batches and their caches.
        index: int64 ``[a]``, the rows of this step.
        picked: bool ``[a, k]``, the candidates.
        uniforms: float64 ``[a, k]``.
        draw: makes float64 ``[4, r]`` of logits and the uniform numbers of their candidates.

    Returns:
        float64 ``[4, a, k]`` on the host, on every rank.
    """
    assert model.blocks is not None
    asked = _Asked(index, picked, uniforms)
    place = {row: i for i, row in enumerate(index.tolist())}
    mine = [[row for row in batch.rows if row in place] for batch in scheduler.batches]
    parts = [
        (batch, torch.tensor([place[row] for row in part]))
        for batch, part in zip(scheduler.batches, mine, strict=True)
        if part
    ]
    run = partial(_run, model=model, draw=draw, first=not rows.num_evaluations.any())
    if scheduler.config.cache == "exact":
        begun = [batch for batch, _ in parts if batch.cache is None]
        shared = [_prefixes(rows, batch) for batch in begun]
        if begun:
            run([_prefill(model, rows, *one) for one in zip(begun, shared, strict=True)])
            for batch, (_, places) in zip(begun, shared, strict=True):
                assert batch.cache is not None
                batch.cache.keep(places)
                batch.cache.widen(rows.tokens.size(1))
        passes = [_window(model, rows, batch, asked, own) for batch, own in parts]
    else:
        passes = [_whole(model, rows, asked, own) for _, own in parts]
    results = run(passes)
    draws = torch.zeros(4, *picked.shape, dtype=torch.float64)
    found = [picked[own].nonzero(as_tuple=True) for _, own in parts]
    numbers = [len(row) for row, _ in found]
    if model.layout.is_last_stage:
        # Of a pass without candidates one row was read all the same.
        kept = [result[:, :number] for result, number in zip(results, numbers, strict=True)]
        drawn = torch.cat(kept, dim=1)
    else:
        drawn = torch.empty(4, sum(numbers), dtype=torch.float64, device=model.device)
    where = torch.cat([own[row] for (_, own), (row, _) in zip(parts, found, strict=True)])
    columns = torch.cat([column for _, column in found])
    draws[:, where, columns] = broadcast_from_last_stage(drawn, model.layout).cpu()
    return draws


def _run(
    passes: list[RowBatch], *, model: DiffusionModel, draw: LogitsFunction, first: bool
) -> list[Tensor]:
    return forward_only(model.chunks, passes, draw, model.logit_shift, model.layout, first)


def _limits(model: DiffusionModel, rows: Rows, index: Tensor, positions: Tensor) -> Tensor:
    """Say how far the positions ``[b or 1, w]`` of some rows see: int64 ``[b, w]``."""
    blocks = model.blocks
    assert isinstance(blocks, BlockAttention)
    starts = rows.starts(index)
    ends = torch.minimum(starts + blocks.size, torch.tensor(rows.widths)[index])
    # A block that is final is finished, not one that is still edited.
    opened = torch.where(rows.complete[index], ends, starts)
    return blocks.key_limits(positions, opened, ends)


class _Prefixes(NamedTuple):
    """What lies before the first open blocks of a micro-batch, each prefix once.

    Attributes:
        rows: int64 ``[u]``, a row that begins with each.
        places: int64 ``[b]``, the prefix of each row, among them.
    """

    rows: Tensor
    places: Tensor


def _prefixes(rows: Rows, batch: MicroBatch) -> _Prefixes:
    """Find the rows of a micro-batch that begin alike."""
    known: dict[tuple[int, ...], int] = {}
    index: list[int] = []
    places: list[int] = []
    for row, start in zip(batch.rows, rows.starts(torch.tensor(batch.rows)).tolist(), strict=True):
        place = known.setdefault(tuple(rows.tokens[row, :start].tolist()), len(index))
        if place == len(index):
            index.append(row)
        places.append(place)
    return _Prefixes(torch.tensor(index), torch.tensor(places))


def _prefill(model: DiffusionModel, rows: Rows, batch: MicroBatch, prefixes: _Prefixes) -> RowBatch:
    """Take in what lies before the first open blocks of a micro-batch; nothing is read."""
    index = prefixes.rows
    starts = rows.starts(index)
    width = round_up(max(int(starts.max()), 1), model.pad_multiple)
    batch.cache, batch.cached = KeyValueCache(), list(batch.rows)
    rows.count_pass(index, width, width, _read(torch.zeros_like(index)))
    shift = int(model.logit_shift)
    return RowBatch(
        rows.tokens[index, :width],
        starts.clamp(min=1),
        torch.zeros(1, dtype=torch.int64),
        torch.full((1,), shift),
        torch.zeros(1, dtype=torch.float64),
        cache=batch.cache,
        sampling=True,
        key_limits=_limits(model, rows, index, torch.arange(width)[None]),
    )


def _read(candidates: Tensor) -> Tensor:
    """Count the states that the head reads of each row: of a pass without candidates, one."""
    if not candidates.any():
        candidates[0] = 1
    return candidates


def _candidates_of(
    rows: Rows, asked: _Asked, own: Tensor, shift: int, fallback: int
) -> tuple[Tensor, Tensor, Any]:
    """Name the rows, positions and uniform numbers of a pass's candidates, or of one place."""
    row, column = asked.picked[own].nonzero(as_tuple=True)
    if len(row) == 0:
        nothing = torch.zeros(1, dtype=torch.int64)
        return nothing, nothing + fallback + shift, nothing.double()
    positions = rows.starts(asked.index[own])[row] + column
    return row, positions, asked.uniforms[own[row], column]


def _window(
    model: DiffusionModel, rows: Rows, batch: MicroBatch, asked: _Asked, own: Tensor
) -> RowBatch:
    """Pass the blocks that a micro-batch's rows are in, beside the keys and values before them."""
    assert batch.cache is not None
    index, shift = asked.index[own], int(model.logit_shift)
    if batch.cached != batch.rows:  # some have left
        batch.cache.keep(torch.tensor([batch.cached.index(row) for row in batch.rows]))
        batch.cached = list(batch.rows)
    assert index.tolist() == batch.rows, "every row in flight takes part in every step"
    # The state before a block predicts its first token where logits are shifted.
    offsets = (rows.starts(index) - shift).clamp(min=0)
    window = offsets[:, None] + torch.arange(asked.picked.size(1) + shift)
    chosen, positions, payload = _candidates_of(rows, asked, own, shift, int(offsets[0]))
    width = rows.tokens.size(1)
    rows.count_pass(index, window.size(1), width, _read(asked.picked[own].sum(1)))
    return RowBatch(
        rows.tokens[index].gather(1, window),
        torch.full_like(index, width),
        chosen,
        positions,
        payload,
        cache=batch.cache,
        offsets=offsets,
        sampling=True,
        key_limits=_limits(model, rows, index, window),
    )


def _whole(model: DiffusionModel, rows: Rows, asked: _Asked, own: Tensor) -> RowBatch:
    """Pass rows up to their open blocks."""
    index, shift = asked.index[own], int(model.logit_shift)
    ends = rows.starts(index) + asked.picked.size(1)
    width = round_up(int(ends.max()), model.pad_multiple)
    chosen, positions, payload = _candidates_of(rows, asked, own, shift, 0)
    rows.count_pass(index, width, width, asked.picked[own].sum(1))
    return RowBatch(
        rows.tokens[index, :width],
        ends,
        chosen,
        positions,
        payload,
        sampling=True,
        key_limits=_limits(model, rows, index, torch.arange(width)[None]),
    )
