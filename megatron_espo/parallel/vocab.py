"""Probabilities over a vocabulary that is split over tensor-parallel ranks.

The vocabulary is never gathered. Rows of the padded part of the vocabulary (Megatron pads it to
a multiple of the tensor-parallel size) get probability zero in the loss and in sampling alike.

Symbols: r rows, n vocabulary entries of this rank.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_espo.parallel.cross_entropy import sharded_cross_entropy
from megatron_espo.parallel.layout import stack_over_ranks
from megatron_espo.parallel.nucleus import keep_likeliest

_BLOCK = 512


class TokenDraw(NamedTuple):
    """Tokens drawn for r rows and what orders them for remasking; equal on all ranks.

    Attributes:
        tokens: int64 ``[r]``.
        log_confidence: float32 ``[r]``, log-probability of the token before temperature.
        log_tempered: float32 ``[r]``, log-probability of the token in the sampled distribution:
            of the allowed tokens, those that top-k and top-p keep.
        margin: float32 ``[r]``, difference of the two largest sampled-distribution probabilities;
            None unless asked for.
        negative_entropy: float32 ``[r]``, of the sampled distribution; None unless asked for.
    """

    tokens: Tensor
    log_confidence: Tensor
    log_tempered: Tensor
    margin: Tensor | None = None
    negative_entropy: Tensor | None = None


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
    start = _hide_padding(logits, vocab_size, group)
    return sharded_cross_entropy(logits.float(), targets, start, group)


def draw_tokens(
    logits: Tensor,
    uniforms: Tensor,
    temperature: float,
    vocab_size: int,
    forbidden: int,
    group: dist.ProcessGroup,
    *,
    top_p: float = 1.0,
    top_k: int = 0,
    margin: bool = False,
    entropy: bool = False,
) -> TokenDraw:
    """Choose one token per row, greedily or by inverse CDF from one uniform number per row.

    Works in place: beside the logits there is no other tensor of their size, except for the
    entropy, for a temperature other than 0 and 1, and for top-k and top-p.

    Args:
        logits: float ``[r, n]``; used up.
        uniforms: float64 ``[r]`` in (0, 1); not read when ``temperature`` is 0.
        temperature: 0 takes the most likely token.
        vocab_size: tokens before padding.
        forbidden: a token id that is never chosen (the mask token: a row that "fills in" a mask
            would stay masked). It keeps its share in ``log_confidence``.
        group: tensor-parallel group.
        top_p: probability of the most likely tokens that are drawn from; 1 draws from all. Not
            read when ``temperature`` is 0, and neither is ``top_k``.
        top_k: number of the most likely tokens that are drawn from; 0 draws from all.
        margin: whether to compute the draw's ``margin``.
        entropy: whether to compute its ``negative_entropy``.

    Returns:
        The draws. Ties go to the smallest token id.
    """
    logits = logits.float()
    start = _hide_padding(logits, vocab_size, group)
    hidden = logits.new_full((logits.size(0),), float("-inf"))
    if start <= forbidden < start + logits.size(1):
        hidden = logits[:, forbidden - start].clone()
        logits[:, forbidden - start] = float("-inf")
    divisor = temperature or 1.0
    plain_log = None
    if temperature and (top_p < 1.0 or top_k):
        plain_log = logits.logsumexp(dim=-1).double()
        keep_likeliest(logits, temperature, top_p, top_k, group)
    top, place = _largest(logits)
    second = logits.topk(2, dim=-1).values[:, 1] if margin else top
    # A shard without any allowed token: its weights become 0, not NaN.
    top = top.clamp(min=torch.finfo(torch.float32).min)
    logits -= top[:, None]
    plain_mass = None
    if divisor != 1.0:
        plain_mass = logits.exp().sum(dim=-1) if plain_log is None else None
        logits /= divisor
    moment = _moment(logits) if entropy else top
    weights = logits.exp_()
    mass = weights.sum(dim=-1)
    if plain_log is None:
        plain_mass = mass if plain_mass is None else plain_mass
        plain_log = top.double() + plain_mass.double().log()

    # What the other shards need to know of this one, gathered to [tp, r] each.
    own = (top, place + start, second, mass, plain_log, hidden, moment)
    gathered = stack_over_ranks(torch.stack([part.double() for part in own]), group)
    tops, places, seconds, masses, plain_logs, hiddens, moments = gathered.unbind(1)
    lse = tops / divisor + masses.log()
    total = lse.logsumexp(dim=0)
    # The forbidden token takes part in the untempered distribution.
    plain_total = torch.cat((plain_logs, hiddens)).logsumexp(dim=0)
    if temperature == 0.0:
        best, owner = tops.max(dim=0)
        tokens, scaled = places.gather(0, owner[None])[0], best
    else:
        tokens, scaled = _draw_by_inverse_cdf(
            weights, uniforms, (lse - total).exp(), start, tops[group.rank()] / divisor, group
        )
    margins = negative_entropy = None
    if margin:
        two_largest = (torch.cat((tops, seconds)).topk(2, dim=0).values / divisor - total).exp()
        margins = (two_largest[0] - two_largest[1]).float()
    if entropy:
        offset = tops / divisor - total
        negative_entropy = (offset.exp() * (moments + masses * offset)).sum(dim=0).float()
    return TokenDraw(
        tokens=tokens.long(),
        log_confidence=(scaled * divisor - plain_total).float(),
        log_tempered=(scaled - total).float(),
        margin=margins,
        negative_entropy=negative_entropy,
    )


def _largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Find each row's largest entry and the first place that holds it.

    torch.max with places reads one entry at a time on CPUs; the largest entries of blocks are found
    in full vectors, and the place is then looked for in one block.
    """
    n = logits.size(1)
    whole = n // _BLOCK * _BLOCK
    blocks = logits[:, :whole].unflatten(1, (n // _BLOCK, _BLOCK)).amax(-1)
    if whole < n:
        blocks = torch.cat((blocks, logits[:, whole:].amax(-1, keepdim=True)), dim=1)
    top, block = blocks.max(dim=-1)
    columns = block[:, None] * _BLOCK + torch.arange(_BLOCK, device=logits.device)
    inside = logits.gather(1, columns.clamp(max=n - 1)).masked_fill(columns >= n, float("nan"))
    return top, block * _BLOCK + (inside == top[:, None]).int().argmax(dim=-1)


def _moment(logits: Tensor) -> Tensor:
    """Sum ``exp(x) x`` over each row, 0 where x is -inf: float32 ``[r]``."""
    weights = logits.exp()
    return (weights.mul_(logits.clamp(min=torch.finfo(torch.float32).min))).sum(dim=-1)


def _draw_by_inverse_cdf(
    weights: Tensor,
    uniforms: Tensor,
    share: Tensor,
    start: int,
    top: Tensor,
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor]:
    """Draw the token at which the running sum of probabilities passes a number.

    Args:
        weights: float32 ``[r, n]``, this shard's probabilities up to a factor per row.
        uniforms: float64 ``[r]`` in (0, 1).
        share: float64 ``[tp, r]``, probability of each shard.
        start: this shard's first token.
        top: float64 ``[r]``, tempered logit of a token of weight 1.
        group: tensor-parallel group.

    Returns:
        float64 ``[r]`` each: the token and its tempered logit, equal on all ranks.
    """
    # The last shard takes what rounding leaves above its upper end.
    owner = (uniforms[None] >= share.cumsum(0)[:-1]).sum(0)
    ranks = torch.arange(share.size(0), device=share.device)[:, None]
    owner = torch.minimum(owner, torch.where(share > 0, ranks, 0).amax(0))
    lower = (share.cumsum(0) - share).gather(0, owner[None])[0]
    inside = (uniforms - lower) / share.gather(0, owner[None])[0].clamp(min=1e-300)
    place = _inverse_cdf(weights, inside)
    scaled = top + weights.gather(1, place[:, None])[:, 0].double().log()
    chosen = torch.stack(((place + start).double(), scaled))
    # Exactly one rank owns each row's token; the others add zeros.
    chosen = torch.where(owner == group.rank(), chosen, 0.0)
    if group.size() > 1:
        dist.all_reduce(chosen, group=group)
    return chosen[0], chosen[1]


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
    n = weights.size(1)
    whole = n // _BLOCK * _BLOCK
    blocks = weights[:, :whole].unflatten(1, (n // _BLOCK, _BLOCK))
    sums = blocks.sum(-1, dtype=torch.float64)
    if whole < n:
        tail = weights[:, whole:].sum(-1, keepdim=True, dtype=torch.float64)
        sums = torch.cat((sums, tail), dim=1)
    block, rest = _pick(sums, fraction.clamp(0.0, 1.0) * sums.sum(-1))
    columns = block[:, None] * _BLOCK + torch.arange(_BLOCK, device=weights.device)
    inside = weights.gather(1, columns.clamp(max=n - 1)).double().masked_fill(columns >= n, 0.0)
    place, _ = _pick(inside, rest)
    return (block * _BLOCK + place).clamp(max=n - 1)


def _pick(values: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """First index whose running sum exceeds target, never one of zero weight past the end."""
    running = values.cumsum(-1)
    index = (running <= target[:, None]).sum(-1)
    last = values.size(-1) - 1 - (values > 0).flip(-1).int().argmax(-1)
    index = torch.minimum(index, last)
    before = (running - values).gather(1, index[:, None])[:, 0]
    return index, target - before
