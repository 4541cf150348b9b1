"""A sequence ratio of mean-field likelihoods: an ablation of ESPO's paper (arXiv 2512.03759, 5).

l = sum over all tokens of log p(token | prompt, everything masked), one pass; the rest is ESPO's.
Differs from the paper in nothing known; its code does not hold the ablation.
"""

from dataclasses import dataclass

from megatron_espo.config import EspoConfig
from megatron_espo.objectives.espo import Espo
from megatron_espo.objectives.masks import OnePass


@dataclass(frozen=True)
class MeanField(Espo):
    """ESPO on mean-field likelihoods."""

    honours = frozenset({"clip_eps_low", "clip_eps_high", "kl_coef", "kl_estimator"})

    def masks(self, espo: EspoConfig) -> OnePass:
        """Mask the completion, and nothing of the prompt: draws would be alike."""
        return OnePass()
