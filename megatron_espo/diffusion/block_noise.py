"""Forward processes of block diffusion: each block has a noise level of its own.

The likelihood of a completion is the product of its blocks', each given the clean blocks before it;
each block's bound is that of masked diffusion on its tokens alone (BD3-LM, arXiv 2503.09573,
eq. 8). A draw masks all blocks at once, each with its own level.

Symbols: b rows, s positions, n blocks.
"""

from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import pad

from megatron_espo.diffusion.noise import ForwardProcess
from megatron_espo.random import Stream, substream, uniform


class BlockNoise(NamedTuple):
    """One noised view of each row, block by block.

    Attributes:
        mask_indices: bool ``[b, s]``, True where the model sees the mask token.
        weights: float32 ``[b, s]``, the factor on each token's cross entropy.
    """

    mask_indices: Tensor
    weights: Tensor


def block_noise(
    process: ForwardProcess,
    key: Stream,
    sample_ids: Tensor,
    maskable: Tensor,
    block_size: int,
    epsilon: float = 0.0,
) -> BlockNoise:
    """Mask each block's maskable tokens at a level of its own.

    The draws of a row do not depend on its width: a longer one begins with the same numbers.

    Args:
        process: ``bernoulli``, every token with probability p = (1 - epsilon) t + epsilon,
            t ~ U(0, 1), and weights 1 / p; or ``exact_count``, l ~ U{1..L} of the block's L
            maskable tokens, and weights L / l. With epsilon 0 the weighted sum of the cross
            entropies is an unbiased bound of the row either way.
        key: random stream.
        sample_ids: int64 ``[b]``.
        maskable: bool ``[b, s]``.
        block_size: tokens of a block; blocks are counted from position 0.
        epsilon: smallest masking probability.

    Returns:
        The noise.
    """
    s = maskable.size(1)
    n = -(-s // block_size)
    level = uniform(substream(key, "block"), sample_ids, n)[:, :, None]
    draws = uniform(substream(key, "token"), sample_ids, n * block_size)
    draws = draws.unflatten(1, (n, block_size))
    inside = pad(maskable, (0, n * block_size - s)).unflatten(1, (n, block_size))
    if process == "bernoulli":
        probability = (1.0 - epsilon) * level + epsilon
        mask, weights = (draws < probability) & inside, 1.0 / probability
    else:
        total = inside.sum(2, keepdim=True)
        count = (1 + (level * total).long()).clamp(max=total)
        order = draws.masked_fill(~inside, 2.0).argsort(dim=2, stable=True)
        rank = order.argsort(dim=2, stable=True)
        mask, weights = rank < count, total / count.clamp(min=1)
    weights = weights.expand_as(draws).float()
    return BlockNoise(mask.flatten(1)[:, :s], weights.flatten(1)[:, :s])
