"""Noise of block diffusion: rows that hold a noisy copy and the clean tokens; blocks that grow.

Symbols: b rows, s positions.
"""

import argparse

import torch
from torch import Tensor

from megatron_espo.config import DiffusionConfig
from megatron_espo.diffusion.block_noise import BlockNoise, block_noise, grown_size
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
        The micro-batch, and its noise. With a next-token loss the weights are those of both rows
        of each sequence in the payload's table, the noisy copy's first: float32 ``[b, 2 s]``.
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
    if not config.next_token_weight:
        return batch, noise
    next_weights = torch.full_like(noise.weights, config.next_token_weight)
    return batch, noise._replace(weights=torch.cat((noise.weights, next_weights), dim=1))


def begin_growth(args: argparse.Namespace) -> None:
    """Remember what blocks grow from; ``block_size`` will be that of the last step.

    Args:
        args: parsed arguments; of a checkpoint whose run goes on they know already.
    """
    if args.block_growth_to is not None and getattr(args, "block_growth_from", None) is None:
        args.block_growth_from = args.block_size


def grow_blocks(args: argparse.Namespace) -> None:
    """Give ``block_size`` its value in the step under way; every rank does so for itself.

    Args:
        args: Megatron's arguments, which a checkpoint keeps.
    """
    if args.block_growth_to is not None:
        args.block_size = grown_size(
            args.block_growth_from,
            args.block_growth_to,
            args.block_growth_factor,
            args.block_growth_interval,
            args.block_growth_start,
            getattr(args, "curr_iteration", args.iteration),
        )
