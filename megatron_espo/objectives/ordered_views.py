"""Views in an order of a completion's tokens: each predicts some and masks all that come later.

Together they predict every token once, which are the factors of a likelihood in that order.

Symbols: b completions, v views per draw, l completion length.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_espo.diffusion.noise import ElboViews
from megatron_espo.objectives.masks import Ask, Masks


@dataclass(frozen=True)
class OrderedViews(Masks):
    """Views that a number of each token tells, the same for all draws, with weights 1.

    Attributes:
        passes: v; a setting of the objective, which its ``fitted`` settles.
    """

    passes: int = 0
    fixed = True

    @property
    def per_draw(self) -> int:  # type: ignore[override]
        """See Masks."""
        return self.passes

    def masked(self, length: int) -> float:
        """See Masks."""
        return length

    def number(self, ask: Ask) -> Tensor:
        """Say which view predicts each token.

        Args:
            ask: says whose views.

        Returns:
            int64 ``[b, l]`` or ``[1, l]``, from 0; v for a token that none predicts and all mask.
        """
        raise NotImplementedError

    def draw(self, ask: Ask) -> ElboViews:
        """See Masks."""
        number = self.number(ask)[:, None, None]
        level = torch.arange(self.passes)[:, None]
        shape = (len(ask.sample_ids), ask.num_draws, self.passes, ask.length)
        masks, predicted = number >= level, number == level
        views = ElboViews(
            masks.expand(shape).clone(),
            torch.ones(shape[:3]),
            predicted=predicted.expand(shape).clone(),
        )
        return views if ask.offsets is None else views._replace(token_weights=torch.ones(shape))


@dataclass(frozen=True)
class Prefixes(OrderedViews):
    """One view for each token: it and all after it masked, it alone predicted."""

    def number(self, ask: Ask) -> Tensor:
        """See OrderedViews."""
        assert self.passes == ask.length, "--espo-objective-args passes"
        return torch.arange(ask.length)[None]


@dataclass(frozen=True)
class BlockPrefixes(OrderedViews):
    """One view for each place in a block: it and all after it masked in every block.

    Each view predicts that place of every block.
    """

    by_block, only_blocks = True, True

    def number(self, ask: Ask) -> Tensor:
        """See OrderedViews."""
        assert ask.offsets is not None
        return (ask.offsets[:, None] + torch.arange(ask.length)) % self.passes
