"""Attention over the whole sequence, with a key/value cache and a last layer that skips rows.

The core attention of Megatron's local spec is PyTorch's fused kernel here, which never holds the
matrix of scores. Transformer Engine's core keeps its own kernels; only passes with a cache or with
selected rows, whose queries are fewer than their keys, go through PyTorch's kernel there, too. With
context parallelism both specs use it, on keys and values gathered from all ranks.

Symbols: b rows, w positions of the queries, s of the keys, heads and g key/value heads of this
rank, d head size.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_espo.model.block_attention import attend_to_blocks
from megatron_espo.passes.state import PassState, current_pass


class BidirectionalAttention(MegatronModule):
    """Core attention of the local spec (Megatron's interface)."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.context_group = pg_collection.cp if config.context_parallel_size > 1 else None
        self.score_scale = softmax_scale
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.dropout_probability: float = dropout

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
    ) -> Tensor:
        """Attend.

        Args:
            query: ``[w, b, heads, d]``.
            key: ``[w, b, g, d]``.
            value: ``[w, b, g, d]``.
            attention_mask: bool ``[b, 1, 1, s]``, True where attention must not look, or None;
                ``[b or 1, 1, w, s]`` where queries see different keys.

        Returns:
            ``[w, b, heads * d]``; ``[r, 1, heads * d]`` from a last layer that skips rows.
        """
        return _attend(self, query, key, value, attention_mask, current_pass() or PassState())


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    state: PassState,
) -> Tensor:
    """Attend with the cache and the selected rows of the pass that runs; see the callers."""
    selected = state.selected if module.layer_number == module.config.num_layers else None
    if selected is not None:
        query = selected.of_queries(query)
    if module.context_group is not None:
        # Each rank attends from its part of the positions to all; gradients are summed.
        key, value = (
            gather_from_sequence_parallel_region(part.contiguous(), group=module.context_group)
            for part in (key, value)
        )
    key, value = key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3)
    if state.cache is not None:
        layer, positions, rows = module.layer_number, state.positions, state.cache_rows
        if positions is None:
            state.cache.store(layer, key, value, rows)
        else:
            key, value = state.cache.merge(layer, key, value, positions, rows)
    dropout = module.dropout_probability if module.training else 0.0
    # Megatron's tracker keeps the draws of tensor-parallel ranks apart.
    tracked = dropout > 0.0 and not module.config.sequence_parallel
    mask = attention_mask if state.padded else None
    if selected is not None and mask is not None:
        mask = selected.of_mask(mask)
    scale = module.score_scale
    with get_cuda_rng_tracker().fork() if tracked else nullcontext():
        if state.noisy is not None and selected is None and mask is not None:
            output = attend_to_blocks(query, key, value, mask, state.noisy, scale, dropout)
        else:
            output = fused_attention(query, key, value, mask, scale, dropout)
    return output if selected is None else selected.of_attention(output)


@cache
def transformer_engine_attention() -> type:
    """Make the core attention of Transformer Engine's spec.

    A function, because Transformer Engine is imported on GPUs only.
    """
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    class BidirectionalTEAttention(TEDotProductAttention):
        """Transformer Engine's kernels, or PyTorch's where queries and keys are not the same."""

        def __init__(
            self, config: TransformerConfig, layer_number: int, *args: Any, **kw: Any
        ) -> None:
            super().__init__(config, layer_number, *args, **kw)
            self.layer_number, self.context_group = layer_number, None
            self.dropout_probability = config.attention_dropout
            self.score_scale = config.softmax_scale

        def forward(
            self,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Tensor | None,
            *args: Any,
            **kw: Any,
        ) -> Tensor:
            """Attend; see :class:`BidirectionalAttention`."""
            state = current_pass()
            last = self.layer_number == self.config.num_layers
            if attention_mask is not None and attention_mask.size(2) > 1:
                # Its padding kernels know no mask of queries; a recomputed layer has no state.
                return _attend(self, query, key, value, attention_mask, state or PassState())
            if state is None or (state.cache is None and not (last and state.selected)):
                return super().forward(query, key, value, attention_mask, *args, **kw)
            return _attend(self, query, key, value, attention_mask, state)

    return BidirectionalTEAttention


def selecting_bias_dropout_add(training: bool, fused: bool) -> Callable[..., Tensor]:
    """Add the attention's output of a last layer that skips rows to the same rows' residual.

    Args:
        training: as in Megatron's ``get_bias_dropout_add``, whose place this takes.
        fused: as there.

    Returns:
        The function that adds.
    """
    add = get_bias_dropout_add(training, fused)

    def select_and_add(output: Any, residual: Tensor, probability: float) -> Tensor:
        state = current_pass()
        if state is not None and state.selected is not None:
            residual = state.selected.of_hidden(residual)
        return add(output, residual, probability)

    return select_and_add


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Run PyTorch's fused attention on Megatron's layout.

    Args:
        query: ``[w, b, heads, d]``.
        key: ``[b, g, s, d]``, g divides heads: query heads side by side share a key/value head.
        value: ``[b, g, s, d]``.
        attention_mask: bool ``[b or 1, 1, w or 1, s]``, True where attention must not look, or
            None.
        scale: factor of the scores; 1 / sqrt(d) if None.
        dropout: share of the attention weights that are dropped.

    Returns:
        ``[w, b, heads * d]``.
    """
    repeats = query.size(2) // key.size(1)
    if repeats > 1:
        key, value = (part.repeat_interleave(repeats, dim=1) for part in (key, value))
    output = torch.nn.functional.scaled_dot_product_attention(
        query.permute(1, 2, 0, 3),
        key,
        value,
        attn_mask=None if attention_mask is None else ~attention_mask,
        dropout_p=dropout,
        scale=scale,
    )
    return output.permute(2, 0, 1, 3).flatten(2)
