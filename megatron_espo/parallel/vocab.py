"""Probabilities over a vocabulary that is split over tensor-parallel ranks.

The vocabulary is never gathered. Rows of the padded part of the vocabulary (Megatron pads it to
a multiple of the tensor-parallel size) get probability zero in the loss and in sampling alike.

Symbols: r rows, n vocabulary entries of this rank.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor

_CDF_BLOCK = 512


class TokenDraw(NamedTuple):
    """Tokens drawn for r rows and what orders them for remasking; equal on all ranks.

    Attributes:
        tokens: int64 ``[r]``.
        log_confidence: float32 ``[r]``, log-probability of the token before temperature.
        log_tempered: float32 ``[r]``, log-probability of the token in the sampled distribution.
        margin: float32 ``[r]``, difference of the two largest sampled-distribution probabilities.
        negative_entropy: float32 ``[r]``, of the sampled distribution.
    """

    tokens: Tensor
    log_confidence: Tensor
    log_tempered: Tensor
    margin: Tensor
    negative_entropy: Tensor


def _hide_padding(logits: Tensor, vocab_size: int, group: dist.ProcessGroup) -> int:
    """Set this shard's padded columns to -inf in place and return its first token id.

    Done outside autograd: the softmax of these columns, and with it their gradient, is exactly 0.
    """
    shard = logits.size(-1)
    start = group.rank() * shard
    if start + shard > vocab_size:
        logits.detach()[..., max(vocab_size - start, 0) :] = float("-inf")
    return start


def cross_entropy(
    logits: Tensor, targets: Tensor, vocab_size: int, group: dist.ProcessGroup
) -> Tensor:
    """Compute -log softmax at the targets, in float32.

    Args:
        logits: ``[r, n]``; used up (overwritten in place).
        targets: int64 ``[r]``, global token ids.
        vocab_size: tokens before padding.
        group: tensor-parallel group.

    Returns:
        float32 ``[r]`` with gradient to ``logits``.
    """
    _hide_padding(logits, vocab_size, group)
    return vocab_parallel_cross_entropy(logits.float(), targets, tp_group=group)


def draw_tokens(
    logits: Tensor,
    uniforms: Tensor,
    temperature: float,
    vocab_size: int,
    forbidden: int,
    group: dist.ProcessGroup,
) -> TokenDraw:
    """Choose one token per row, greedily or by inverse CDF from one uniform number per row.

    Args:
        logits: float ``[r, n]``; used up.
        uniforms: float64 ``[r]`` in (0, 1); not read when ``temperature`` is 0.
        temperature: 0 takes the most likely token.
        vocab_size: tokens before padding.
        forbidden: a token id that is never chosen (the mask token: a row that "fills in" a mask
            would stay masked). It keeps its share in ``log_confidence``.
        group: tensor-parallel group.

    Returns:
        The draws. Ties go to the smallest token id.
    """
    logits = logits.float()
    start = _hide_padding(logits, vocab_size, group)
    plain_lse = _local_lse(logits)
    if start <= forbidden < start + logits.size(1):
        logits[:, forbidden - start] = float("-inf")
    scaled = logits if temperature in (0.0, 1.0) else logits / temperature

    # What the other shards need to know of this one: [r, 5], gathered to [tp, r, 5].
    lse = _local_lse(scaled)
    top = scaled.topk(2, dim=-1).values
    place = scaled.argmax(dim=-1)
    # A shard without any allowed token has lse -inf; the clamp keeps its weights at 0, not NaN.
    lowest = torch.finfo(torch.float32).min
    log_weights = scaled - lse[:, None].clamp(min=lowest)
    weights = log_weights.exp()
    mean_log = torch.einsum("rn,rn->r", weights, log_weights.clamp_(min=lowest))
    shards = _all_gather(
        torch.stack((plain_lse, lse, top[:, 0], top[:, 1], mean_log), dim=-1).double(), group
    )
    total = shards[..., 1].logsumexp(dim=0)
    share = (shards[..., 1] - total).exp()
    best = torch.cat((shards[..., 2], shards[..., 3])).topk(2, dim=0).values
    margin = (best[0] - total).exp() - (best[1] - total).exp()
    local_log = (shards[..., 1] - total).clamp(min=lowest)
    negative_entropy = (share * (shards[..., 4] + local_log)).sum(0)

    if temperature == 0.0:
        owner = shards[..., 2].argmax(dim=0)
        local = place
    else:
        # The last shard takes what rounding leaves above its upper end.
        owner = (uniforms[None] >= share.cumsum(0)[:-1]).sum(0)
        ranks = torch.arange(share.size(0), device=share.device)[:, None]
        owner = torch.minimum(owner, torch.where(share > 0, ranks, 0).amax(0))
        lower = (share.cumsum(0) - share).gather(0, owner[None])[0]
        inside = (uniforms - lower) / share.gather(0, owner[None])[0].clamp(min=1e-300)
        local = _inverse_cdf(weights, inside).clamp(max=logits.size(1) - 1)
    chosen = torch.stack(
        (
            local + start,
            scaled.gather(1, local[:, None])[:, 0],
            logits.gather(1, local[:, None])[:, 0],
        ),
        dim=-1,
    ).double()
    # Exactly one rank owns each row's token; the others add zeros.
    chosen = torch.where((owner == group.rank())[:, None], chosen, 0.0)
    if group.size() > 1:
        dist.all_reduce(chosen, group=group)
    return TokenDraw(
        tokens=chosen[:, 0].long(),
        log_confidence=(chosen[:, 2] - shards[..., 0].logsumexp(dim=0)).float(),
        log_tempered=(chosen[:, 1] - total).float(),
        margin=margin.float(),
        negative_entropy=negative_entropy.float(),
    )


def _local_lse(logits: Tensor) -> Tensor:
    """float32 ``[r]`` log-sum-exp over this shard; -inf for a shard that is all padding."""
    return logits.logsumexp(dim=-1)


def _all_gather(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Stack the ranks' small tensors in rank order: ``[tp, ...]``."""
    if group.size() == 1:
        return values[None]
    gathered = [torch.empty_like(values) for _ in range(group.size())]
    dist.all_gather(gathered, values, group=group)
    return torch.stack(gathered)


def _inverse_cdf(weights: Tensor, fraction: Tensor) -> Tensor:
    """Find where the running sum of each row passes ``fraction`` of the row's sum.

    Two levels, sums of blocks and then one block, so that the running sums stay short and in
    float64 without a float64 copy of the row.

    Args:
        weights: float32 ``[r, n]``, not negative.
        fraction: float64 ``[r]``; values outside [0, 1) are clamped to the row's ends.

    Returns:
        int64 ``[r]``, an index with positive weight wherever the row has one.
    """
    r = weights.size(0)
    padding = -weights.size(1) % _CDF_BLOCK
    if padding:
        weights = torch.nn.functional.pad(weights, (0, padding))
    blocks = weights.view(r, -1, _CDF_BLOCK)
    sums = blocks.sum(-1, dtype=torch.float64)
    block, rest = _pick(sums, fraction.clamp(0.0, 1.0) * sums.sum(-1))
    inside = blocks[torch.arange(r, device=weights.device), block].double()
    place, _ = _pick(inside, rest)
    return block * _CDF_BLOCK + place


def _pick(values: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """First index whose running sum exceeds target, never one of zero weight past the end."""
    running = values.cumsum(-1)
    index = (running <= target[:, None]).sum(-1)
    last = values.size(-1) - 1 - (values > 0).flip(-1).int().argmax(-1)
    index = torch.minimum(index, last)
    before = (running - values).gather(1, index[:, None])[:, 0]
    return index, target - before
