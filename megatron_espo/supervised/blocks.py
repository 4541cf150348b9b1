"""Noise of block diffusion: rows that hold a noisy copy and the clean tokens.

Symbols: b rows, s positions.
"""

import torch
from torch import Tensor

from megatron_espo.config import DiffusionConfig
from megatron_espo.diffusion.block_noise import BlockNoise, block_noise
from megatron_espo.passes.block_batch import block_rows
from megatron_espo.passes.block_mask import BlockAttention
from megatron_espo.passes.pipeline import RowBatch
from megatron_espo.random import Stream, substream


def noise_blocks(
    tokens: Tensor,
    sample_ids: Tensor,
    lengths: Tensor,
    maskable: Tensor,
    config: DiffusionConfig,
    blocks: BlockAttention,
    key: Stream,
    mask_token_id: int,
    vocab_size: int,
) -> tuple[RowBatch, BlockNoise]:
    """Noise rows block by block, and put the noisy copy before the clean tokens.

    Args:
        tokens: int64 ``[b, s]``, clean.
        sample_ids: int64 ``[b]``.
        lengths: int64 ``[b]``; attention sees the positions before it.
        maskable: bool ``[b, s]``.
        config: forward process, and the weight of the next-token loss.
        blocks: the attention.
        key: random stream.
        mask_token_id: takes the place of what is noised.
        vocab_size: tokens before padding.

    Returns:
        The micro-batch, and its noise with the weights of both rows of each sequence in the
        payload's table: float32 ``[b, 2 s]``, the noisy copy's and those of the next-token loss.
    """
    noise = block_noise(
        config.forward_process,
        substream(key, f"blocks/{config.forward_process}"),
        sample_ids,
        maskable,
        blocks.size,
        config.mask_epsilon,
    )
    following = maskable.clone()
    following[:, 0] = False  # no state comes before it
    batch = block_rows(
        tokens,
        lengths,
        noise.mask_indices[:, None],
        torch.zeros_like(lengths),
        mask_token_id,
        vocab_size,
        blocks,
        config.logit_shift,
        following if config.next_token_weight else None,
    )
    next_weights = torch.full_like(noise.weights, config.next_token_weight)
    return batch, noise._replace(weights=torch.cat((noise.weights, next_weights), dim=1))
