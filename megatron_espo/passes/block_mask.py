"""What tokens that come block by block see of each other: plain rows, and noisy ones before clean.

A block-diffusion model (BD3-LM, arXiv 2503.09573) makes a completion block by block: inside the
open block every position sees every other, and all of it sees what came before. Blocks are counted
from position 0 of prompt and completion, so that the prompt's last tokens may lie in the first
block that is opened.

For training, all blocks are open at once: rows hold noisy copies of a sequence and then the clean
one, ``[x_t1 .. x_tK, x_0]``, each with the positions of the sequence. A noisy token sees the noisy
tokens of its copy and block, and the clean ones of earlier blocks; nothing sees noisy tokens of
another copy. Clean tokens see clean ones: block-causal, those up to the end of their block (LLaDA2,
SDAR); context-causal, those up to themselves (NBDiff, arXiv 2512.06776). The state of a noisy token
is then that of a pass over the clean tokens before its block and the noisy block alone.

Symbols: b rows, L positions of a sequence, K noisy copies, s = (K + 1) L places of a row.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_espo.config import DiffusionConfig
from megatron_espo.passes.shapes import round_up

# Positions whose queries attend in one call, to no key after them.
_SEGMENT = 256


@dataclass(frozen=True)
class BlockAttention:
    """How the rows of a pass attend.

    Attributes:
        size: tokens of a block.
        causal: whether clean tokens see no later one; else they see their whole block.
        copies: K, noisy copies that stand before the clean tokens; 0: clean tokens alone.
    """

    size: int
    causal: bool
    copies: int = 0

    def with_copies(self, copies: int) -> "BlockAttention":
        """Return the same attention for rows of so many noisy copies and a clean one."""
        return replace(self, copies=copies)

    def hidden(self, padding: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Build Megatron's attention mask.

        Args:
            padding: bool ``[b or 1, 1, 1, L]``, True at positions that nothing sees.
            start: first place whose queries are asked for.
            stop: the place after the last one; None for s.

        Returns:
            bool ``[b or 1, 1, stop - start, s]`` on its device, True where attention must not look.
            A row whose position 0 is no padding has a place to look at in every query.
        """
        length = padding.size(-1)
        places = torch.arange((self.copies + 1) * length, device=padding.device)
        seen = self.sees(places[start:stop, None], places, length)
        return ~seen[None, None] | padding.repeat(1, 1, 1, self.copies + 1)

    def sees(self, query: Tensor, key: Tensor, length: int) -> Tensor:
        """Say whether places of a row see others, padding aside.

        Args:
            query: int64, places.
            key: int64, places; shapes that go together.
            length: L.

        Returns:
            bool.
        """
        copy, position = key // length, key % length
        own_copy, own_position = query // length, query % length
        block, own_block = position // self.size, own_position // self.size
        seen = (own_copy == copy) & (own_block == block)
        seen = seen | (copy == self.copies) & (own_block > block)
        if self.causal:
            seen = seen & ~((own_copy == self.copies) & (position > own_position))
        return seen

    def segments(self, length: int) -> list[tuple[int, int]]:
        """Cut the positions ``length`` of a row into parts that whole blocks lie in.

        Returns:
            Beginning and end of each; nothing in a part sees a position after it.
        """
        step = round_up(_SEGMENT, self.size)
        return [(start, min(start + step, length)) for start in range(0, length, step)]

    def pairs(self, length: int) -> int:
        """Count the queries of a row of noisy copies and clean tokens, each times its keys.

        Counted are the keys of the calls that compute attention (model/block_attention.py): what is
        masked inside a segment is computed, too.
        """
        return sum(
            (end - start) * (self.copies * (2 * end - start) + end)
            for start, end in self.segments(length)
        )

    def key_limits(self, positions: Tensor, opened: Tensor, ends: Tensor) -> Tensor:
        """Say how far clean tokens and one open block see, where every row has its own.

        Args:
            positions: int64 ``[b or 1, w]``.
            opened: int64 ``[b]``, where the open block of each row starts; what comes before is
                clean. The row's end: all of it is.
            ends: int64 ``[b]``, the position after the open block.

        Returns:
            int64 ``[b, w]``: a position sees the keys before this one. Of positions after the open
            block it means nothing.
        """
        clean = positions + 1 if self.causal else (positions // self.size + 1) * self.size
        is_open = positions >= opened[:, None]
        return torch.where(is_open, ends[:, None], torch.minimum(clean, ends[:, None]))


def block_attention(config: DiffusionConfig) -> BlockAttention | None:
    """Read how a model attends.

    Args:
        config: the model's settings, valid.

    Returns:
        The attention of its blocks; None where every position sees every other.
    """
    if config.attention_mask in (None, "full"):
        return None
    assert config.block_size is not None
    return BlockAttention(config.block_size, config.attention_mask == "context-causal")
