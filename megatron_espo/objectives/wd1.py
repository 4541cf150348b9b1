"""wd1 (arXiv 2507.08838): weighted likelihood without a ratio.

loss of a group = -sum softmax(A) l + sum softmax(-A) l, l = log-probability of the tokens up to the
first end of sequence in diffu-GRPO's one pass. Read in xiaohangt/wd1,
wd1/trainers/rev_grpo_trainer.py. Theirs takes the softmax over a device's batch of 6, which its
settings make one group; this one over the group.
"""

from dataclasses import dataclass

from torch import Tensor

from megatron_espo.config import EspoConfig
from megatron_espo.objectives.base import Given, Loss, Objective, setting
from megatron_espo.objectives.masks import OnePass


@dataclass(frozen=True)
class Wd1(Objective):
    """wd1.

    Attributes:
        prompt_mask: probability of a prompt token to be masked.
    """

    prompt_mask: float = setting(0.15, 0.0, 1.0)
    per_token, linear, compares_with_old = True, True, False
    scope = "advantages"
    honours = frozenset({"num_mc"})

    def masks(self, espo: EspoConfig) -> OnePass:
        """Mask the completion and some of the prompt."""
        return OnePass(self.prompt_mask)

    def loss(self, logp: Tensor, given: Given) -> Loss:
        """Compute the weighted likelihood of tokens ``[b, m, 1, l]``."""
        assert given.group is not None
        size, own = given.group.size(1), given.advantages
        # Each one's share of its group's softmax; an update's loss is a mean, the group's a sum.
        up, down = ((s * own - (s * given.group).logsumexp(dim=1)).exp() for s in (1.0, -1.0))
        weight = size * (up - down)
        likelihood = (logp[:, :, 0] * given.answer[:, None]).sum(dim=-1).mean(dim=1)
        return Loss(-weight * likelihood, {"weight": weight}, weight == 0)
