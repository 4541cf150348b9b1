"""Block JustGRPO: JustGRPO for a model whose tokens come block by block.

log p(y) = sum over blocks, and over the places of a block from left to right, of log p(token |
clean blocks before, clean tokens before it in its block, the rest of the block masked). All blocks
pass at once, so that a completion takes as many passes as a block has tokens. loss = sum over the
tokens up to the first end of sequence of -min(r A, clip(r) A) + beta k3, divided by their mean
number. Read in NVIDIA-NeMo/RL at 749b0ed, research/just_grpo. Theirs divides by the tokens of the
global batch likewise, samples from left to right, fills prompts up to whole blocks with mask tokens
on their left (here the first block holds the prompt's last tokens), corrects the sampler's
probabilities (truncated importance sampling), and has a faster variant on the least sure tokens.
"""

from dataclasses import dataclass

from torch import Tensor

from megatron_espo.config import EspoConfig, RolloutConfig
from megatron_espo.errors import UserError
from megatron_espo.objectives.base import Given, Loss, Objective, need_blocks, setting
from megatron_espo.objectives.just_grpo import exact_passes
from megatron_espo.objectives.ordered_views import BlockPrefixes
from megatron_espo.objectives.ratios import token_loss

MOST_PASSES = 64
"""Largest block, in tokens and so in passes."""


@dataclass(frozen=True)
class BlockJustGrpo(Objective):
    """Block JustGRPO.

    Attributes:
        passes: one for each token of a block; 0: settled by --block-size.
    """

    passes: int = setting(0, 0, MOST_PASSES)
    per_token, each_token_once, idle_without_advantage = True, True, True
    honours = frozenset({"clip_eps_low", "clip_eps_high", "kl_coef", "kl_estimator"})

    def masks(self, espo: EspoConfig) -> BlockPrefixes:
        """Mask a place and all after it in every block."""
        return BlockPrefixes(self.passes)

    def fitted(self, rollout: RolloutConfig, block_size: int | None) -> tuple[str, ...]:
        """Take as many passes as a block has tokens."""
        block_size = need_blocks("block_just_grpo", "just_grpo", block_size)
        if block_size > MOST_PASSES:
            raise UserError(
                "--espo-objective block_just_grpo passes a completion once for every token of a "
                f"block: --block-size {block_size} exceeds {MOST_PASSES}; use another objective."
            )
        return exact_passes("block_just_grpo", self.passes, block_size)

    def loss(self, logp: Tensor, given: Given) -> Loss:
        """Compute the clipped loss of tokens ``[b, 1, l]``."""
        return token_loss(logp, given.old, given.reference, given, given.answer, given.mean_answer)
