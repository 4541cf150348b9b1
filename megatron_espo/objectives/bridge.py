"""The log-mean-exp over draws in place of their mean (BridgeRatio): a tighter bound.

l = log(mean over draws of exp(ELBO draw)); ratio = exp((l - l_old) / L), clipped, and for A < 0 the
loss is at most -``dual_clip`` A; the penalty is on l - l_ref. Formula second-hand: the branch of
yjyddq/DARE that holds it was not at hand. With one draw and no dual clip it is ESPO.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_espo.objectives.base import Given, Loss, Objective, setting
from megatron_espo.objectives.kl import sequence_kl
from megatron_espo.objectives.ratios import sequence_loss


@dataclass(frozen=True)
class Bridge(Objective):
    """BridgeRatio.

    Attributes:
        dual_clip: largest ratio that a negative advantage is multiplied with.
    """

    dual_clip: float = setting(3.0, low=1.0)
    idle_without_advantage = True
    honours = frozenset(
        {"clip_eps_low", "clip_eps_high", "kl_coef", "kl_estimator", "num_mc", "elbo_estimator"}
    )

    def loss(self, logp: Tensor, given: Given) -> Loss:
        """Compute the clipped loss of ELBO draws ``[b, m]``."""

        def bound(draws: Tensor) -> Tensor:
            return draws.logsumexp(dim=1) - math.log(draws.size(1))

        now = bound(logp)
        ratio = ((now - bound(given.old)) / given.length).exp()
        # Above it the loss stays where it is, and so has no gradient.
        above = (ratio > self.dual_clip) & (given.advantages < 0)
        ratio = torch.where(above, torch.full_like(ratio, self.dual_clip), ratio)
        kl = None
        if given.reference is not None:
            d = (now - bound(given.reference))[:, None]
            kl = sequence_kl(d, torch.zeros_like(d), given.espo.kl_estimator) / given.length
        found = sequence_loss(ratio, given.advantages, kl, given.espo)
        statistics = {**found.statistics, "dual_clipped": above}
        return found._replace(
            statistics=statistics, idle=None if found.idle is None else found.idle | above
        )
