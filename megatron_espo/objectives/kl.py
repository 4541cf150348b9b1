"""Estimators of the KL divergence to the reference policy, from ELBOs of sampled completions.

All take d = ELBO_theta - ELBO_ref, in nats per sequence, and return nats per sequence; the loss
divides by the completion length, as the released ESPO code does (arXiv 2512.03759, section 4).
"""

from typing import Literal

from torch import Tensor

KlEstimator = Literal["k1", "k2", "k3", "k2_unbiased"]


def sequence_kl(elbo: Tensor, elbo_ref: Tensor, estimator: KlEstimator) -> Tensor:
    """Estimate KL(theta || ref) per sequence.

    Args:
        elbo: float ``[b, m]``, one ELBO estimate per draw, with gradient.
        elbo_ref: float ``[b, m]``, the reference policy's under the same masks.
        estimator: ``k1`` is d with the score-function gradient d * grad ELBO (its plain gradient
            has mean zero and regularises nothing), which is k2's gradient: the two differ in the
            reported value. ``k2`` is d^2/2 (the paper's choice) and ``k3`` is exp(-d) - 1 + d, of
            the mean over draws. A noisy d biases k2 by half its variance; ``k2_unbiased`` averages
            d_i d_j / 2 over pairs of independent draws instead.

    Returns:
        float ``[b]``, with gradient.
    """
    difference = elbo - elbo_ref
    d = difference.mean(dim=1)
    if estimator != "k2_unbiased":
        return pointwise_kl(d, estimator)
    num_mc = elbo.size(1)
    if num_mc < 2:
        raise ValueError("k2_unbiased multiplies independent draws; use at least two.")
    pairs = difference.sum(dim=1).square() - difference.square().sum(dim=1)
    return pairs / (num_mc * (num_mc - 1)) / 2


def pointwise_kl(d: Tensor, estimator: KlEstimator) -> Tensor:
    """Estimate the divergence from one difference of log-probabilities each.

    Args:
        d: float, log p_theta - log p_ref in nats, with gradient.
        estimator: all but ``k2_unbiased``, see :func:`sequence_kl`.

    Returns:
        float like ``d``, with gradient.
    """
    if estimator == "k1":
        return d.detach() * (d - d.detach()) + d.detach()
    if estimator == "k2":
        return d.square() / 2
    if estimator == "k3":
        return (-d).expm1() + d
    raise ValueError("k2_unbiased multiplies independent draws; one difference has none.")
