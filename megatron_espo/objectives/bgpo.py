"""BGPO (arXiv 2510.11683): a bound of ESPO's objective that is a mean over draws.

With d = (ELBO draw - its old value) / L a draw's ratio is 1 + d for A > 0 and exp(d) otherwise;
each is clipped, for A < 0 the loss is at most -``dual_clip`` A, and the loss is the mean over
draws. Read in yjyddq/DARE, verl/trainer/ppo/dllm_core_algos.py. The KL penalty is ESPO's.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_espo.objectives.base import Given, Loss, Objective, setting
from megatron_espo.objectives.kl import sequence_kl
from megatron_espo.objectives.ratios import clipped_ratio


@dataclass(frozen=True)
class Bgpo(Objective):
    """BGPO.

    Attributes:
        dual_clip: largest ratio that a negative advantage is multiplied with.
    """

    dual_clip: float = setting(3.0, low=1.0)
    idle_without_advantage = True
    honours = frozenset(
        {"clip_eps_low", "clip_eps_high", "kl_coef", "kl_estimator", "num_mc", "elbo_estimator",
         "k2_unbiased"}
    )  # fmt: skip

    def loss(self, logp: Tensor, given: Given) -> Loss:
        """Compute the loss of ELBO draws ``[b, m]``."""
        espo, advantages = given.espo, given.advantages[:, None]
        d = (logp - given.old) / given.length
        ratio = torch.where(advantages > 0, 1 + d, d.exp())
        above = (ratio > self.dual_clip) & (advantages < 0)
        limited = torch.where(above, torch.full_like(ratio, self.dual_clip), ratio)
        clipped = clipped_ratio(limited, advantages, espo)
        loss = clipped.loss.mean(dim=1)
        statistics = {
            "ratio": ratio.detach().mean(dim=1),
            "clip_low": clipped.low.to(logp.dtype).mean(dim=1),
            "clip_high": clipped.high.to(logp.dtype).mean(dim=1),
        }
        if given.reference is None:
            idle = (clipped.low | clipped.high | above | (advantages == 0)).all(dim=1)
            return Loss(loss, statistics, idle)
        kl = sequence_kl(logp, given.reference, espo.kl_estimator) / given.length
        return Loss(loss + espo.kl_coef * kl, {**statistics, "kl": kl.detach()})
