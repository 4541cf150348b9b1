"""Cross entropy over a vocabulary that is split over tensor-parallel ranks.

Megatron's version writes a softmax over the logits in the forward pass, which takes some ten visits
to a tensor that no cache holds, and asks the other ranks three times. Here the forward pass only
reads the logits, block by block, the ranks exchange three numbers for each row, and the backward
pass writes the gradient over the logits in one visit.

Symbols: r rows, n vocabulary entries of this rank.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_espo.parallel.layout import stack_over_ranks

# Entries of a block: on CPUs what stays in a cache, elsewhere what is worth a few launches.
BLOCK_ON_CPU, BLOCK = 2**20, 2**23


def block_rows(logits: Tensor) -> int:
    """Say how many rows are worked on at a time."""
    entries = BLOCK_ON_CPU if logits.is_cpu else BLOCK
    return max(entries // logits.size(1), 1)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, start: int, group: dist.ProcessGroup
    ) -> Tensor:
        places = targets - start
        own = (places >= 0) & (places < logits.size(1))
        places = places.clamp(0, logits.size(1) - 1)
        chosen = logits.gather(1, places[:, None])[:, 0].masked_fill_(~own, 0.0)
        tops, masses = [], []
        for block in logits.split(block_rows(logits)):
            # A shard of padding alone: its weights become 0, not NaN.
            top = block.amax(dim=1).clamp_(min=torch.finfo(torch.float32).min)
            tops.append(top)
            masses.append((block - top[:, None]).exp_().sum(dim=1))
        mine = torch.stack((torch.cat(tops), torch.cat(masses), chosen)).double()
        each_top, each_mass, each_chosen = stack_over_ranks(mine, group).unbind(1)
        top = each_top.amax(dim=0)
        mass = (each_mass * (each_top - top).exp()).sum(dim=0)
        ctx.save_for_backward(logits, places, own, top, mass)
        return (mass.log() + (top - each_chosen.sum(dim=0))).float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        logits, places, own, top, mass = ctx.saved_tensors
        top, factor = top.float(), (gradient / mass).float()
        rows = block_rows(logits)
        for block, largest, share in zip(
            logits.split(rows), top.split(rows), factor.split(rows), strict=True
        ):
            block.sub_(largest[:, None]).exp_().mul_(share[:, None])
        logits[torch.arange(len(logits), device=logits.device), places] -= gradient * own
        return logits, None, None, None


def sharded_cross_entropy(
    logits: Tensor, targets: Tensor, start: int, group: dist.ProcessGroup
) -> Tensor:
    """Compute -log softmax at the targets.

    Args:
        logits: float32 ``[r, n]``, -inf where there is no token; overwritten by its gradient.
        targets: int64 ``[r]``, global token ids.
        start: this shard's first token.
        group: tensor-parallel group.

    Returns:
        float32 ``[r]``, the same on all ranks, with gradient to ``logits``.
    """
    losses: Tensor = _CrossEntropy.apply(logits, targets, start, group)
    return losses
