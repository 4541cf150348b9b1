"""Views of completions that come block by block; see objectives/masks.py.

Symbols: b completions, m draws, l completion length.
"""

from dataclasses import dataclass

import torch

from megatron_espo.diffusion.block_noise import block_elbo_views
from megatron_espo.diffusion.noise import ElboViews
from megatron_espo.objectives.masks import Ask, Masks


@dataclass(frozen=True)
class StratifiedBlocks(Masks):
    """The views of a block ELBO whose levels are spread over draws and blocks together.

    Each block of T tokens masks c ~ U{1..T} of them, with weights T / c. Tokens after the end of
    sequence are no part of the completion: they are masked, and not predicted.
    """

    per_draw, by_block, only_blocks = 1, True, True

    def masked(self, length: int) -> float:
        """See Masks; with blocks as long as the completion."""
        return (length + 1) / 2

    def draw(self, ask: Ask) -> ElboViews:
        """See Masks."""
        assert ask.offsets is not None
        views = block_elbo_views(
            "exact_count",
            ask.key,
            ask.sample_ids,
            ask.offsets,
            ask.length,
            ask.num_draws,
            ask.block_length,
            lengths=ask.answers,
            over_blocks=True,
        )
        after = torch.arange(ask.length) >= ask.answers[:, None, None, None]
        predicted = views.mask_indices
        return views._replace(mask_indices=predicted | after, predicted=predicted)
