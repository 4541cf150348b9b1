"""Model passes through Megatron's schedules, with the output head on chosen rows only.

A :class:`RowBatch` names the hidden states that something will be read from. The last layer leaves
out the others after its keys and values (see passes/state.py), and on the last stage
:func:`select_rows` (GPTModel's ``output_processor``, passes/head.py) runs the output head on just
these rows and hands the logits of this vocabulary shard to a function.

With context parallelism each rank passes a contiguous part of the positions through the layers, and
the rows that the head reads are collected on all of them: what is made of the logits is the same on
every rank, so that callers need not know of it.

Batches are on the host. All that a pass needs to know of its rows is worked out there and sent to
the device in one copy that nothing waits for.

Symbols: b rows of tokens, s positions, r selected rows, n vocabulary entries of this rank.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config, unwrap_model
from torch import Tensor

from megatron_espo.device import current_device
from megatron_espo.parallel.layout import Layout, most_over_experts
from megatron_espo.passes.block_mask import BlockAttention
from megatron_espo.passes.head import ContextPart, HeadInput, LogitsFunction, select_rows
from megatron_espo.passes.state import (
    KeyValueCache,
    PassState,
    RoutingLog,
    SelectedRows,
    running,
    select_positions,
)
from megatron_espo.transfer import on_device

# FP8 matrix products want rows in multiples of 16, those of mxfp8 of 32.
_FP8_ROWS = 32


@dataclass(frozen=True)
class RowBatch:
    """One micro-batch of a pass over the model, on the host.

    Attributes:
        tokens: int64 ``[b, s]``, padded on the right; ``[b, w]`` where ``offsets`` are given.
        lengths: int64 ``[b]``; positions from ``lengths`` on are hidden from attention.
        rows: int64 ``[r]``, the row of ``tokens`` of each predicted token, ascending.
        positions: int64 ``[r]``, its position. With ``logit_shift`` the hidden state before it
            predicts it.
        payload: what the function of the logits needs besides the logits; its tensors are sent to
            the device with the rest.
        cache: keys and values that a pass without ``offsets`` fills and one with them uses; without
            gradients.
        offsets: int64 ``[b]``, where ``tokens`` start in the cached rows: the window of w positions
            that passes through the model. It lies inside the rows and holds every hidden state that
            is read; its tokens replace those that the cache was filled with.
        cache_rows: int64 ``[b]``, the rows of the cache that these are; None for all, in order.
        padded: whether any of ``lengths`` is below the rows' positions.
        sampling: whether tokens are drawn from the pass; see :class:`PassState`.
        sent: what passes over this batch have sent to the device before, by part of the model, for
            batches that pass several times; None where it is made anew.
        blocks: how tokens attend that come block by block; None where every position sees every
            other. With noisy copies ``tokens`` are ``[b, (K + 1) s]``, and ``positions`` places
            among them.
        key_limits: int64 like ``tokens``, at least 1: each position sees the keys before this one,
            whatever ``lengths`` and ``blocks`` say. None: not in use.
        routing: where routers of experts note what they choose, or None.
    """

    tokens: Tensor
    lengths: Tensor
    rows: Tensor
    positions: Tensor
    payload: Any = None
    cache: KeyValueCache | None = None
    offsets: Tensor | None = None
    cache_rows: Tensor | None = None
    padded: bool = True
    sampling: bool = False
    sent: "dict[Any, _Inputs] | None" = None
    blocks: BlockAttention | None = None
    key_limits: Tensor | None = None
    routing: RoutingLog | None = None


def padding_mask(lengths: Tensor, s: int) -> Tensor:
    """Build Megatron's attention mask for right-padded rows.

    Args:
        lengths: int64 ``[b]``.
        s: positions.

    Returns:
        bool ``[b, 1, 1, s]``, True where attention must not look.
    """
    return (torch.arange(s, device=lengths.device)[None, :] >= lengths[:, None])[:, None, None, :]


def run_model(
    model: torch.nn.Module,
    batch: RowBatch,
    logits_function: LogitsFunction,
    logit_shift: bool,
) -> Tensor:
    """Run one micro-batch through this rank's part of the model.

    Args:
        model: a GPTModel, possibly wrapped.
        batch: the micro-batch.
        logits_function: gets the float logits ``[r, n]`` and the batch's payload; called on the
            last stage only, with one extra dummy row instead of none where ``r`` is 0. A ByRows
            function gets them in chunks where --head-chunk says so.
        logit_shift: whether position i is predicted from the hidden state at i - 1 (Dream).

    Returns:
        The function's result on the last stage, hidden states elsewhere.
    """
    config = get_model_config(model)
    stage = unwrap_model(model)
    inputs = _sent_inputs(stage, batch, logit_shift)
    with running(inputs.state), _rotation_by_row(config, batch.offsets is not None):
        output: Tensor = model(
            inputs.tokens,
            inputs.position_ids.expand_as(inputs.tokens),
            _attention_mask(batch, inputs),
            padding_mask=_padding_of_routers(stage, batch, inputs),
            output_processor=select_rows,
            output_processor_context=(inputs.head, logits_function),
        )
    return output


class _Inputs(NamedTuple):
    """Everything that a pass sends to the device.

    Attributes:
        tokens: int64 ``[b, w]``.
        position_ids: int64 ``[1 or b, w]``.
        mask: bool ``[b, 1, 1, s]``.
        state: what the layers need to know.
        head: what the output head needs to know.
        places: where ``tokens`` begin and end among the places of whole rows.
        key_limits: the batch's, of ``tokens``.
    """

    tokens: Tensor
    position_ids: Tensor
    mask: Tensor
    state: PassState
    head: HeadInput
    places: tuple[int, int]
    key_limits: Tensor | None


def _sent_inputs(stage: Any, batch: RowBatch, logit_shift: bool) -> _Inputs:
    """Give what a pass needs, on the device; see ``RowBatch.sent``."""
    # All that it depends on besides the batch: FP8 wants other numbers of rows in some passes.
    key = (stage, bool(stage.config.fp8), logit_shift, _counts_tokens(stage))
    if batch.sent is not None and key in batch.sent:
        return batch.sent[key]
    inputs = on_device(_inputs(stage, batch, logit_shift), current_device())
    if batch.sent is not None:
        batch.sent[key] = inputs
    return inputs


def _attention_mask(batch: RowBatch, inputs: _Inputs) -> Tensor:
    """Build the mask of a pass on the device: it is far larger than what it is made of."""
    mask = inputs.mask
    if inputs.key_limits is not None:
        keys = torch.arange(mask.size(-1), device=mask.device)
        return keys >= inputs.key_limits[:, None, :, None]
    if batch.blocks is not None:
        return batch.blocks.hidden(mask if batch.padded else mask[:1] & False, *inputs.places)
    return mask


def _padding_of_routers(stage: Any, batch: RowBatch, inputs: _Inputs) -> Tensor | None:
    """Mark the padding, which routers must not count: bool ``[b, w]``; None where none counts."""
    if not _counts_tokens(stage) or not batch.padded:
        return None
    lengths = (~inputs.mask).sum(dim=-1).flatten()
    padding = inputs.position_ids >= lengths[:, None]
    if stage.config.sequence_parallel and not stage.pre_process:
        # Megatron splits it over the ranks where the tokens enter, and only there.
        group = stage.pg_collection.tp
        padding = padding.chunk(group.size(), dim=1)[group.rank()]
    return padding


def _counts_tokens(stage: Any) -> bool:
    """Whether a pass of now counts the tokens of each expert; see model/experts.py."""
    return bool(stage.counts_tokens and stage.training and torch.is_grad_enabled())


def _inputs(stage: Any, batch: RowBatch, logit_shift: bool) -> _Inputs:
    """Work out, on the host, what this rank's part of the model needs for a pass."""
    b, s = batch.tokens.shape
    tokens, rows, places = batch.tokens, batch.rows, batch.positions - int(logit_shift)
    position_ids = torch.arange(s)[None]
    window, part, held, limits = None, None, (0, s), batch.key_limits
    if batch.blocks is not None:
        s //= batch.blocks.copies + 1
        position_ids = position_ids % s
        window = position_ids.expand_as(tokens) if batch.blocks.copies else None
    if batch.offsets is not None:
        assert batch.blocks is None, "windows attend to all keys up to their row's length"
        assert batch.cache is not None, "a window needs the keys and values of the rest"
        position_ids, s = position_ids + batch.offsets[:, None], batch.cache.width
        window, places = position_ids, places - batch.offsets[rows]
    cp_group = stage.pg_collection.cp
    if cp_group.size() > 1:
        assert batch.cache is None, "a cache holds all positions of its rows"
        width = tokens.size(1) // cp_group.size()
        start = cp_group.rank() * width
        held = (start, start + width)
        limits = None if limits is None else limits[:, start : start + width]
        tokens = tokens[:, start : start + width]
        window = position_ids = position_ids[:, start : start + width].expand_as(tokens)
        part = ContextPart(
            ((places >= start) & (places < start + width)).nonzero()[:, 0], rows.numel(), cp_group
        )
        rows, places = rows[part.places], places[part.places] - start
        if rows.numel() == 0:  # the layers want something to work on; it is dropped before the head
            rows, places = part.places.new_zeros(1), part.places.new_zeros(1)
    selected = _select(stage, tokens, rows, places)
    # Attention that runs again in the backward pass knows of no pass and takes the mask.
    padded = batch.padded or stage.config.recompute_granularity is not None
    # Other masks hide more than padding.
    padded = padded or batch.blocks is not None or limits is not None
    noisy = batch.blocks if batch.blocks is not None and batch.blocks.copies else None
    noisy = noisy if part is None else None
    sampling = batch.sampling
    state = PassState(
        selected, batch.cache, batch.cache_rows, window, s, padded, sampling, noisy, batch.routing
    )
    # Where the last layer gives more than is read, the head takes its rows out of all of them.
    index = places * b + rows if selected is None else None
    num_rows = batch.rows.numel() if part is None else part.places.numel()
    head = HeadInput(num_rows, index, part, batch.payload)
    mask = padding_mask(batch.lengths, s)
    return _Inputs(tokens, position_ids, mask, state, head, held, limits)


def _select(stage: Any, tokens: Tensor, rows: Tensor, places: Tensor) -> SelectedRows | None:
    """Let the last layer leave out the rows that nothing reads, where that works."""
    config = stage.config
    if not stage.post_process or len(stage.decoder.layers) == 0:
        return None
    if config.recompute_granularity == "full":
        # The layer runs again in the backward pass, when this pass is long over. Passes without
        # gradients keep the rows, too: kernels and FP8 scales may round other shapes otherwise.
        return None
    if _counts_tokens(stage) or stage.same_tokens:
        # The last layer's experts must see all tokens as those of the others do; or ranks that
        # share them must have as many.
        return None
    b, width = tokens.shape
    tp_group = stage.pg_collection.tp if config.sequence_parallel else None
    multiple = (1 if tp_group is None else tp_group.size()) * (_FP8_ROWS if config.fp8 else 1)
    if rows.numel() + multiple > b * width:
        return None
    per_row = int(torch.bincount(rows, minlength=b).max())
    return select_positions(rows, places, b, per_row, multiple, tp_group)


@contextlib.contextmanager
def _rotation_by_row(config: Any, needed: bool) -> Iterator[None]:
    """Rotate without Megatron's fused kernel, which knows one position for all rows only."""
    fused = config.apply_rope_fusion
    config.apply_rope_fusion = fused and not needed
    try:
        yield
    finally:
        config.apply_rope_fusion = fused


def forward_only(
    model: Sequence[torch.nn.Module],
    batches: Sequence[RowBatch],
    logits_function: LogitsFunction,
    logit_shift: bool,
    layout: Layout,
    new_weights: bool = True,
) -> list[Tensor]:
    """Run micro-batches through all pipeline stages, without gradients.

    Args:
        model: this rank's model chunks.
        batches: micro-batches, the same on every rank of the model-parallel group. Pipeline stages
            hand each other hidden states of one shape in one call of the schedule: there is one for
            each run of batches of the same ``[b, s]``.
        logits_function: see :func:`run_model`.
        logit_shift: see :func:`run_model`.
        layout: process groups.
        new_weights: whether the weights may have changed since the last pass. With FP8 they are
            then quantized anew; Transformer Engine would go on with the copy that it keeps for the
            micro-batches after the first one of a step.

    Returns:
        The function's results in order on the last stage; an empty list elsewhere.
    """
    most = most_over_experts(len(batches), layout, current_device())
    results = _run_all(model, batches, logits_function, logit_shift, layout, new_weights)
    _run_idle(model, most - len(batches), layout)
    return results


def keep_company(model: Sequence[torch.nn.Module], layout: Layout) -> None:
    """Make passes over nothing until all ranks that share experts have come here.

    Each layer's experts lie on all of these ranks, so that a pass of one is a pass of all. Called
    where their numbers of passes may differ, after this rank's last one.

    Args:
        model: this rank's model chunks.
        layout: process groups.
    """
    while (most := most_over_experts(0, layout, current_device())) > 0:
        _run_idle(model, most, layout)


def _run_idle(model: Sequence[torch.nn.Module], count: int, layout: Layout) -> None:
    """Make passes over one row of padding, of which nothing is read."""
    if count == 0:
        return
    width = _FP8_ROWS * layout.tp_size * layout.cp_size
    place = torch.zeros(1, dtype=torch.int64)
    batch = RowBatch(torch.zeros(1, width, dtype=torch.int64), place + width, place, place + 1)
    _run_all(model, [batch] * count, lambda logits, _: logits.sum(), False, layout, False)


def _run_all(
    model: Sequence[torch.nn.Module],
    batches: Sequence[RowBatch],
    logits_function: LogitsFunction,
    logit_shift: bool,
    layout: Layout,
    new_weights: bool,
) -> list[Tensor]:
    """Run micro-batches; see :func:`forward_only`."""
    if layout.pp_size == 1:
        chunk: Any = model[0]
        if new_weights:
            chunk.set_is_first_microbatch()
        # The schedule would do just this; calling the model spares its bookkeeping per step.
        with torch.no_grad():
            return [run_model(chunk, b, logits_function, logit_shift) for b in batches]

    results: list[Tensor] = []
    for _, alike in itertools.groupby(batches, lambda batch: batch.tokens.shape):
        # A stage begins the next run as soon as it has handed on its last micro-batch of this one.
        results += _run_schedule(
            model, list(alike), logits_function, logit_shift, layout, new_weights
        )
        new_weights = False
    return results


def _run_schedule(
    model: Sequence[torch.nn.Module],
    batches: Sequence[RowBatch],
    logits_function: LogitsFunction,
    logit_shift: bool,
    layout: Layout,
    new_weights: bool,
) -> list[Tensor]:
    """Run micro-batches of one shape through the pipeline stages; see :func:`forward_only`."""
    shape = batches[0].tokens.shape
    num_batches = len(batches)
    if len(model) > 1:
        # The interleaved schedule takes micro-batches in rounds of one per pipeline stage.
        batches = [*batches, *[batches[-1]] * (-num_batches % layout.pp_size)]

    def forward_step(iterator: Any, chunk: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        output = run_model(chunk, next(iterator), logits_function, logit_shift)
        return output, lambda tensor, non_loss_data: tensor

    iterators = [iter(batches) for _ in model]
    with torch.no_grad():
        results = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(model) > 1 else iterators[0],
            model=list(model) if len(model) > 1 else model[0],
            num_microbatches=len(batches),
            seq_length=shape[1],
            micro_batch_size=shape[0],
            forward_only=True,
            collect_non_loss_data=True,
            first_val_step=new_weights,
        )
    return list(results)[:num_batches]
