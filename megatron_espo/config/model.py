"""What the model is, and adapters on it."""

import math
from dataclasses import dataclass, field
from typing import Literal

from megatron_espo.config.kinds import OPTIONAL_INTS, STRINGS
from megatron_espo.errors import UserError


@dataclass(frozen=True)
class DiffusionConfig:
    """The masked-diffusion model and its training noise; stored in checkpoints."""

    preset: str | None = None
    """Model preset (tiny, llada_8b, dream_7b, sdar_8b, ...): the Megatron flags of that shape."""

    mask_token_id: int | None = None
    """Token id of the mask. Default: the tokenizer's mask token."""

    logit_shift: bool = False
    """Predict position i from the hidden state at i-1 (Dream); position 0 is never masked."""

    stop_token_ids: list[int] | None = field(default=None, metadata=OPTIONAL_INTS)
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


@dataclass(frozen=True)
class LoraConfig:
    """LoRA adapters (arXiv 2106.09685): train low-rank updates of a base that stays as it is."""

    rank: int | None = None
    """Rank of the adapters. Default: none; all weights are trained."""

    alpha: float | None = None
    """The update is scaled by alpha / rank. Default: the rank, a scale of 1."""

    targets: list[str] | None = field(default=None, metadata=STRINGS)
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
