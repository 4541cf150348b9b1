"""EBPO (LLaDA2.1, arXiv 2602.08676, eq. 4 and 5): one ratio of whole block ELBOs, not normalised.

A draw masks all blocks of a completion at once, each at a level of its own: the ELBO of a draw is
the sum over its blocks of (T / c) times the log-probabilities of the c of T tokens that are masked,
given the clean blocks before. ratio = exp(mean over draws of ELBO - ELBO_old), in nats of the whole
completion; loss = -min(ratio A, clip(ratio, 1 - eps_low, 1 + eps_high) A) + beta KL(ELBO -
ELBO_ref).
Formula and levels as read in yjyddq/DARE at 83ae8a3, verl/trainer/ppo/dllm_core_algos.py
(_forward_process_ebpo, compute_policy_loss_ebpo); the report's own code is not published. Where it
differs: levels do not depend on how completions are spread over ranks; tokens after the end of
sequence, which theirs hides, are masked here; a ratio above e^20 counts as e^20, where theirs
overflows for A < 0; theirs divides A by the standard deviation, which is up to the run here.
"""

from dataclasses import dataclass

from torch import Tensor

from megatron_espo.config import EspoConfig, RolloutConfig
from megatron_espo.objectives.base import Given, Loss, Objective, need_blocks
from megatron_espo.objectives.block_masks import StratifiedBlocks
from megatron_espo.objectives.kl import sequence_kl
from megatron_espo.objectives.ratios import sequence_loss

MOST_NATS = 20.0
"""Largest log-ratio that counts: float32 holds the square of a gradient of this size."""


@dataclass(frozen=True)
class Ebpo(Objective):
    """EBPO."""

    idle_without_advantage = True
    honours = frozenset({"clip_eps_low", "clip_eps_high", "kl_coef", "kl_estimator", "num_mc"})

    def masks(self, espo: EspoConfig) -> StratifiedBlocks:
        """Mask some of each block."""
        return StratifiedBlocks()

    def fitted(self, rollout: RolloutConfig, block_size: int | None) -> tuple[str, ...]:
        """Refuse a model without blocks."""
        need_blocks("ebpo", "espo", block_size)
        return ()

    def loss(self, logp: Tensor, given: Given) -> Loss:
        """Compute the clipped loss of ELBO draws ``[b, m]``."""
        log_ratio = logp.mean(dim=1) - given.old.mean(dim=1)
        found = sequence_loss(
            log_ratio.clamp(max=MOST_NATS).exp(), given.advantages, None, given.espo
        )
        if given.reference is None:
            return found
        kl = sequence_kl(logp, given.reference, given.espo.kl_estimator)
        statistics = {**found.statistics, "kl": kl.detach() / given.length}
        return Loss(found.loss + given.espo.kl_coef * kl, statistics)
