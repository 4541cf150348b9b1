"""SPG (arXiv 2510.09541): policy gradient between a lower and an upper bound of the likelihood.

loss = -A l, weighted by the tokens up to the first end of sequence (n). A > 0: l is the mean over
draws of the mean log p of masked tokens. Else: mix x upper + (1 - mix) x that, with upper the mean
over tokens that were masked in some draw of log(mean over draws of p^beta [masked] n / masked) /
beta. Read in facebookresearch/SPG, spg/spg_trainer.py (block_random masks). Theirs weights by a
device's batch, this one by the global batch.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_espo.config import EspoConfig
from megatron_espo.objectives.base import Given, Loss, Objective, setting
from megatron_espo.objectives.masks import Blockwise


def likelihood_bounds(logp: Tensor, given: Given, beta: float) -> tuple[Tensor, Tensor]:
    """Bound the log-likelihood per token from below and, as SPG does, from above.

    Args:
        logp: float ``[b, m, 1, l]``, with gradient.
        given: masks and answers.
        beta: exponent of the probabilities, at least 1.

    Returns:
        float ``[b]`` twice, nats per token, with gradient.
    """
    values = logp[:, :, 0]
    masked = given.tokens()[:, :, 0] & given.answer[:, None]
    count = masked.sum(dim=-1, keepdim=True).to(values.dtype)
    lower = torch.where(masked, values, 0.0).sum(dim=-1) / count[..., 0].clamp(min=1)
    ratio = count.clamp(min=1) / given.answer[:, None].sum(dim=-1, keepdim=True)
    draws = (beta * values - ratio.log()).masked_fill(~masked, -torch.inf)
    seen = masked.any(dim=1)
    draws = draws.masked_fill(~seen[:, None], 0.0)  # no infinity, and no gradient, of unseen tokens
    tokens = torch.where(seen, draws.logsumexp(dim=1) - math.log(values.size(1)), 0.0)
    upper = tokens.sum(dim=1) / seen.sum(dim=1).clamp(min=1) / beta
    return lower.mean(dim=1), upper


@dataclass(frozen=True)
class Spg(Objective):
    """SPG.

    Attributes:
        beta: exponent of the upper bound; published: 1.0 for sudoku, 1.5 elsewhere.
        mix: share of the upper bound where the advantage is not positive.
        prompt_mask: probability of a token before the block to be masked.
    """

    beta: float = setting(1.5, low=1.0)
    mix: float = setting(0.5, 0.0, 1.0)
    prompt_mask: float = setting(0.15, 0.0, 1.0)
    per_token, idle_without_advantage, compares_with_old = True, True, False
    honours = frozenset({"num_mc"})

    def masks(self, espo: EspoConfig) -> Blockwise:
        """Mask within a block, and all after it."""
        return Blockwise(self.prompt_mask)

    def bound(self, logp: Tensor, given: Given) -> tuple[Tensor, Tensor, Tensor]:
        """Choose the bound by the advantage: it, the lower and the upper one, ``[b]``."""
        lower, upper = likelihood_bounds(logp, given, self.beta)
        mixed = self.mix * upper + (1 - self.mix) * lower
        return torch.where(given.advantages > 0, lower, mixed), lower, upper

    def loss(self, logp: Tensor, given: Given) -> Loss:
        """Compute the policy gradient of tokens ``[b, m, 1, l]``."""
        bound, lower, upper = self.bound(logp, given)
        share = given.answer.sum(dim=-1).to(logp.dtype) / given.mean_answer
        gap = {"bound_gap": (upper - lower).detach()}
        return Loss(-given.advantages * bound * share, gap, given.advantages == 0)
