"""The output head of a pass: on chosen rows only, and in chunks where their logits are too many.

A head in chunks computes the logits of some rows, what is made of them, and forgets them; the
backward pass computes them again, chunk by chunk, and adds up the gradients of the head in float32.
A head that adds its weight gradient to Megatron's buffer itself (model/weight_gradients.py) does so
for each chunk. Its hooks see one gradient per micro-batch, as without chunks.

Symbols: r selected rows, k rows of a chunk, n vocabulary entries of this rank, h hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_espo.parallel.context import join_context

LogitsFunction = Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class ByRows:
    """A :data:`LogitsFunction` that can be given the logits of some rows at a time.

    Attributes:
        of_rows: gets the float logits ``[k, n]`` of some rows, used up, their ``values`` ``[k]``
            and the payload; gives ``[..., k]``.
        values: of a payload, what ``of_rows`` needs to know of each row, ``[r]``.
        finish: makes the result of all rows' ``[..., r]`` and the payload.
        copies: the rows are so many lists of the same length, one after the other, of which
            ``of_rows`` gets the same places: logits ``[copies k, n]``. Without gradients.
    """

    of_rows: Callable[[Tensor, Tensor, Any], Tensor]
    values: Callable[[Any], Tensor]
    finish: Callable[[Tensor, Any], Tensor]
    copies: int = 1

    def __call__(self, logits: Tensor, payload: Any) -> Tensor:
        """Compute the result from the logits ``[r, n]`` of all rows."""
        return self.finish(self.of_rows(logits, self.values(payload), payload), payload)


class ContextPart(NamedTuple):
    """The selected rows that lie in this context-parallel rank's part of the positions.

    Attributes:
        places: int64 ``[k]``, their places among all selected rows.
        num_rows: r, all selected rows.
        group: context-parallel group.
    """

    places: Tensor
    num_rows: int
    group: dist.ProcessGroup


@dataclass(frozen=True)
class HeadInput:
    """What the output head reads.

    Attributes:
        num_rows: r of this rank, without those that fill them up.
        index: int64 ``[r]``, their places among the hidden states ``[w, b]``; None where the last
            layer gives no others.
        part: with context parallelism, which of all rows they are.
        payload: the batch's.
    """

    num_rows: int
    index: Tensor | None
    part: ContextPart | None
    payload: Any


def select_rows(
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    context: tuple[HeadInput, LogitsFunction],
    scale_logits: Callable[[Tensor], Tensor],
    **_: Any,
) -> Tensor:
    """Run the output head on the rows of a RowBatch (GPTModel's output processor).

    Chunks have ``output_layer.chunk_rows`` rows, where it is set and there are more.
    """
    head, logits_function = context
    if output_layer.sequence_parallel:
        # The head's copy-to-region sums the gradient over the tensor-parallel ranks; the gather
        # then only has to split it.
        hidden_states = gather_from_sequence_parallel_region(
            hidden_states, tensor_parallel_output_grad=False, group=output_layer.tp_group
        )
    if head.index is not None:
        hidden_states = hidden_states.flatten(0, 1).index_select(0, head.index)[:, None, :]
    chosen = hidden_states[: head.num_rows]
    if head.part is not None:
        chosen = join_context(chosen, *head.part)

    def logits_of(states: Tensor) -> Tensor:
        sequence_parallel = output_layer.sequence_parallel
        output_layer.sequence_parallel = False
        try:
            logits, _bias = output_layer(states, weight=output_weight)
        finally:
            output_layer.sequence_parallel = sequence_parallel
        # An index would cost a second tensor of this size in the backward pass; a view costs none.
        return scale_logits(logits).squeeze(1)

    most, payload = getattr(output_layer, "chunk_rows", None), head.payload
    if most is None or chosen.size(0) <= most or not isinstance(logits_function, ByRows):
        return logits_function(logits_of(chosen), payload)
    function = logits_function

    def of_chunk(states: Tensor, values: Tensor) -> Tensor:
        return function.of_rows(logits_of(states), values, payload)

    results = _in_chunks(
        of_chunk, chosen, function.values(payload), most, function.copies,
        _trained(output_layer, output_weight),
    )  # fmt: skip
    return function.finish(results, payload)


_OfChunk = Callable[[Tensor, Tensor], Tensor]


def _in_chunks(
    of_chunk: _OfChunk,
    hidden: Tensor,
    values: Tensor,
    most: int,
    copies: int,
    parameters: Sequence[Tensor],
) -> Tensor:
    """Put the results of chunks side by side.

    Args:
        of_chunk: of hidden states ``[copies k, 1, h]`` and values ``[k]``: ``[..., k]``.
        hidden: ``[copies r, 1, h]``.
        values: ``[r]``.
        most: rows of the head at a time at most.
        copies: see ByRows.
        parameters: what of_chunk uses and is trained.

    Returns:
        ``[..., r]``, with gradients to ``hidden`` and ``parameters``.
    """
    size = max(most // copies, 1)
    if torch.is_grad_enabled():
        assert copies == 1, "chunks of copies are without gradients"
        output: Tensor = _Chunks.apply(of_chunk, size, hidden, values, *parameters)
        return output
    lists = [part.split(size) for part in hidden.chunk(copies)]
    states = (parts[0] if copies == 1 else torch.cat(parts) for parts in zip(*lists, strict=True))
    return torch.cat(
        [of_chunk(*part) for part in zip(states, values.split(size), strict=True)], dim=-1
    )


class _Chunks(torch.autograd.Function):
    """Chunks whose results are kept and whose logits are computed again for the gradient."""

    @staticmethod
    def forward(
        ctx: Any, of_chunk: _OfChunk, size: int, hidden: Tensor, values: Tensor, *parameters: Tensor
    ) -> Tensor:
        ctx.of_chunk, ctx.size, ctx.parameters = of_chunk, size, parameters
        ctx.save_for_backward(hidden, values)
        pairs = zip(hidden.split(size), values.split(size), strict=True)
        return torch.cat([of_chunk(*pair) for pair in pairs], dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, values = ctx.saved_tensors
        of_hidden = torch.empty_like(hidden)
        sums: list[Tensor | None] = [None] * len(ctx.parameters)
        for states, place, known, factor in zip(
            hidden.split(ctx.size),
            of_hidden.split(ctx.size),
            values.split(ctx.size),
            gradient.split(ctx.size, dim=-1),
            strict=True,
        ):
            with torch.enable_grad():
                leaf = states.detach().requires_grad_()
                results = ctx.of_chunk(leaf, known)
            # Not backward(): a parameter's hooks are to see the sum alone.
            found = torch.autograd.grad(results, (leaf, *ctx.parameters), factor, allow_unused=True)
            place.copy_(found[0])
            sums = [_added(*each) for each in zip(ctx.parameters, sums, found[1:], strict=True)]
        totals = (
            total if total is None else total.to(parameter.dtype)
            for parameter, total in zip(ctx.parameters, sums, strict=True)
        )
        return None, None, of_hidden, None, *totals


def _added(parameter: Tensor, total: Tensor | None, more: Tensor | None) -> Tensor | None:
    """Add a chunk's gradient of a parameter in float32.

    A gradient that the layer has added to Megatron's buffer is the parameter's own memory, which
    stands for it.
    """
    if more is None or getattr(parameter, "grad_added_to_main_grad", False):
        return more
    return more.float() if total is None else total.add_(more)


def _trained(output_layer: Any, output_weight: Tensor | None) -> list[Tensor]:
    """List what a head trains: its weight, or another layer's in its place, and its adapter."""
    own = output_layer.weight if output_weight is None else output_weight
    others = [p for p in output_layer.parameters() if p is not output_layer.weight]
    return [p for p in (own, *others) if p is not None and p.requires_grad]
