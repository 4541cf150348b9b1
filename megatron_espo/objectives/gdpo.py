"""GDPO (arXiv 2510.08554): ESPO's ratio with the ELBO by Gauss-Legendre quadrature over t.

ELBO = sum over nodes k of (w_k L / n_k) x log-probability summed over n_k = floor(t_k L) tokens,
drawn at random; ratio, clip and penalty are ESPO's.
From the paper's text and project page, no code at hand; the weight takes the ratio that was masked,
n_k / L, in place of t_k.
"""

from dataclasses import dataclass

from megatron_espo.config import EspoConfig
from megatron_espo.objectives.base import setting
from megatron_espo.objectives.espo import Espo
from megatron_espo.objectives.masks import Quadrature


@dataclass(frozen=True)
class Gdpo(Espo):
    """GDPO.

    Attributes:
        nodes: mask ratios of a draw.
    """

    nodes: int = setting(3, low=1)
    honours = frozenset(
        {"clip_eps_low", "clip_eps_high", "kl_coef", "kl_estimator", "num_mc", "k2_unbiased"}
    )

    def masks(self, espo: EspoConfig) -> Quadrature:
        """Mask at the nodes."""
        return Quadrature(self.nodes)
