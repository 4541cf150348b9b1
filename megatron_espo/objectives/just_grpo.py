"""JustGRPO (arXiv 2601.15165): GRPO on the exact left-to-right likelihood of a completion.

log p(y) = sum_t log p(y_t | y_<t, all from t on masked): a pass for every token. loss = mean over
ALL l tokens, those after the end of sequence included, of -min(r A, clip(r) A). Read in
LeapLabTHU/JustGRPO, grpo.py, which makes one update per rollout (there r is 1), divides A by the
standard deviation, and the loss by the share of completions with an advantage: a factor on the rate
that this one has not. Theirs has no penalty; one of k3 may be added here. Sampled there from left
to right (--rollout-block-length 1), which is up to the run here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_espo.config import EspoConfig, RolloutConfig
from megatron_espo.errors import UserError
from megatron_espo.objectives.base import Given, Loss, Objective, setting
from megatron_espo.objectives.ordered_views import Prefixes
from megatron_espo.objectives.ratios import token_loss

MOST_PASSES = 256
"""Longest completion, in tokens and so in passes: that of the published runs."""


@dataclass(frozen=True)
class JustGrpo(Objective):
    """JustGRPO.

    Attributes:
        passes: one for each token of the completion; 0: settled by --rollout-completion-length.
    """

    passes: int = setting(0, 0, MOST_PASSES)
    per_token, each_token_once, idle_without_advantage = True, True, True
    honours = frozenset({"clip_eps_low", "clip_eps_high", "kl_coef", "kl_estimator"})

    def masks(self, espo: EspoConfig) -> Prefixes:
        """Mask a token and all after it."""
        return Prefixes(self.passes)

    def fitted(self, rollout: RolloutConfig, block_size: int | None) -> tuple[str, ...]:
        """Take as many passes as a completion has tokens."""
        if rollout.completion_length > MOST_PASSES:
            raise UserError(
                "--espo-objective just_grpo passes a completion once for every token: "
                f"--rollout-completion-length {rollout.completion_length} exceeds the "
                f"{MOST_PASSES} of the published runs; shorten it or use another objective."
            )
        return exact_passes("just_grpo", self.passes, rollout.completion_length)

    def loss(self, logp: Tensor, given: Given) -> Loss:
        """Compute the clipped loss of tokens ``[b, 1, l]``."""
        counted = torch.ones_like(given.answer)
        return token_loss(logp, given.old, given.reference, given, counted, float(given.length))


def exact_passes(name: str, asked: int, needed: int) -> tuple[str, ...]:
    """Settle a number of passes that the run leaves no choice of.

    Args:
        name: of the objective.
        asked: passes of --espo-objective-args, or 0.
        needed: what they must be.

    Returns:
        "passes=NEEDED".

    Raises:
        UserError: another number was asked for.
    """
    if asked not in (0, needed):
        raise UserError(
            f"--espo-objective-args passes={asked}: with --espo-objective {name} this run takes "
            f"{needed}; leave it out."
        )
    return (f"passes={needed}",)
