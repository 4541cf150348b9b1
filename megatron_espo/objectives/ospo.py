"""OSPO's credit of parts (Owen-Shapley, arXiv 2601.08403 and its code) for ELBOs.

A completion's parts (tasks.parts) are credited by phi_i, a sum of differences v(S + i) - v(S) over
runs S of neighbours. A token gets the phi of its part, brought to c in [0, 1] by the completion's
least and largest, and A_k = A T c_k / sum c, T the number of tokens in parts, |A_k| at most twice
the standard deviation of A. `--espo-advantage std` is theirs.

Terms of the ELBO: L_k = mean over draws of sum over views of w_v log p(token k | view v) where k is
masked, ELBO = sum L_k. How a clipped ratio and an advantage for each term go together:

* one ratio of a completion (default), R = exp((ELBO - ELBO_old) / L). A ratio weighs a sample,
  whatever of it is credited; splitting A inside of its exponent would make it the ratio of nothing.
  So R stays ESPO's and only weighs the terms: loss = mean over k of -min(r_k A_k, clip(r_k) A_k)
  with r_k = R as a value and the gradient R dL_k, which is GSPO-token's (arXiv 2507.18071,
  section 4.3). As no A_k has another sign than A, either all terms are clipped or none, just when
  ESPO clips; with equal A_k value and gradient are ESPO's. Penalty: ESPO's.
* tokens=1: r_k = exp(L_k - L_k_old), each clipped by itself (token_elbo); theirs has one for each
  token, too.

What differs from their code: credits stand at their own tokens, theirs at the first ones of the
completion; tokens of no part keep A, where theirs are worth 0; the credits' scale to the reward,
which cancels in the share, is left out (with it a completion of reward 0 has no advantage). Where
there are more runs than ``coalitions`` the narrowest are taken, not random ones. Their loss is of
the tokens that were sampled, here all terms of the ELBO count.

Two settings are not theirs. Their weights give the two parts at the ends up to twice the credit of
others that add as much; even=1 mends it. And of a completion that is worse than its group their
best parts are pushed down hardest; blame=1 turns the credits round where A < 0.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_espo.objectives.base import Given, Loss, Objective, setting
from megatron_espo.objectives.credit import Credit
from megatron_espo.objectives.kl import sequence_kl
from megatron_espo.objectives.ratios import clipped_ratio, token_loss


@dataclass(frozen=True)
class Ospo(Objective):
    """ESPO with an advantage for each term of the ELBO.

    Attributes:
        width: most neighbouring parts that are scored together.
        coalitions: most coalitions that are scored.
        limit: standard deviations that a token's advantage is limited to; 0: none.
        even: 1: a part's weights have the sum 1.
        blame: 1: where A < 0, parts that are worth least take most.
        tokens: 1: a ratio for each token.
    """

    width: int = setting(32, 1)
    coalitions: int = setting(64, 3)
    limit: float = setting(2.0, 0.0)
    even: int = setting(0, 0, 1)
    blame: int = setting(0, 0, 1)
    tokens: int = setting(0, 0, 1)

    per_token, idle_without_advantage = True, True
    honours = frozenset(
        {"clip_eps_low", "clip_eps_high", "kl_coef", "kl_estimator", "num_mc", "elbo_estimator"}
    )

    def credit(self) -> Credit:
        """See Objective."""
        return Credit(self.width, self.coalitions, bool(self.even), self.limit, bool(self.blame))

    def loss(self, logp: Tensor, given: Given) -> Loss:
        """Compute the clipped loss of tokens ``[b, m, v, l]``; all tokens of the length count."""

        def terms(values: Tensor) -> Tensor:
            return (values * given.weights[..., None]).sum(dim=2)

        advantages = given.token_advantages
        assert advantages is not None, "an objective with credit is given them"
        now, old = terms(logp), terms(given.old)
        reference = None if given.reference is None else terms(given.reference)
        if self.tokens:
            found = self._token_ratios(now, old, reference, given)
        else:
            found = self._one_ratio(now, old, reference, given, advantages)
        whole = given.advantages[:, None]
        moved = (advantages - whole).abs().mean(dim=1) / whole[:, 0].abs()
        return found._replace(
            statistics={**found.statistics, "redistributed": moved.nan_to_num(0.0, 0.0, 0.0)}
        )

    def _token_ratios(
        self, now: Tensor, old: Tensor, reference: Tensor | None, given: Given
    ) -> Loss:
        """Of terms ``[b, m, l]``."""
        now, old = (values.mean(dim=1, keepdim=True) for values in (now, old))
        reference = None if reference is None else reference.mean(dim=1, keepdim=True)
        counted = torch.ones_like(given.answer)
        return token_loss(now, old, reference, given, counted, float(given.length))

    def _one_ratio(
        self, now: Tensor, old: Tensor, reference: Tensor | None, given: Given, advantages: Tensor
    ) -> Loss:
        """Of terms ``[b, m, l]``."""
        elbo, elbo_old = now.sum(dim=2), old.sum(dim=2)
        ratio = ((elbo.mean(dim=1) - elbo_old.mean(dim=1)) / given.length).exp().detach()
        term = now.mean(dim=1)
        clipped = clipped_ratio(ratio[:, None] * (1 + term - term.detach()), advantages, given.espo)
        loss, kl = clipped.loss.mean(dim=1), torch.zeros_like(ratio)
        idle = None
        if reference is None:
            idle = (clipped.low | clipped.high | (advantages == 0)).all(dim=1)
        else:
            penalty = sequence_kl(elbo, reference.sum(dim=2), given.espo.kl_estimator)
            loss = loss + given.espo.kl_coef * penalty / given.length
            kl = penalty.detach() / given.length
        clips = {"clip_low": clipped.low, "clip_high": clipped.high}
        return Loss(
            loss,
            {
                "ratio": ratio,
                "kl": kl,
                **{n: c.to(ratio.dtype).mean(dim=1) for n, c in clips.items()},
            },
            idle,
        )
