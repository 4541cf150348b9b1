"""The ELBO of a completion from the cross entropy of its noised views (math only).

log p(y|x) >= L(y|x) = - sum_{l=1..L} (1/l) E_{|S|=l} [ sum_{i in S} CE_i(y masked at S, x) ]
(LLaDA, arXiv 2502.09992, eq. 14; ESPO, arXiv 2512.03759, section 3).
"""

from torch import Tensor


def elbo_draws(cross_entropy: Tensor, weights: Tensor) -> Tensor:
    """Turn the cross entropy of noised views into one ELBO estimate per draw.

    Args:
        cross_entropy: float32 ``[b, m, v]``, summed over the masked positions of each view; the
            gradient passes through.
        weights: float32 ``[b, m, v]`` as drawn with the views.

    Returns:
        float32 ``[b, m]``, in nats per sequence. Their mean over m is the estimate.
    """
    return -(cross_entropy * weights).sum(dim=-1)
