"""GDSD (arXiv 2605.29398): regression of the change of a log-likelihood on the advantage.

loss = sum over draws of (clamp(l - l_old, log(1 - eps_low), log(1 + eps_high)) / L - psi A)^2
+ beta mean over draws of KL(l - l_ref) / L, l = half the log-probability summed over both sides of
a coupled pair, with no weight. Read in GaryBall/GDSD, gdsd/trainers/gdsd_trainer_batchll.py and
gdsd_trainer_tlc.py. The variant TLC has the ELBO's weights (``elbo_weights=1``) and takes each
logits' mean off them; a softmax does not see that, so nothing is computed for it here.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from megatron_espo.config import EspoConfig
from megatron_espo.objectives.base import Given, Loss, Objective, setting
from megatron_espo.objectives.kl import pointwise_kl
from megatron_espo.objectives.masks import ElboMasks, HalfPairs, Masks


@dataclass(frozen=True)
class Gdsd(Objective):
    """GDSD.

    Attributes:
        psi: log-likelihood per token that an advantage of 1 asks for.
        elbo_weights: 1 weights the masked tokens as the ELBO does (TLC), 0 all the same.
    """

    psi: float = 10.0
    elbo_weights: int = setting(0, 0, 1)
    honours = frozenset({"clip_eps_low", "clip_eps_high", "kl_coef", "kl_estimator", "num_mc"})

    def masks(self, espo: EspoConfig) -> Masks:
        """Mask coupled pairs."""
        return ElboMasks() if self.elbo_weights else HalfPairs()

    def loss(self, logp: Tensor, given: Given) -> Loss:
        """Compute the squared error of draws ``[b, m]``."""
        espo, length = given.espo, given.length
        low, high = math.log(1 - espo.clip_eps_low), math.log(1 + espo.clip_eps_high)
        change = logp - given.old
        error = change.clamp(low, high) / length - self.psi * given.advantages[:, None]
        loss = error.square().sum(dim=1)
        statistics = {
            "ratio": (change.detach().mean(dim=1) / length).exp(),
            "clip_low": (change < low).to(logp.dtype).mean(dim=1),
            "clip_high": (change > high).to(logp.dtype).mean(dim=1),
        }
        if given.reference is not None:
            kl = pointwise_kl(logp - given.reference, espo.kl_estimator).mean(dim=1) / length
            loss = loss + espo.kl_coef * kl
            statistics["kl"] = kl.detach()
        return Loss(loss, statistics)
