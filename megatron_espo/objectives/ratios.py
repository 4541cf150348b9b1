"""Clipped importance ratios, of completions and of tokens."""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_espo.config import EspoConfig
from megatron_espo.objectives.base import Given, Loss
from megatron_espo.objectives.kl import pointwise_kl


class Clipped(NamedTuple):
    """A clipped ratio: loss -min(ratio A, clip(ratio) A) and where the clip took the gradient."""

    loss: Tensor
    low: Tensor
    high: Tensor


def clipped_ratio(ratio: Tensor, advantages: Tensor, espo: EspoConfig) -> Clipped:
    """Clip importance ratios (PPO, arXiv 1707.06347, eq. 7).

    Args:
        ratio: float, with gradient.
        advantages: float of the same shape, or one that spreads to it.
        espo: clip range.

    Returns:
        The loss with gradient; bools where the lower and the upper clip removed it.
    """
    low = (ratio < 1 - espo.clip_eps_low) & (advantages < 0)
    high = (ratio > 1 + espo.clip_eps_high) & (advantages > 0)
    clipped = ratio.clamp(1 - espo.clip_eps_low, 1 + espo.clip_eps_high)
    return Clipped(-torch.where(low | high, clipped.detach(), ratio) * advantages, low, high)


def sequence_loss(ratio: Tensor, advantages: Tensor, kl: Tensor | None, espo: EspoConfig) -> Loss:
    """Make the loss of one clipped ratio per completion.

    Args:
        ratio: float ``[b]``, with gradient.
        advantages: float ``[b]``.
        kl: float ``[b]``, nats per token, with gradient; None without a penalty.
        espo: clip range and weight of the penalty.

    Returns:
        The loss; idle where it is clipped or has no advantage, if there is no penalty.
    """
    clipped = clipped_ratio(ratio, advantages, espo)
    loss = clipped.loss
    if kl is not None:
        loss = loss + espo.kl_coef * kl
    statistics = {
        "ratio": ratio.detach(),
        "kl": torch.zeros_like(ratio) if kl is None else kl.detach(),
        "clip_low": clipped.low,
        "clip_high": clipped.high,
    }
    idle = None if kl is not None else clipped.low | clipped.high | (advantages == 0)
    return Loss(loss, statistics, idle)


def token_loss(
    now: Tensor, old: Tensor, reference: Tensor | None, given: Given, counted: Tensor, total: float
) -> Loss:
    """Make the loss of one clipped ratio per token.

    Args:
        now: float ``[b, m, l]``, log-probability of each token by draw, with gradient.
        old: of the sampling policy.
        reference: of the reference policy, or None.
        given: advantages and settings.
        counted: bool ``[b, l]``, the tokens that count; or float, how much each does.
        total: what their sum is divided by: the mean of their number over the global batch.

    Returns:
        The loss, a mean over draws.
    """
    espo, share = given.espo, counted[:, None].to(now.dtype)
    number = share.sum(dim=-1)

    def mean(values: Tensor) -> Tensor:
        return ((values * share).sum(dim=-1) / number).mean(dim=1).detach()

    ratio = (now - old).exp()
    advantages = given.advantages[:, None]
    if given.token_advantages is not None:
        advantages = given.token_advantages
    clipped = clipped_ratio(ratio, advantages[:, None], espo)
    per_token, statistics = clipped.loss, {"ratio": mean(ratio)}
    if reference is not None:
        kl = pointwise_kl(now - reference, espo.kl_estimator)
        per_token = per_token + espo.kl_coef * kl
        statistics["kl"] = mean(kl)
    statistics["clip_low"], statistics["clip_high"] = mean(clipped.low), mean(clipped.high)
    sums, squares = ((r * share).sum(dim=-1).detach() for r in (ratio, ratio.square()))
    statistics["effective_sample_size"] = (sums.square() / (number * squares)).mean(dim=1)
    idle = None
    if reference is None:
        none = (share == 0) | (advantages[:, None] == 0)
        idle = (clipped.low | clipped.high | none).flatten(1).all(dim=1)
    return Loss((per_token * share).sum(dim=-1).mean(dim=1) / total, statistics, idle)
