"""How completions are sampled: the part of config.py that has the most to check."""

import math
from dataclasses import dataclass, replace
from typing import Literal

from megatron_espo.errors import UserError


@dataclass(frozen=True)
class RolloutConfig:
    """How completions are sampled."""

    completion_length: int = 256
    """Tokens generated per completion."""

    block_length: int = 32
    """Tokens per block; blocks are completed from left to right. Must divide the completion
    length."""

    denoising_steps: int = 128
    """Model evaluations per completion, split evenly over the blocks. Not read with
    --rollout-threshold or --rollout-factor."""

    temperature: float = 1.0
    """Sampling temperature; 0 takes the most likely token."""

    remasking: Literal[
        "low_confidence", "random", "origin", "maskgit_plus", "topk_margin", "entropy"
    ] = "low_confidence"
    """Order in which masked tokens are committed: LLaDA's low_confidence and random, Dream's
    origin, maskgit_plus, topk_margin and entropy."""

    guidance_scale: float = 0.0
    """Classifier-free guidance: logits = un + (scale + 1) (cond - un), the prompt masked in un."""

    micro_batch_size: int = 32
    """Completions per model pass."""

    top_p: float = 1.0
    """Nucleus sampling: tokens are drawn from the smallest set of most likely ones whose
    probability, at --rollout-temperature, is at least this. 1 draws from all."""

    top_k: int = 0
    """Tokens are drawn from this many of the most likely ones; 0 draws from all. With
    --rollout-top-p a token must be in both sets."""

    threshold: float | None = None
    """Parallel decoding (Fast-dLLM, arXiv 2505.22618): a step commits the most confident token and
    every other whose confidence is at least this. Above 1: one token per step. Default: off."""

    factor: float | None = None
    """Parallel decoding: a step commits the n most confident tokens, n the largest with
    (n + 1) (1 - confidence of the n-th) < factor, and at least one. Default: off."""

    cache: Literal["none", "prefix", "dual", "exact"] = "none"
    """Reuse keys and values within a block (Fast-dLLM, approximate): prefix computes the block and
    what follows it anew, dual the block alone. Every block starts with a whole pass. exact: keep
    those of finished blocks (models with --attention-mask alone)."""

    cache_refresh_steps: int = 0
    """Denoising steps from one whole pass to the next within a block; 0: only at its start, 1: at
    every step, which is exact."""

    cache_unsure: Literal["refresh", "commit"] = "refresh"
    """What parallel decoding does where a pass over a window of cached rows finds no token that is
    confident enough: refresh commits nothing and makes the row's next pass a whole one; commit
    takes the most confident token, as Fast-dLLM does."""

    early_stop: bool = False
    """End a completion with the first block that holds a stop token; what follows is filled with
    end-of-sequence tokens instead of being sampled."""

    editing_threshold: float | None = None
    """Editing (LLaDA2.1, arXiv 2602.08676): beside what --rollout-threshold commits, a step
    replaces every committed token of the open block for which it draws another one with more than
    this probability; 0.5 and 0.0 are published. Default: off."""

    max_post_steps: int = 16
    """With --rollout-editing-threshold: steps that edit a block once nothing in it is masked, at
    most; one that changes nothing is the last."""

    def validate(
        self,
        logit_shift: bool = False,
        window_multiple: int = 1,
        model_blocks: int | None = None,
    ) -> None:
        """Check the values against each other.

        Args:
            logit_shift: whether the model shifts its logits.
            window_multiple: positions of a pass must be a multiple of this (sequence parallelism,
                FP8).
            model_blocks: tokens of a block of a model whose tokens come block by block.

        Raises:
            UserError: naming the flag.
        """
        length, block = self.completion_length, self.block_length
        if length < 1 or block < 1 or length % block:
            raise UserError(
                f"--rollout-completion-length {self.completion_length} is not a multiple of "
                f"--rollout-block-length {self.block_length}; change one of them."
            )
        blocks = self.completion_length // self.block_length
        if not self.is_parallel:
            self._validate_steps(blocks)
        if not 0.0 <= self.temperature < math.inf:
            raise UserError(
                f"--rollout-temperature {self.temperature} is no temperature; use 0 for greedy "
                "sampling or a positive number."
            )
        self._validate_kept_tokens()
        if not 0.0 <= self.guidance_scale < math.inf:
            raise UserError(
                f"--rollout-guidance-scale {self.guidance_scale} must be 0 (none) or positive."
            )
        if self.guidance_scale > 0.0 and logit_shift:
            raise UserError(
                "--rollout-guidance-scale masks the prompt, whose first token a model with "
                "--logit-shift never saw masked; use 0."
            )
        if self.micro_batch_size < 1:
            raise UserError("--rollout-micro-batch-size must be at least 1.")
        self._validate_parallel_decoding()
        self._validate_model_blocks(model_blocks)
        self._validate_editing(model_blocks)
        self._validate_cache(logit_shift, window_multiple)

    def _validate_model_blocks(self, size: int | None) -> None:
        if size is None:
            if self.cache == "exact":
                raise UserError(
                    "--rollout-cache exact needs a model whose tokens come block by block "
                    "(--attention-mask block-causal or context-causal); use prefix or dual."
                )
            return
        if self.block_length != size:
            raise UserError(
                f"--rollout-block-length {self.block_length}: the model's blocks have {size} "
                f"tokens; use {size}, or another --block-size."
            )
        if self.cache in ("prefix", "dual"):
            raise UserError(
                f"--rollout-cache {self.cache} is for models with full attention; use exact."
            )
        if self.guidance_scale > 0.0:
            raise UserError(
                f"--rollout-guidance-scale {self.guidance_scale}: no such pass was written for "
                "models whose tokens come block by block; use 0."
            )

    def _validate_kept_tokens(self) -> None:
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(
                f"--rollout-top-p {self.top_p} must lie above 0 and be at most 1 (all tokens)."
            )
        if self.top_k < 0:
            raise UserError(f"--rollout-top-k {self.top_k} must be 0 (all tokens) or positive.")
        if self.temperature == 0.0 and self.keeps_likeliest:
            flag = f"--rollout-top-p {self.top_p}" if self.top_p < 1.0 else ""
            flag = flag or f"--rollout-top-k {self.top_k}"
            raise UserError(
                f"{flag} has no effect on greedy sampling, which always takes the most likely "
                "token; set --rollout-temperature above 0, or --rollout-top-p 1 and "
                "--rollout-top-k 0."
            )

    def _validate_steps(self, blocks: int) -> None:
        if self.denoising_steps < blocks or self.denoising_steps % blocks:
            raise UserError(
                f"--rollout-denoising-steps {self.denoising_steps} cannot be split evenly over "
                f"{blocks} blocks; use a multiple of {blocks}."
            )
        if self.denoising_steps > self.completion_length:
            raise UserError(
                f"--rollout-denoising-steps {self.denoising_steps} exceeds "
                f"--rollout-completion-length {self.completion_length}; a step commits at least "
                "one token."
            )

    def _validate_parallel_decoding(self) -> None:
        if not self.is_parallel:
            return
        flag = "--rollout-factor" if self.threshold is None else "--rollout-threshold"
        value = self.factor if self.threshold is None else self.threshold
        if self.threshold is not None and self.factor is not None:
            raise UserError(
                "--rollout-threshold and --rollout-factor both say how many tokens a step commits; "
                "pass one of them."
            )
        if value is None or not 0.0 < value < math.inf:
            raise UserError(f"{flag} {value} must be a positive number; leave it out for none.")
        if self.remasking not in ("low_confidence", "maskgit_plus"):
            raise UserError(
                f"{flag} compares probabilities of tokens, by which --rollout-remasking "
                f"{self.remasking} does not rank; use low_confidence or maskgit_plus."
            )

    def _validate_editing(self, model_blocks: int | None) -> None:
        value = self.editing_threshold
        if value is None:
            if self.max_post_steps != RolloutConfig.max_post_steps:
                raise UserError(
                    f"--rollout-max-post-steps {self.max_post_steps} has no effect without "
                    "--rollout-editing-threshold."
                )
            return
        if not 0.0 <= value < 1.0:
            raise UserError(
                f"--rollout-editing-threshold {value} must be at least 0 and below 1, a "
                "probability that an edit exceeds; leave it out for none."
            )
        if self.max_post_steps < 0:
            raise UserError(
                f"--rollout-max-post-steps {self.max_post_steps} must be 0 (a block ends with its "
                "last mask) or positive."
            )
        if self.threshold is None:
            raise UserError(
                f"--rollout-editing-threshold {value} goes with --rollout-threshold alone: pass "
                "one (0.7 and 0.5 are published)."
            )
        if model_blocks is None:
            raise UserError(
                f"--rollout-editing-threshold {value} edits the open block of a model whose "
                "tokens come block by block (--attention-mask block-causal or context-causal); "
                "leave it out."
            )

    def _validate_cache(self, logit_shift: bool, window_multiple: int) -> None:
        if self.cache_refresh_steps < 0:
            raise UserError(
                f"--rollout-cache-refresh-steps {self.cache_refresh_steps} must be 0 (at the start "
                "of a block only) or positive."
            )
        if self.cache == "none" and self.cache_refresh_steps:
            raise UserError(
                "--rollout-cache-refresh-steps has no effect without --rollout-cache prefix or "
                "dual."
            )
        if self.cache_unsure == "commit" and (self.cache == "none" or not self.is_parallel):
            raise UserError(
                "--rollout-cache-unsure commit has no effect without --rollout-cache prefix or "
                "dual and --rollout-threshold or --rollout-factor."
            )
        if self.cache == "none":
            return
        if self.guidance_scale > 0.0:
            raise UserError(
                f"--rollout-cache {self.cache} keeps no cache of the branch without the prompt; "
                "use --rollout-guidance-scale 0."
            )
        if self.remasking == "origin":
            raise UserError(
                f"--rollout-cache {self.cache} fills caches at a block's first step, which "
                "--rollout-remasking origin may leave out; use another order."
            )
        window = self.block_length + int(logit_shift)
        if window % window_multiple or (
            self.cache == "prefix" and self.block_length % window_multiple
        ):
            raise UserError(
                f"--rollout-cache {self.cache} passes {window} positions of a block"
                f"{' (one before it, for --logit-shift)' if logit_shift else ''}, which this "
                f"layout (--sequence-parallel, FP8) wants in multiples of {window_multiple}; "
                f"change --rollout-block-length {self.block_length} or leave them out."
            )

    @property
    def keeps_likeliest(self) -> bool:
        """Whether tokens are drawn from the most likely ones only."""
        return self.top_p < 1.0 or self.top_k > 0

    def greedy(self) -> "RolloutConfig":
        """Return these settings at temperature 0, where top-p and top-k have no meaning."""
        return replace(self, temperature=0.0, top_p=1.0, top_k=0)

    @property
    def is_parallel(self) -> bool:
        """Whether confidence decides how many tokens a step commits."""
        return self.threshold is not None or self.factor is not None

    @property
    def is_editing(self) -> bool:
        """Whether steps replace committed tokens."""
        return self.editing_threshold is not None

    @property
    def steps_per_block(self) -> int:
        """Denoising steps of one block, at most; those that edit alone are left out."""
        if self.is_parallel:
            return self.block_length
        return self.denoising_steps // (self.completion_length // self.block_length)
