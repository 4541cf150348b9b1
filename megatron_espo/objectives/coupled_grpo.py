"""coupled-GRPO (DiffuCoder, arXiv 2506.20639): GRPO on log-probabilities of coupled masks.

Three views: all masked; each token with probability t ~ U(0.2, 0.8); the others. A token's proxy is
(log p(all masked) + w log p(its view)) / 2, w = 1/t or 1/(1-t); the rest is diffu-GRPO's. Read in
apple/ml-diffucoder, src/open_r1/coupled_grpo.py. Theirs draws one t for a device's batch, this one
a t for each completion and draw, and divides by the tokens of the global batch.
"""

from dataclasses import dataclass

from torch import Tensor

from megatron_espo.config import EspoConfig
from megatron_espo.objectives.base import Given, Loss, Objective
from megatron_espo.objectives.masks import CoupledViews
from megatron_espo.objectives.ratios import token_loss


@dataclass(frozen=True)
class CoupledGrpo(Objective):
    """coupled-GRPO."""

    per_token, idle_without_advantage = True, True
    honours = frozenset({"clip_eps_low", "clip_eps_high", "kl_coef", "kl_estimator", "num_mc"})

    def masks(self, espo: EspoConfig) -> CoupledViews:
        """Mask three views."""
        return CoupledViews()

    def loss(self, logp: Tensor, given: Given) -> Loss:
        """Compute the clipped loss of tokens ``[b, m, 3, l]``."""

        def proxy(values: Tensor) -> Tensor:
            return (values * given.weights[..., None]).sum(dim=2) / 2

        reference = None if given.reference is None else proxy(given.reference)
        return token_loss(
            proxy(logp), proxy(given.old), reference, given, given.answer, given.mean_answer
        )
