"""Micro-batches of noised views for models whose tokens come block by block.

All blocks are noised at once, in rows of noisy copies before the clean tokens (passes/block_mask.py
says what they see). Views of a sequence share the clean half: K views take (K + 1) L positions in
place of 2 K L, and since no copy sees another, each gets what it would alone.

Symbols: n sequences, m draws, v views per draw, R views of a micro-batch, K views of a row, L
positions of a sequence.
"""

import math
from dataclasses import replace

from torch import Tensor

from megatron_espo.diffusion.noise import ElboViews
from megatron_espo.passes.batch import Sequences, ViewBatch, order_of_views
from megatron_espo.passes.block_batch import block_rows
from megatron_espo.passes.block_mask import BlockAttention


def block_view_batches(
    sequences: Sequences,
    views: ElboViews,
    mask_token_id: int,
    vocab_size: int,
    rows_per_batch: int,
    blocks: BlockAttention,
    logit_shift: bool,
    *,
    same_width: bool = True,
    chosen: Tensor | None = None,
) -> list[ViewBatch]:
    """Cut views into micro-batches as ``passes.batch.view_batches`` does.

    Args:
        sequences: n sequences.
        views: their masks, ``[n, m, v, l]``, and the weights of their tokens.
        mask_token_id: the mask token.
        vocab_size: tokens before padding.
        rows_per_batch: R; must divide the number of views. A row holds as many views as divide both
            R and those of a sequence.
        blocks: the attention.
        logit_shift: see ``passes.block_batch.block_rows``.
        same_width: make all micro-batches as wide as the longest sequence.
        chosen: int64 ``[k]``, the sequences to take; None takes all.

    Returns:
        Micro-batches on the host; ``view_index`` says which views each holds.
    """
    assert views.token_weights is not None
    per_sequence = views.weights[0].numel()
    masks, weights = views.mask_indices.flatten(0, 2), views.token_weights.flatten(0, 2)
    predicted = None if views.predicted is None else views.predicted.flatten(0, 2)
    order, width = order_of_views(sequences, per_sequence, rows_per_batch, chosen)
    copies, batches = math.gcd(rows_per_batch, per_sequence), []
    for index in order.split(rows_per_batch):
        together = index.view(-1, copies)
        sequence = together[:, 0] // per_sequence
        starts, lengths = sequences.prompt_lengths[sequence], sequences.lengths[sequence]
        if not same_width:
            width = sequences.shapes.width(int(lengths.max()))
        batch = block_rows(
            sequences.tokens[sequence, :width],
            lengths,
            masks[together],
            starts,
            mask_token_id,
            vocab_size,
            blocks,
            logit_shift,
            weights=weights[together],
            predicted=None if predicted is None else predicted[together],
        )
        # Policies and passes look at the same views, one after the other.
        whole = views.weights.flatten()[index]
        batches.append(ViewBatch(replace(batch, sent={}), index, whole))
    return batches
