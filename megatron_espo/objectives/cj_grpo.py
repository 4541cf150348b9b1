"""CJ-GRPO (arXiv 2509.23924): GRPO along the denoising steps by which a completion was sampled.

A token's log-probability is that at its own step: given what had been committed before, the rest
masked. loss = mean over steps of the mean over the step's tokens of -min(r A, clip(r) A) + beta k3.
All tokens count that the sampler committed, those after the end of sequence, too. A is the reward
less the mean of its group. Read in yjyddq/EOSER-ASS-RL at 5affb4e, cj-grpo/
cj_grpo_trainer_semiar.py. Theirs averages a step over the rows of a device, where all rows commit
alike; its samplers that reject an early end (EOSER) and commit ever more tokens a step (ASS) are
not here.
"""

from dataclasses import dataclass

from torch import Tensor

from megatron_espo.config import EspoConfig, RolloutConfig
from megatron_espo.objectives.base import Given, Loss, Objective, setting
from megatron_espo.objectives.just_grpo import MOST_PASSES
from megatron_espo.objectives.ratios import token_loss
from megatron_espo.objectives.step_views import StepViews, step_passes


@dataclass(frozen=True)
class CjGrpo(Objective):
    """CJ-GRPO.

    Attributes:
        passes: one for each denoising step; 0: settled by how completions are sampled.
    """

    passes: int = setting(0, 0, MOST_PASSES)
    per_token, each_token_once, idle_without_advantage = True, True, True
    honours = frozenset({"clip_eps_low", "clip_eps_high", "kl_coef", "kl_estimator"})

    def masks(self, espo: EspoConfig) -> StepViews:
        """Make each step's state again."""
        # Blocks that pass at once have no common steps to take a mean over.
        return StepViews(self.passes, by_block=False)

    def fitted(self, rollout: RolloutConfig, block_size: int | None) -> tuple[str, ...]:
        """Take as many passes as a completion has denoising steps."""
        return step_passes("cj_grpo", self.passes, 1, rollout, block_size)

    def loss(self, logp: Tensor, given: Given) -> Loss:
        """Compute the clipped loss of tokens ``[b, 1, l]``."""
        assert given.predicted is not None
        shares = step_shares(given.predicted[:, 0].to(logp.dtype))
        return token_loss(logp, given.old, given.reference, given, shares, 1.0)


def step_shares(predicted: Tensor) -> Tensor:
    """Weigh steps alike, and the tokens of a step alike.

    Args:
        predicted: float ``[b, v, l]``, 1 for the tokens of each step, else 0.

    Returns:
        float ``[b, l]`` with a sum of 1 per completion; 0 for tokens of no step.
    """
    number = predicted.sum(dim=2)
    steps = (number > 0).sum(dim=1)
    shares = (predicted / number.clamp(min=1.0)[..., None]).sum(dim=1)
    return shares / steps[:, None]
