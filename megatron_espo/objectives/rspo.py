"""RSPO (arXiv 2605.10218): policy gradient whose advantage holds the distance to the reference.

loss = -(A - beta (d - mean d)) ELBO / L, the bracket detached, d = ELBO - ELBO_ref in nats, beta
--espo-kl-coef. Formula second-hand, no code at hand. The mean is over the group. Without the mean
and at a ratio of 1 its gradient is ESPO's with the penalty k2.
"""

from dataclasses import dataclass

from torch import Tensor

from megatron_espo.objectives.base import Given, Loss, Objective


@dataclass(frozen=True)
class Rspo(Objective):
    """RSPO."""

    compares_with_old = False
    scope = "group"
    honours = frozenset({"kl_coef", "num_mc", "elbo_estimator"})

    def loss(self, logp: Tensor, given: Given) -> Loss:
        """Compute the policy gradient of ELBO draws ``[b, m]``, whole groups."""
        assert given.group is not None
        elbo, coefficient, statistics = logp.mean(dim=1), given.advantages, {}
        if given.reference is not None:
            d = elbo.detach() - given.reference.mean(dim=1)
            groups = d.view(-1, given.group.size(1))
            centred = (groups - groups.mean(dim=1, keepdim=True)).flatten()
            coefficient = coefficient - given.espo.kl_coef * centred
            statistics["kl"] = d.square() / 2 / given.length
        return Loss(-coefficient * elbo / given.length, statistics, coefficient == 0)
