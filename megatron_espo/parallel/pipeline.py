"""Model passes through Megatron's schedules, with the output head on chosen rows only.

A :class:`RowBatch` names the hidden states that something will be read from. The last layer leaves
out the others after its keys and values (see parallel/passes.py), and on the last stage
:func:`select_rows` (GPTModel's ``output_processor``) runs the output head on just these rows and
hands the logits of this vocabulary shard to a function.

With context parallelism each rank passes a contiguous part of the positions through the layers, and
the rows that the head reads are collected on all of them: what is made of the logits is the same on
every rank, so that callers need not know of it.

Symbols: b rows of tokens, s positions, r selected rows, n vocabulary entries of this rank.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.utils import get_model_config, unwrap_model
from torch import Tensor

from megatron_espo.parallel.layout import Layout
from megatron_espo.parallel.passes import (
    KeyValueCache,
    PassState,
    SelectedRows,
    join_context,
    running,
    select_positions,
)

LogitsFunction = Callable[[Tensor, Any], Tensor]

# FP8 matrix products want rows in multiples of 16, those of mxfp8 of 32.
_FP8_ROWS = 32


@dataclass(frozen=True)
class RowBatch:
    """One micro-batch of a pass over the model.

    Attributes:
        tokens: int64 ``[b, s]``, padded on the right; ``[b, w]`` where ``offsets`` are given.
        lengths: int64 ``[b]``; positions from ``lengths`` on are hidden from attention.
        rows: int64 ``[r]``, the row of ``tokens`` of each predicted token, ascending.
        positions: int64 ``[r]``, its position. With ``logit_shift`` the hidden state before it
            predicts it.
        payload: what the function of the logits needs besides the logits.
        cache: keys and values that a pass without ``offsets`` fills and one with them uses; without
            gradients.
        offsets: int64 ``[b]``, where ``tokens`` start in the cached rows: the window of w positions
            that passes through the model. It lies inside the rows and holds every hidden state that
            is read; its tokens replace those that the cache was filled with.
        cache_rows: int64 ``[b]``, the rows of the cache that these are; None for all, in order.
        padded: whether any of ``lengths`` is below the rows' positions. Who makes the batch says
            it, on the host: to look at it in a pass would be to wait for the device.
        sampling: whether tokens are drawn from the pass; see :class:`PassState`.
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

    def to(self, device: torch.device) -> "RowBatch":
        """Return the batch with its tensors on ``device`` (the payload is left alone)."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)


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
        batch: the micro-batch, on this rank's device.
        logits_function: gets the float logits ``[r, n]`` and the batch's payload; called on the
            last stage only, with one extra dummy row instead of none where ``r`` is 0.
        logit_shift: whether position i is predicted from the hidden state at i - 1 (Dream).

    Returns:
        The function's result on the last stage, hidden states elsewhere.
    """
    b, s = batch.tokens.shape
    tokens, rows, places = batch.tokens, batch.rows, batch.positions - int(logit_shift)
    position_ids = torch.arange(s, device=tokens.device)[None, :].expand(b, -1)
    window, part = None, None
    if batch.offsets is not None:
        assert batch.cache is not None, "a window needs the keys and values of the rest"
        position_ids, s = position_ids + batch.offsets[:, None], batch.cache.width
        window, places = position_ids, places - batch.offsets[rows]
    config, stage = get_model_config(model), unwrap_model(model)
    cp_group = stage.pg_collection.cp
    if cp_group.size() > 1:
        assert batch.cache is None, "a cache holds all positions of its rows"
        width = s // cp_group.size()
        start = cp_group.rank() * width
        tokens = tokens[:, start : start + width]
        window = position_ids = position_ids[:, start : start + width]
        part = _ContextPart(
            ((places >= start) & (places < start + width)).nonzero()[:, 0], rows.numel(), cp_group
        )
        rows, places = rows[part.places], places[part.places] - start
        if rows.numel() == 0:  # the layers want something to work on; it is dropped before the head
            rows, places = part.places.new_zeros(1), part.places.new_zeros(1)
    selected = _select(stage, tokens, rows, places)
    # Attention that runs again in the backward pass knows of no pass and takes the mask.
    padded = batch.padded or config.recompute_granularity is not None
    state = PassState(selected, batch.cache, batch.cache_rows, window, s, padded, batch.sampling)
    # Where the last layer gives more than is read, the head takes its rows out of all of them.
    index = places * b + rows if selected is None else None
    with running(state), _rotation_by_row(config, batch.offsets is not None):
        output: Tensor = model(
            tokens,
            position_ids,
            padding_mask(batch.lengths, s),
            output_processor=select_rows,
            output_processor_context=(batch, logits_function, index, part),
        )
    return output


class _ContextPart(NamedTuple):
    """The selected rows that lie in this context-parallel rank's part of the positions.

    Attributes:
        places: int64 ``[k]``, their places among all selected rows.
        num_rows: r, all selected rows.
        group: context-parallel group.
    """

    places: Tensor
    num_rows: int
    group: dist.ProcessGroup


def _select(stage: Any, tokens: Tensor, rows: Tensor, places: Tensor) -> SelectedRows | None:
    """Let the last layer leave out the rows that nothing reads, where that works."""
    config = stage.config
    if not stage.post_process or len(stage.decoder.layers) == 0:
        return None
    if config.recompute_granularity == "full":
        # The layer runs again in the backward pass, when this pass is long over. Passes without
        # gradients keep the rows, too: kernels and FP8 scales may round other shapes otherwise.
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


def select_rows(
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    context: tuple[RowBatch, LogitsFunction, Tensor | None, _ContextPart | None],
    scale_logits: Callable[[Tensor], Tensor],
    **_: Any,
) -> Tensor:
    """Run the output head on the rows of a :class:`RowBatch` (GPTModel's output processor)."""
    batch, logits_function, index, part = context
    sequence_parallel = output_layer.sequence_parallel
    if sequence_parallel:
        # The head's copy-to-region sums the gradient over the tensor-parallel ranks; the gather
        # then only has to split it.
        hidden_states = gather_from_sequence_parallel_region(
            hidden_states, tensor_parallel_output_grad=False, group=output_layer.tp_group
        )
    if index is not None:
        hidden_states = hidden_states.flatten(0, 1).index_select(0, index)[:, None, :]
    if part is None:
        chosen = hidden_states[: batch.rows.numel()]
    else:
        chosen = join_context(hidden_states[: part.places.numel()], *part)
    output_layer.sequence_parallel = False
    try:
        logits, _bias = output_layer(chosen, weight=output_weight)
    finally:
        output_layer.sequence_parallel = sequence_parallel
    # An index would cost a second tensor of this size in the backward pass; a view costs none.
    return logits_function(scale_logits(logits).squeeze(1), batch.payload)


def forward_only(
    model: Sequence[torch.nn.Module],
    batches: Sequence[RowBatch],
    logits_function: LogitsFunction,
    logit_shift: bool,
    layout: Layout,
    new_weights: bool = True,
) -> list[Tensor]:
    """Run micro-batches of one shape through all pipeline stages, without gradients.

    Args:
        model: this rank's model chunks.
        batches: micro-batches, the same on every rank of the model-parallel group; with pipeline
            stages all of the same ``[b, s]``.
        logits_function: see :func:`run_model`.
        logit_shift: see :func:`run_model`.
        layout: process groups.
        new_weights: whether the weights may have changed since the last pass. With FP8 they are
            then quantized anew; Transformer Engine would go on with the copy that it keeps for the
            micro-batches after the first one of a step.

    Returns:
        The function's results in order on the last stage; an empty list elsewhere.
    """
    if layout.pp_size == 1:
        chunk: Any = model[0]
        if new_weights:
            chunk.set_is_first_microbatch()
        # The schedule would do just this; calling the model spares its bookkeeping per step.
        with torch.no_grad():
            return [run_model(chunk, b, logits_function, logit_shift) for b in batches]

    shape = batches[0].tokens.shape
    assert all(batch.tokens.shape == shape for batch in batches)
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
