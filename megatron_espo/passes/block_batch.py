"""Micro-batches of block diffusion: noisy copies of rows before the clean one.

passes/block_mask.py says what they see.

Symbols: R rows, L positions, K noisy copies, c length of the maskable part, r predicted tokens.
"""

import torch
from torch import Tensor

from megatron_espo.passes.batch import MaskedTargets
from megatron_espo.passes.block_mask import BlockAttention
from megatron_espo.passes.pipeline import RowBatch


def block_rows(
    tokens: Tensor,
    lengths: Tensor,
    mask: Tensor,
    starts: Tensor,
    mask_token_id: int,
    vocab_size: int,
    blocks: BlockAttention,
    logit_shift: bool,
    next_tokens: Tensor | None = None,
    weights: Tensor | None = None,
    predicted: Tensor | None = None,
) -> RowBatch:
    """Noise copies of rows, put them before the clean ones, and name the positions to predict.

    A noisy token is predicted from its own state. With ``logit_shift`` from the state before it: of
    the first token in a block that is the clean state before the block, since a noisy one would
    belong to a block that is finished by then.

    Args:
        tokens: int64 ``[R, L]``, clean.
        lengths: int64 ``[R]``; attention sees the positions before it.
        mask: bool ``[R, K, c]``, which of the maskable part's positions each copy masks.
        starts: int64 ``[R]``, position where the maskable part starts; with ``logit_shift``
            position 0 is never masked.
        mask_token_id: the mask token.
        vocab_size: tokens before padding.
        blocks: the attention; its number of copies does not count.
        logit_shift: whether position i is predicted from the state at i - 1.
        next_tokens: bool ``[R, c]``, tokens that the clean state before them predicts, too; not
            at position 0. None: none.
        weights: float32 ``[R, K, c]``, factors on the cross entropy in sums over rows; without
            ``next_tokens``.
        predicted: bool ``[R, K, c]``, masked positions that are predicted; None: all of them.

    Returns:
        The micro-batch of ``[R, (K + 1) L]`` tokens. Its payload's table has K rows for each row,
        those of the copies; with ``next_tokens`` one more, that of the clean tokens.
    """
    (count, copies, c), length = mask.shape, tokens.size(1)
    asked = mask if predicted is None else predicted
    wanted = asked if next_tokens is None else torch.cat((asked, next_tokens[:, None]), dim=1)
    assert weights is None or next_tokens is None
    rows, copy, columns = wanted.nonzero(as_tuple=True)
    is_dummy = rows.numel() == 0
    if is_dummy:  # every rank's part of the model still gets a gradient, of zeros
        rows, copy, columns = rows.new_zeros(1), copy.new_zeros(1), columns.new_zeros(1)
        position = starts[:1].clamp(min=int(logit_shift))
    else:
        position = starts[rows] + columns
    whole = tokens[:, None].repeat(1, copies + 1, 1)
    if not is_dummy:
        row, noisy, column = mask.nonzero(as_tuple=True)
        whole[row, noisy, starts[row] + column] = mask_token_id
    from_clean = copy == copies
    before = from_clean | torch.tensor(logit_shift)
    if logit_shift:
        from_clean = from_clean | (position % blocks.size == 0)
    place = torch.where(from_clean, copies, copy) * length + position - before.long()
    payload = MaskedTargets(
        tokens[rows, position],
        rows * wanted.size(1) + copy,
        columns,
        count * wanted.size(1),
        c,
        is_dummy,
        vocab_size,
        None if weights is None else weights[rows, copy, columns],
    )
    return RowBatch(
        whole.flatten(1),
        lengths,
        rows,
        place + int(logit_shift),  # what a pass takes off again
        payload,
        padded=int(lengths.min()) < length,
        blocks=blocks.with_copies(copies),
    )
