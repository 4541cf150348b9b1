"""One ratio of ELBO terms per token: an ablation of ESPO's paper (arXiv 2512.03759, sections 2, 5).

The ELBO is a sum of terms of its tokens, L_k = mean over draws of sum over views of w_v log p(token
k | view v) where k is masked; loss = mean over tokens of -min(exp(L_k - L_k_old) A, clip(...) A) +
beta KL(L_k - L_k_ref). Differs from the paper in nothing known; its code does not hold it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_espo.objectives.base import Given, Loss, Objective
from megatron_espo.objectives.ratios import token_loss


@dataclass(frozen=True)
class TokenElbo(Objective):
    """Token ratios of ELBO terms."""

    per_token, idle_without_advantage = True, True
    honours = frozenset(
        {"clip_eps_low", "clip_eps_high", "kl_coef", "kl_estimator", "num_mc", "elbo_estimator"}
    )

    def loss(self, logp: Tensor, given: Given) -> Loss:
        """Compute the clipped loss of tokens ``[b, m, v, l]``; all tokens of the length count."""

        def terms(values: Tensor) -> Tensor:
            return (values * given.weights[..., None]).sum(dim=2).mean(dim=1, keepdim=True)

        reference = None if given.reference is None else terms(given.reference)
        counted = torch.ones_like(given.answer)
        return token_loss(
            terms(logp), terms(given.old), reference, given, counted, float(given.length)
        )
