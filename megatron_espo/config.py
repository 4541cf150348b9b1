"""The project's settings: documented dataclasses that are the only source of defaults.

Each becomes a group of command-line flags (see arguments.py); what Megatron has a flag for is not
repeated here. ``validate`` raises UserError with one sentence that names the flag to change.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from megatron_espo.errors import UserError
from megatron_espo.rollout_config import RolloutConfig as RolloutConfig

_OPTIONAL_INTS = {"argparse_meta": {"type": int, "nargs": "+"}}
REFERENCE_MIX_INTERVAL = 64
"""Optimizer steps between mixes of the reference where all weights are trained (published)."""

MOST_REFILLS = 2**20
"""Largest --espo-refill: the numbers of further prompts leave room for so many in a rollout."""

_STRINGS = {"argparse_meta": {"type": str, "nargs": "+"}}


@dataclass(frozen=True)
class LaunchConfig:
    """Where flags come from, and whether to train or only to plan."""

    recipe: str | None = None
    """Recipe (megatron_espo/recipes/NAME.flags, or a file) that stands for its flags; what follows
    on the command line wins, and several recipes may be given."""

    verbose: bool = False
    """Show all that Megatron and PyTorch say on the console, too. By default it goes only into
    SAVE/logs/rank-N.log."""

    dry_run: bool = False
    """Check everything, print the memory and operations of the plan, start nothing; needs no
    GPU."""

    dry_run_world_size: int | None = None
    """GPUs that a dry run plans for. Default: WORLD_SIZE under torchrun, else NNODES (1) x
    GPUS_PER_NODE (8)."""

    dry_run_gpu_memory: float = 80.0
    """Memory of one GPU in a dry run's plan, in GB (10^9 bytes)."""

    simulate: bool = False
    """With --dry-run: run the real job as one or several of its ranks on GPUs that are not there,
    and print memory, collectives, waits and a roofline by phase; see --simulate-*."""

    def validate(self) -> None:
        """Check the values.

        Raises:
            UserError: naming the flag.
        """
        if self.dry_run_world_size is not None and self.dry_run_world_size < 1:
            raise UserError(
                f"--dry-run-world-size {self.dry_run_world_size}: a plan needs at least 1 GPU."
            )
        if self.simulate and not self.dry_run:
            raise UserError("--simulate is a kind of dry run; add --dry-run.")
        if not 0.0 < self.dry_run_gpu_memory < math.inf:
            raise UserError(
                f"--dry-run-gpu-memory {self.dry_run_gpu_memory} must be a positive number of GB."
            )


@dataclass(frozen=True)
class SimulateConfig:
    """What --dry-run --simulate runs, and the ceilings of its roofline."""

    ranks: str | None = None
    """Ranks to simulate, as 0,4,7. Default: rank 0 and, with pipeline stages, the first ranks of
    the middle and the last stage."""

    compare: bool = False
    """Also compare the collectives of the ranks with each other: all ranks of up to 16, of more
    those of the first two and the last copy of the model."""

    processes: int = 1
    """Ranks that are simulated at a time, each on one core."""

    out: str | None = None
    """File for all that was found, as JSON."""

    matmul_tflops: float = 650.0
    """Ceiling of bf16 matrix products in TFLOP/s; FP8 counts twice."""

    memory_tbs: float = 2.6
    """Ceiling of the GPU's memory in TB/s."""

    nvlink_gbs: float = 350.0
    """Ceiling of the links inside a node in GB/s and direction, per GPU."""

    network_gbs: float = 45.0
    """Ceiling of the network between nodes in GB/s and direction, per GPU."""

    launch_us: float = 4.0
    """Microseconds that the host needs to launch a kernel."""

    def validate(self) -> None:
        """Check the values.

        Raises:
            UserError: naming the flag.
        """
        if self.ranks is not None and not re.fullmatch(r"\d+(,\d+)*", self.ranks):
            raise UserError(f"--simulate-ranks {self.ranks}: give rank numbers, as 0,4,7.")
        if self.processes < 1:
            raise UserError(f"--simulate-processes {self.processes} must be at least 1.")
        for name in ("matmul_tflops", "memory_tbs", "nvlink_gbs", "network_gbs", "launch_us"):
            value = getattr(self, name)
            if not 0.0 < value < math.inf:
                flag = name.replace("_", "-")
                raise UserError(f"--simulate-{flag} {value} must be a positive number.")


@dataclass(frozen=True)
class DiffusionConfig:
    """The masked-diffusion model and its training noise; stored in checkpoints."""

    preset: str | None = None
    """Model preset (tiny, llada_8b, dream_7b, sdar_8b, ...): the Megatron flags of that shape."""

    mask_token_id: int | None = None
    """Token id of the mask. Default: the tokenizer's mask token."""

    logit_shift: bool = False
    """Predict position i from the hidden state at i-1 (Dream); position 0 is never masked."""

    stop_token_ids: list[int] | None = field(default=None, metadata=_OPTIONAL_INTS)
    """Token ids that end a completion. Default: the tokenizer's end of sequence and of turn."""

    attention_mask: Literal["full", "block-causal", "context-causal"] | None = None
    """What positions see: all others; their block and earlier ones (SDAR); or finished tokens one
    by one, too (NBDiff). Default: the checkpoint's, or full. See docs/blocks.md."""

    block_size: int | None = None
    """Tokens of a block, counted from the first one of the prompt."""

    block_growth_to: int | None = None
    """Pre-training and fine-tuning: blocks grow from --block-size to so many tokens during the run,
    by --block-growth-factor every --block-growth-interval steps (NBDiff: from 1 to 32). A
    checkpoint keeps the size that its last step had. Default: they stay as they are."""

    block_growth_factor: int = 2
    """How many times as large each growth makes the blocks."""

    block_growth_interval: int | None = None
    """Steps from one growth to the next."""

    block_growth_start: int = 0
    """Steps before the first of these intervals begins."""

    next_token_weight: float = 0.0
    """With context-causal, weight of the next-token loss on the clean tokens (NBDiff 0.5)."""

    forward_process: Literal["bernoulli", "exact_count"] = "bernoulli"
    """Training noise: each token masked with probability p (weight 1/p), or exactly l of L tokens
    masked (weight L/l)."""

    mask_epsilon: float = 1e-3
    """Smallest masking probability of the bernoulli process."""

    random_length_probability: float = 0.01
    """Share of pre-training samples that are cut to a random length (tail masked out)."""

    padding_embedding: Literal["train", "freeze"] = "train"
    """Whether the padding token's row of the embedding is trained. freeze: looking it up gives no
    gradient, as in Dream's published code, whose padding token is its end of text
    (docs/conversion.md)."""

    head_chunk: int | None = None
    """Rows of the output head whose logits stand at a time, where those of a micro-batch do not
    fit; the backward pass computes them again. Default: all of them."""

    def validate(self) -> None:
        """Check the values.

        Raises:
            UserError: naming the flag.
        """
        if self.head_chunk is not None and self.head_chunk < 1:
            raise UserError(f"--head-chunk {self.head_chunk} must be at least 1 row.")
        if not 0.0 < self.mask_epsilon < 1.0:
            raise UserError(
                f"--mask-epsilon {self.mask_epsilon} must lie between 0 and 1; use 1e-3."
            )
        if not 0.0 <= self.random_length_probability <= 1.0:
            raise UserError(
                f"--random-length-probability {self.random_length_probability} is no probability; "
                "use 0.01."
            )
        self._validate_blocks()

    def _validate_blocks(self) -> None:
        in_blocks = self.attention_mask not in (None, "full")
        if in_blocks and self.block_size is None:
            raise UserError(
                f"--attention-mask {self.attention_mask} needs --block-size, the tokens of a "
                "block; pass it (SDAR 4)."
            )
        if self.block_size is not None and self.block_size < 1:
            raise UserError(f"--block-size {self.block_size} must be at least 1.")
        if self.block_size is not None and not in_blocks:
            raise UserError(
                f"--block-size {self.block_size} has no effect without --attention-mask "
                "block-causal or context-causal; pass one or leave it out."
            )
        self._validate_growth(in_blocks)
        if not 0.0 <= self.next_token_weight < math.inf:
            raise UserError(
                f"--next-token-weight {self.next_token_weight} must not be negative; use 0.5."
            )
        if self.next_token_weight and self.attention_mask != "context-causal":
            raise UserError(
                f"--next-token-weight {self.next_token_weight} has no effect without "
                "--attention-mask context-causal: other clean tokens see those they would predict."
            )

    def _validate_growth(self, in_blocks: bool) -> None:
        if self.block_growth_to is None:
            if self.block_growth_interval is not None or self.block_growth_start:
                raise UserError(
                    "--block-growth-interval and --block-growth-start have no effect without "
                    "--block-growth-to; pass it or leave them out."
                )
            return
        if not in_blocks or self.block_size is None:
            raise UserError(
                f"--block-growth-to {self.block_growth_to} has no effect without --attention-mask "
                "block-causal or context-causal; pass one or leave it out."
            )
        if self.block_growth_to < self.block_size:
            raise UserError(
                f"--block-growth-to {self.block_growth_to} is below --block-size "
                f"{self.block_size}, from which blocks grow; change one of them."
            )
        if self.block_growth_interval is None or self.block_growth_interval < 1:
            raise UserError(
                f"--block-growth-to {self.block_growth_to} needs --block-growth-interval, the "
                "steps from one growth to the next; pass at least 1."
            )
        if self.block_growth_factor < 2 or self.block_growth_start < 0:
            raise UserError(
                f"--block-growth-factor {self.block_growth_factor} must be at least 2, and "
                f"--block-growth-start {self.block_growth_start} not negative."
            )


SpelledTokens = Literal["refuse", "text", "keep"]


@dataclass(frozen=True)
class PromptConfig:
    """How prompts become tokens."""

    special_tokens: SpelledTokens = "refuse"
    """What to do with a special token that a prompt spells: refuse it; text takes it as ordinary
    text; keep takes it as the token, the mask token excepted. Of chat messages that is any special
    token, of plain text the mask token and the stop tokens."""


@dataclass(frozen=True)
class LoraConfig:
    """LoRA adapters (arXiv 2106.09685): train low-rank updates of a base that stays as it is."""

    rank: int | None = None
    """Rank of the adapters. Default: none; all weights are trained."""

    alpha: float | None = None
    """The update is scaled by alpha / rank. Default: the rank, a scale of 1."""

    targets: list[str] | None = field(default=None, metadata=_STRINGS)
    """Projections to adapt, by PEFT's names: q_proj k_proj v_proj o_proj gate_proj up_proj
    down_proj lm_head, LLaDA's attn_out ff_proj ff_out among them, or all-linear. Default:
    all-linear, which is all but the output head (lm_head)."""

    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (rank-stabilized, arXiv 2312.03732)."""

    base: str | None = None
    """Checkpoint of the weights under the adapters. Default: --pretrained-checkpoint, or what the
    checkpoint of adapters in --load or --pretrained-checkpoint names."""

    def validate(self) -> None:
        """Check the values.

        Raises:
            UserError: naming the flag.
        """
        if self.rank is None:
            for name in ("alpha", "targets", "base"):
                if getattr(self, name) is not None:
                    raise UserError(f"--lora-{name} has no effect without --lora-rank.")
            if self.rslora:
                raise UserError("--lora-rslora has no effect without --lora-rank.")
            return
        if self.rank < 1:
            raise UserError(f"--lora-rank {self.rank} must be at least 1.")
        if self.alpha is not None and not 0.0 < self.alpha < math.inf:
            raise UserError(f"--lora-alpha {self.alpha} must be a positive number.")

    @property
    def scale(self) -> float:
        """Factor of the update."""
        assert self.rank is not None
        alpha = float(self.rank) if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True)
class SftConfig:
    """Supervised fine-tuning data."""

    train_data: str | None = None
    """JSONL of {"prompt", "completion"} or {"messages"} to train on."""

    valid_data: str | None = None
    """JSONL of the same form to validate on."""

    completion_length: int | None = None
    """Tokens of every completion, end-of-sequence padding included (it is predicted, too).
    Default: see --sft-longest-of."""

    longest_of: int = 2
    """Without --sft-completion-length: fill an example up with end-of-sequence tokens to the
    longest of so many, itself and others drawn at random, as LLaDA fills a mini-batch of that size.
    1 leaves each as long as it is; 0 fills all up to --seq-length."""

    skip_long: bool = False
    """Leave out examples that do not fit instead of stopping; their number is printed."""

    epochs: float = 0.0
    """Times to see each example, in place of --train-iters. The last step is filled up with
    examples of the next epoch. 0: as many steps as --train-iters says."""

    def validate(self) -> None:
        """Check the values.

        Raises:
            UserError: naming the flag.
        """
        if self.longest_of < 0:
            raise UserError(
                f"--sft-longest-of {self.longest_of} must be a number of examples, or 0 for rows "
                "that are all as long as --seq-length."
            )
        if not 0.0 <= self.epochs < math.inf:
            raise UserError(f"--sft-epochs {self.epochs} must be a positive number.")
        if self.epochs and self.train_data is None:
            raise UserError("--sft-epochs counts the examples of --sft-train-data; pass it.")


@dataclass(frozen=True)
class DpoConfig:
    """Preference optimization of pairs: DPO with VRPO's ELBO estimates (arXiv 2505.19223)."""

    train_data: str | None = None
    """JSONL of {"prompt", "chosen", "rejected"} to train on: texts, or chat messages."""

    eval_data: str | None = None
    """JSONL of held-out pairs of the same form: their loss and accuracy before the run, every
    --eval-interval steps and after it."""

    eval_samples: int = 0
    """Held-out pairs per evaluation, the first ones of the file; 0 takes all."""

    beta: float = 0.2
    """Scale of the log-ratios to the reference in the loss: a larger one holds the policy closer
    to it."""

    num_mc: int = 8
    """Monte-Carlo draws per ELBO, each a time step with one mask (VRPO's budget n)."""

    elbo_estimator: Literal["coupled", "exact_count", "bernoulli"] = "exact_count"
    """Forward process behind the ELBO; a coupled draw is a pair of complementary masks."""

    gradient: Literal["auto", "joint", "two_pass"] = "auto"
    """joint: all views of a pair in one micro-batch, one pass. two_pass: a pass without gradients,
    then a backward pass view by view; memory does not grow with the draws. auto: joint where
    --micro-batch-size is a multiple of a pair's views, which is its default."""

    completion_length: int | None = None
    """Tokens of every completion, filled up with end-of-sequence tokens that are part of it.
    Default: each is as long as it is, with one end of sequence."""

    skip_long: bool = False
    """Leave out pairs that do not fit instead of stopping; their number is printed."""

    epochs: float = 0.0
    """Times to see each pair, in place of --train-iters. The last step is filled up with pairs of
    the next epoch. 0: as many steps as --train-iters says."""

    def validate(self) -> None:
        """Check the values.

        Raises:
            UserError: naming the flag.
        """
        if not 0.0 < self.beta < math.inf:
            raise UserError(f"--dpo-beta {self.beta} must be a positive number.")
        if self.num_mc < 1:
            raise UserError(f"--dpo-num-mc {self.num_mc} must be at least 1.")
        if self.eval_samples < 0:
            raise UserError(f"--dpo-eval-samples {self.eval_samples} must be 0 or more.")
        if not 0.0 <= self.epochs < math.inf:
            raise UserError(f"--dpo-epochs {self.epochs} must be a positive number.")
        if self.completion_length is not None and self.completion_length < 1:
            raise UserError(
                f"--dpo-completion-length {self.completion_length} must be at least 1 token."
            )

    @property
    def views_per_completion(self) -> int:
        """Model rows behind one ELBO."""
        return self.num_mc * (2 if self.elbo_estimator == "coupled" else 1)


@dataclass(frozen=True)
class MonitorConfig:
    """What a run reports."""

    peak_tflops: float | None = None
    """Peak of one device in TFLOP/s, against which MFU is measured. Default: from a table by the
    GPU's name (monitor/throughput.py); unknown devices, CPUs and float32 get no MFU."""

    def validate(self) -> None:
        """Check the values.

        Raises:
            UserError: naming the flag.
        """
        if self.peak_tflops is not None and not 0.0 < self.peak_tflops < math.inf:
            raise UserError(
                f"--monitor-peak-tflops {self.peak_tflops} is no speed; give a device's peak in "
                "TFLOP/s or leave it out."
            )


@dataclass(frozen=True)
class CheckpointConfig:
    """Which checkpoints of a run stay."""

    keep_last: int = 0
    """Newest checkpoints that stay; older ones are removed after each save, apart from multiples of
    --save-retain-interval and the best. 0 keeps all, or just one with --save-retain-interval."""

    keep_best: bool = False
    """ESPO: save after each evaluation with the highest held-out accuracy so far, and keep that
    checkpoint; SAVE/best_checkpoint.json names it."""

    def validate(self) -> None:
        """Check the values.

        Raises:
            UserError: naming the flag.
        """
        if self.keep_last < 0:
            raise UserError(
                f"--save-keep-last {self.keep_last} must be a number of checkpoints, or 0 for all."
            )


@dataclass(frozen=True)
class EspoConfig:
    """ESPO: ELBO-based sequence-level policy optimization (arXiv 2512.03759)."""

    objective: str = "espo"
    """Objective: espo, token_elbo, mean_field, diffu_grpo, coupled_grpo, wd1, gdsd, spg, rspo,
    bridge, gdpo, stable_drl, bgpo, just_grpo, block_just_grpo, or your own: FILE.py or
    my_module.my_objective (docs/objectives.md)."""

    objective_args: list[str] | None = field(default=None, metadata=_STRINGS)
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
