"""The ESPO objective: a pure function of ELBOs (arXiv 2512.03759, eq. 8 and section 4)."""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_espo.config import EspoConfig
from megatron_espo.rl.kl import sequence_kl


class EspoTerms(NamedTuple):
    """The loss and its parts, one entry per sequence.

    Attributes:
        loss: float ``[b]``, with gradient to the ELBOs.
        ratio: float ``[b]``, the importance ratio.
        kl: float ``[b]``, nats per token; zero without a reference.
        clipped_low: bool ``[b]``, the lower clip removed the gradient.
        clipped_high: bool ``[b]``, the upper clip removed the gradient.
    """

    loss: Tensor
    ratio: Tensor
    kl: Tensor
    clipped_low: Tensor
    clipped_high: Tensor


def espo_terms(
    elbo: Tensor,
    elbo_old: Tensor,
    elbo_ref: Tensor | None,
    advantages: Tensor,
    length: int,
    config: EspoConfig,
) -> EspoTerms:
    """Compute the clipped sequence-level objective.

    ratio = exp((ELBO - ELBO_old) / L), one per sequence, under shared masks;
    loss = -min(ratio A, clip(ratio, 1 - eps_low, 1 + eps_high) A) + beta KL / L.

    Args:
        elbo: float ``[b, m]``, the current policy's estimate of each draw, with gradient.
        elbo_old: float ``[b, m]``, the sampling policy's, without gradient.
        elbo_ref: float ``[b, m]``, the reference policy's, or None without a KL penalty.
        advantages: float ``[b]``.
        length: completion length L in tokens.
        config: clip range and KL settings.

    Returns:
        The terms; the loss of a batch is the mean of ``loss``.
    """
    log_ratio = (elbo.mean(dim=1) - elbo_old.mean(dim=1)) / length
    ratio = log_ratio.exp()
    clipped_low = (ratio < 1 - config.clip_eps_low) & (advantages < 0)
    clipped_high = (ratio > 1 + config.clip_eps_high) & (advantages > 0)
    clipped = ratio.clamp(1 - config.clip_eps_low, 1 + config.clip_eps_high)
    loss = -torch.where(clipped_low | clipped_high, clipped.detach(), ratio) * advantages
    kl = torch.zeros_like(ratio)
    if elbo_ref is not None:
        kl = sequence_kl(elbo, elbo_ref, config.kl_estimator) / length
        loss = loss + config.kl_coef * kl
    return EspoTerms(
        loss=loss,
        ratio=ratio.detach(),
        kl=kl.detach(),
        clipped_low=clipped_low,
        clipped_high=clipped_high,
    )


def elbo_gradient(
    elbo: Tensor,
    elbo_old: Tensor,
    elbo_ref: Tensor | None,
    advantages: Tensor,
    length: int,
    config: EspoConfig,
) -> tuple[Tensor, EspoTerms]:
    """Differentiate the summed loss with respect to each draw's ELBO, for two-pass gradients.

    Args:
        elbo: float ``[b, m]``, values without gradient.
        elbo_old: as in :func:`espo_terms`.
        elbo_ref: as in :func:`espo_terms`.
        advantages: as in :func:`espo_terms`.
        length: as in :func:`espo_terms`.
        config: as in :func:`espo_terms`.

    Returns:
        float ``[b, m]`` of d(sum of losses)/d(ELBO of the draw), and the terms, detached.
    """
    with torch.enable_grad():
        leaf = elbo.detach().requires_grad_()
        terms = espo_terms(leaf, elbo_old, elbo_ref, advantages, length, config)
        (gradient,) = torch.autograd.grad(terms.loss.sum(), leaf)
    return gradient, terms._replace(loss=terms.loss.detach())
