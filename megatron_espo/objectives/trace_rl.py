"""TraceRL (arXiv 2509.06949): token ratios along the steps of a completion, some steps together.

A token's log-probability is that at its own step, of which ``merged`` neighbouring ones share a
pass: given what had been committed before the first of them, the rest masked. loss = sum over the
tokens up to the first end of sequence of -min(r A, clip(r) A) + kl_old k3(l - l_old), divided by
their mean number. Read in Gen-Verse/dLLM-RL at 10b4fd1, train/rl_sdar.py (blocks, all of which pass
at once) and train/rl_llada.py (full attention), without the value model. The penalty there is to
the sampling policy; one to a reference may be added here (--espo-kl-coef). rl_sdar.py divides by
the padded length of all completions and by the passes of an optimizer step, a factor on the rate;
rl_llada.py takes the mean over a pass's tokens, as the paper does, which is the same where all
steps commit one number of tokens. Theirs splits the passes of a rollout over optimizer steps, which
see each once; here every update sees all.
"""

from dataclasses import dataclass

from torch import Tensor

from megatron_espo.config import EspoConfig, RolloutConfig
from megatron_espo.objectives.base import Given, Loss, Objective, setting
from megatron_espo.objectives.just_grpo import MOST_PASSES
from megatron_espo.objectives.kl import pointwise_kl
from megatron_espo.objectives.ratios import token_loss
from megatron_espo.objectives.step_views import StepViews, step_passes


@dataclass(frozen=True)
class TraceRl(Objective):
    """TraceRL.

    Attributes:
        merged: neighbouring steps that share a pass (their ``shrink``: 1 of models with blocks of
            4, 8 of LLaDA).
        kl_old: weight of the penalty to the sampling policy.
        passes: one for each ``merged`` steps; 0: settled by how completions are sampled.
    """

    merged: int = setting(1, 1)
    kl_old: float = setting(0.01, 0.0)
    passes: int = setting(0, 0, MOST_PASSES)
    per_token, each_token_once = True, True
    honours = frozenset({"clip_eps_low", "clip_eps_high", "kl_coef", "kl_estimator"})

    @property
    def idle_without_advantage(self) -> bool:  # type: ignore[override]
        """See Objective: a penalty to the sampling policy has a gradient without one."""
        return self.kl_old == 0.0

    def masks(self, espo: EspoConfig) -> StepViews:
        """Make the states before every so many steps again."""
        return StepViews(self.passes, self.merged)

    def fitted(self, rollout: RolloutConfig, block_size: int | None) -> tuple[str, ...]:
        """Take a pass for every so many denoising steps."""
        return step_passes("trace_rl", self.passes, self.merged, rollout, block_size)

    def loss(self, logp: Tensor, given: Given) -> Loss:
        """Compute the clipped loss of tokens ``[b, 1, l]``."""
        answer, total = given.answer, given.mean_answer
        found = token_loss(logp, given.old, given.reference, given, answer, total)
        if self.kl_old == 0.0:
            return found
        kl = (pointwise_kl(logp - given.old, "k3") * answer[:, None]).sum(dim=2).mean(dim=1)
        statistics = {**found.statistics, "kl_old": kl.detach() / answer.sum(dim=1)}
        return Loss(found.loss + self.kl_old * kl / total, statistics)
