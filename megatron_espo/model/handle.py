"""A built model together with what sampling and likelihoods must know of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_espo.parallel.layout import Layout
from megatron_espo.passes.block_mask import BlockAttention
from megatron_espo.passes.shapes import Shapes


@dataclass(frozen=True)
class DiffusionModel:
    """A masked-diffusion model on this rank.

    Attributes:
        chunks: this rank's model chunks, as Megatron built and wrapped them.
        mask_token_id: the mask token.
        pad_token_id: fills right padding, which attention does not see.
        stop_token_ids: tokens that end a completion.
        eos_token_id: end of sequence, which fills a completion after its end.
        vocab_size: tokens before padding.
        logit_shift: whether position i is predicted from the hidden state at i - 1 (Dream).
        pad_multiple: rows are padded to a multiple of this many positions.
        device: where the model computes.
        layout: process groups.
        widths: the widths that micro-batches may have (see passes/shapes.py); empty: every multiple
            of ``pad_multiple``.
        blocks: how the model attends whose tokens come block by block; None where every position
            sees every other.
    """

    chunks: Sequence[Any]
    mask_token_id: int
    pad_token_id: int
    stop_token_ids: tuple[int, ...]
    eos_token_id: int
    vocab_size: int
    logit_shift: bool
    pad_multiple: int
    device: torch.device
    layout: Layout
    widths: tuple[int, ...] = ()
    blocks: BlockAttention | None = None

    @property
    def shapes(self) -> Shapes:
        """The shapes that micro-batches may have."""
        return Shapes(self.pad_multiple, self.widths)
