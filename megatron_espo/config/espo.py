"""ESPO and the other objectives."""

import math
from dataclasses import dataclass, field
from typing import Literal

from megatron_espo.config.kinds import STRINGS
from megatron_espo.errors import UserError

REFERENCE_MIX_INTERVAL = 64
"""Optimizer steps between mixes of the reference where all weights are trained (published)."""


MOST_REFILLS = 2**20
"""Largest --espo-refill: the numbers of further prompts leave room for so many in a rollout."""


@dataclass(frozen=True)
class EspoConfig:
    """ESPO: ELBO-based sequence-level policy optimization (arXiv 2512.03759)."""

    objective: str = "espo"
    """Objective: espo, token_elbo, mean_field, diffu_grpo, coupled_grpo, wd1, gdsd, spg, rspo,
    bridge, gdpo, stable_drl, bgpo, just_grpo, block_just_grpo, cj_grpo, trace_rl, ebpo, ospo, or
    your own: FILE.py or my_module.my_objective (docs/objectives.md)."""

    objective_args: list[str] | None = field(default=None, metadata=STRINGS)
    """Settings of the objective, NAME=VALUE: psi=10 of gdsd, beta=1 of spg, ..."""

    task: str = "sudoku"
    """Task with a verifiable reward: sudoku, countdown, gsm8k, math, code, or your own: FILE.py
    or an import path, my_package.my_task, either with ":attribute" for an object in it. Several
    with weights by which prompts are drawn: gsm8k:2,countdown:1."""

    train_data: str | None = None
    """JSONL of the task's problems to train on. Of several tasks: gsm8k=FILE,countdown=FILE."""

    eval_data: str | None = None
    """JSONL of held-out problems for the accuracy curve. Of several tasks, or some of them:
    gsm8k=FILE,countdown=FILE."""

    eval_interval: int = 0
    """Rollouts between evaluations on --espo-eval-data; 0 evaluates before and after only."""

    eval_samples: int = 0
    """Held-out problems per evaluation, of each task; 0 takes all."""

    num_rollouts: int = 100
    """Rollouts of the run. Each makes --espo-updates-per-rollout optimizer steps."""

    prompts_per_rollout: int = 16
    """Prompts per rollout, over all data-parallel ranks."""

    group_size: int = 6
    """Completions per prompt (G); at least 2, since a group is its own baseline."""

    updates_per_rollout: int = 8
    """Optimizer steps per rollout (the paper's mu), each with fresh masks."""

    num_mc: int = 2
    """Monte-Carlo draws per ELBO (n_mc); a coupled draw is a pair of complementary masks."""

    elbo_estimator: Literal["coupled", "exact_count", "bernoulli"] = "coupled"
    """Forward process behind the ELBO."""

    clip_eps_low: float = 0.2
    """Lower clip range of the importance ratio."""

    clip_eps_high: float = 0.2
    """Upper clip range of the importance ratio."""

    kl_coef: float = 1e-3
    """Weight of the KL penalty to the reference policy (beta); 0 keeps no reference. Objectives
    without a penalty take 0."""

    kl_estimator: Literal["k1", "k2", "k3", "k2_unbiased"] = "k2"
    """Estimator of the KL penalty on d = ELBO - ELBO_ref, per token: k2 = d^2/2 (paper),
    k2_unbiased = d1 d2 / 2 with independent draws, k3 = exp(-d) - 1 + d, k1 = d. d is that of a
    whole completion, or of each token in objectives of tokens (published with k3); of a whole
    completion k3 explodes: exp(-d) of a d of -20 nats is 5e8."""

    gradient: Literal["auto", "joint", "two_pass"] = "auto"
    """joint: all views of a sequence in one micro-batch, one pass. two_pass: a pass without
    gradients, then a backward pass view by view; memory does not grow with the draws. auto: joint
    where --micro-batch-size is a multiple of a sequence's views, which is its default."""

    refill: int = 0
    """Further prompts that a rollout may sample in place of those whose completions all have the
    same reward, from which nothing is learnt; 0: none."""

    advantage: str = "leave-one-out"
    """Advantage of a completion in its group: leave-one-out (paper), std (that over the standard
    deviation), centred (reward - mean), or your own function of rewards: FILE.py or
    my_module.my_function."""

    reference_mix: float = 0.6
    """Share a of the policy when the reference is mixed: ref <- a policy + (1-a) ref."""

    reference_mix_interval: int | None = None
    """Optimizer steps between mixes of the reference policy; 0 never mixes. Default: 64, and 0 with
    --lora-rank, where the reference is the base."""

    fp8_phases: Literal["both", "rollout", "elbo"] = "both"
    """With --fp8-format, what computes in FP8: rollouts and held-out evaluation (rollout), ELBOs
    and updates (elbo), or both. The rest computes in bf16."""

    samples_to_log: int = 4
    """Sampled completions written to TensorBoard as text per rollout logged."""

    reward_workers: int = 2
    """Processes per copy of the model that score completions while others are sampled; 0 scores in
    the trainer itself, where a reward that hangs stops the run."""

    reward_timeout: float = 60.0
    """Seconds a worker may take for one completion; a slower one scores 0 and is counted."""

    accept_uncontained_code: bool = False
    """With --espo-task code, run generated code even where neither bubblewrap nor namespaces work:
    under limits alone, where it can read, change and delete its user's files."""

    def validate(self) -> None:
        """Check the values against each other.

        Raises:
            UserError: naming the flag.
        """
        if self.group_size < 2:
            raise UserError(
                f"--espo-group-size {self.group_size}: a group needs at least 2 completions, "
                "because the others are the baseline of each."
            )
        for name in ("num_rollouts", "prompts_per_rollout", "updates_per_rollout", "num_mc"):
            if getattr(self, name) < 1:
                raise UserError(f"--espo-{name.replace('_', '-')} must be at least 1.")
        for name in ("clip_eps_low", "clip_eps_high"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UserError(
                    f"--espo-{name.replace('_', '-')} {getattr(self, name)} must lie in [0, 1)."
                )
        for name in (
            "eval_interval",
            "eval_samples",
            "samples_to_log",
            "reward_workers",
        ):
            if getattr(self, name) < 0:
                raise UserError(
                    f"--espo-{name.replace('_', '-')} {getattr(self, name)} must be 0 or more."
                )
        if not 0 <= self.refill <= MOST_REFILLS:
            raise UserError(
                f"--espo-refill {self.refill} must be 0 (no further prompts) to {MOST_REFILLS}."
            )
        if self.reference_mix_interval is not None and self.reference_mix_interval < 0:
            raise UserError(
                f"--espo-reference-mix-interval {self.reference_mix_interval} must be 0 or more."
            )
        if not 0.0 < self.reward_timeout < math.inf:
            raise UserError(
                f"--espo-reward-timeout {self.reward_timeout} must be a positive number of seconds."
            )
        if not 0.0 <= self.kl_coef < math.inf:
            raise UserError(
                f"--espo-kl-coef {self.kl_coef} must be 0 (no penalty) or a positive number."
            )
        if self.kl_estimator == "k2_unbiased" and self.num_mc < 2:
            raise UserError(
                "--espo-kl-estimator k2_unbiased multiplies two independent draws; use "
                "--espo-num-mc 2 or more."
            )
        if not 0.0 <= self.reference_mix <= 1.0:
            raise UserError(f"--espo-reference-mix {self.reference_mix} must lie in [0, 1].")

    @property
    def completions_per_rollout(self) -> int:
        """Completions of one rollout over all ranks: the global batch of every update."""
        return self.prompts_per_rollout * self.group_size
