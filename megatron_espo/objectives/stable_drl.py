"""StableDRL: SPG's bounds under self-normalised importance weights.

loss of a group = -sum w A l, l SPG's bound, w = softmax over the group of min(lower - lower_old,
log clip), detached. Read in JianyuanZhong/StableDRL, networks/llada_svpo.py. Theirs takes the
softmax over a device's batch and draws the old policy's masks apart; this one over the group, under
the same masks.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from megatron_espo.objectives.base import Given, Loss, setting
from megatron_espo.objectives.spg import Spg, likelihood_bounds


@dataclass(frozen=True)
class StableDrl(Spg):
    """StableDRL.

    Attributes:
        clip: largest importance weight before the softmax.
    """

    clip: float = setting(5.0, low=1.0)
    compares_with_old = True
    scope = "group"

    def loss(self, logp: Tensor, given: Given) -> Loss:
        """Compute the weighted policy gradient of tokens ``[b, m, 1, l]``, whole groups."""
        assert given.group is not None
        size = given.group.size(1)
        bound, lower, _ = self.bound(logp, given)
        change = lower.detach() - likelihood_bounds(given.old, given, self.beta)[0]
        weights = change.clamp(max=math.log(self.clip)).view(-1, size).softmax(dim=1).flatten()
        # An update's loss is a mean over completions, a group's a sum.
        loss = -size * weights * given.advantages * bound
        return Loss(loss, {"ratio": change.exp(), "weight": size * weights}, given.advantages == 0)
