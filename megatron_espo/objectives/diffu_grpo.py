"""diffu-GRPO (d1, arXiv 2504.12216): GRPO on mean-field log-probabilities of tokens.

ONE pass: the whole completion masked, each prompt token with probability 0.15, the same prompt
masks for old, reference and current policy, fresh ones for every update. loss = sum over tokens of
-min(r A, clip(r) A) + beta k3, over tokens up to the first end of sequence and divided by their
number. Read in dllm-reasoning/d1, diffu-grpo/diffu_grpo_trainer.py. Theirs divides by the tokens of
a device's batch, this one by those of the global batch; their mask is the first draw alone.
"""

from dataclasses import dataclass

from torch import Tensor

from megatron_espo.config import EspoConfig
from megatron_espo.objectives.base import Given, Loss, Objective, setting
from megatron_espo.objectives.masks import OnePass
from megatron_espo.objectives.ratios import token_loss


@dataclass(frozen=True)
class DiffuGrpo(Objective):
    """diffu-GRPO.

    Attributes:
        prompt_mask: probability of a prompt token to be masked.
    """

    prompt_mask: float = setting(0.15, 0.0, 1.0)
    per_token, idle_without_advantage = True, True
    honours = frozenset({"clip_eps_low", "clip_eps_high", "kl_coef", "kl_estimator", "num_mc"})

    def masks(self, espo: EspoConfig) -> OnePass:
        """Mask the completion and some of the prompt."""
        return OnePass(self.prompt_mask)

    def loss(self, logp: Tensor, given: Given) -> Loss:
        """Compute the clipped loss of tokens ``[b, m, 1, l]``."""
        reference = None if given.reference is None else given.reference[:, :, 0]
        return token_loss(
            logp[:, :, 0], given.old[:, :, 0], reference, given, given.answer, given.mean_answer
        )
