"""ESPO (arXiv 2512.03759, eq. 8 and section 4): one ratio of ELBOs per completion.

ratio = exp((ELBO - ELBO_old) / L), the mean over draws inside the exponential;
loss = -min(ratio A, clip(ratio, 1 - eps_low, 1 + eps_high) A) + beta KL(ELBO - ELBO_ref) / L.
"""

from dataclasses import dataclass

from torch import Tensor

from megatron_espo.objectives.base import Given, Loss, Objective
from megatron_espo.objectives.kl import sequence_kl
from megatron_espo.objectives.ratios import sequence_loss


@dataclass(frozen=True)
class Espo(Objective):
    """ESPO."""

    idle_without_advantage = True
    honours = frozenset(
        {"clip_eps_low", "clip_eps_high", "kl_coef", "kl_estimator", "num_mc", "elbo_estimator",
         "k2_unbiased"}
    )  # fmt: skip

    def loss(self, logp: Tensor, given: Given) -> Loss:
        """Compute the clipped loss of ELBO draws ``[b, m]``."""
        ratio = ((logp.mean(dim=1) - given.old.mean(dim=1)) / given.length).exp()
        kl = None
        if given.reference is not None:
            kl = sequence_kl(logp, given.reference, given.espo.kl_estimator) / given.length
        return sequence_loss(ratio, given.advantages, kl, given.espo)
