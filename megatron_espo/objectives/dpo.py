"""DPO with ELBOs for likelihoods, as VRPO estimates them (LLaDA 1.5, arXiv 2505.19223).

loss of a pair = -log sigmoid(beta ((B - B_ref) of the chosen - (B - B_ref) of the rejected)), B the
mean over draws of ELBO estimates in nats per completion. Policy and reference have the same draws
(VRPO's antithetic sampling), each a time step with one mask (its optimal allocation). The loss is
that of the authors' project page; their training code is not published. Read besides: DARE,
compute_dpo_loss, which divides each B by the longest completion's length. This one does not.

It is learnt from pairs that are there (`megatron_espo.preference`), not from rollouts.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import softplus

from megatron_espo.objectives.base import Given, Loss, Objective, setting


@dataclass(frozen=True)
class Dpo(Objective):
    """DPO of pairs: completions come as chosen and rejected in turn, a group of two.

    Attributes:
        beta: scale of the log-ratios.
    """

    beta: float = setting(0.2, low=0.0)
    scope = "group"
    compares_with_old = False

    def loss(self, logp: Tensor, given: Given) -> Loss:
        """Compute the loss of draws ``[b, m]``: each completion has that of its pair."""
        assert given.reference is not None
        reward = self.beta * (logp - given.reference).mean(dim=1)
        chosen, rejected = reward.view(-1, 2).unbind(dim=1)
        # An update's loss is a mean over completions, which is that over pairs.
        loss = softplus(rejected - chosen).repeat_interleave(2)
        return Loss(loss, {"reward": reward.detach()})
