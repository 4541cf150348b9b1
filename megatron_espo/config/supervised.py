"""Fine-tuning on prompts and answers, and on preferences."""

import math
from dataclasses import dataclass
from typing import Literal

from megatron_espo.errors import UserError

SpelledTokens = Literal["refuse", "text", "keep"]


@dataclass(frozen=True)
class PromptConfig:
    """How prompts become tokens."""

    special_tokens: SpelledTokens = "refuse"
    """What to do with a special token that a prompt spells: refuse it; text takes it as ordinary
    text; keep takes it as the token, the mask token excepted. Of chat messages that is any special
    token, of plain text the mask token and the stop tokens."""


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
