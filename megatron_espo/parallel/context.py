"""Rows that context-parallel ranks hold, collected on all of them."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _JoinContext(torch.autograd.Function):
    """Gives every context-parallel rank the rows that the others hold.

    All ranks then compute the same loss. Megatron averages gradients over them, which suits what
    they compute alike; where each contributes its own positions the sum is wanted, so that the
    gradient is multiplied by their number on its way back.
    """

    @staticmethod
    def forward(
        ctx: Any, held: Tensor, index: Tensor, num_rows: int, group: dist.ProcessGroup
    ) -> Tensor:
        ctx.save_for_backward(index)
        ctx.size = group.size()
        joined = held.new_zeros(num_rows, *held.shape[1:])
        joined[index] = held
        dist.all_reduce(joined, group=group)
        return joined

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (index,) = ctx.saved_tensors
        return gradient.index_select(0, index) * ctx.size, None, None, None


def join_context(held: Tensor, index: Tensor, num_rows: int, group: dist.ProcessGroup) -> Tensor:
    """Collect rows from the context-parallel ranks.

    Args:
        held: ``[k, ...]``, the rows of this rank.
        index: int64 ``[k]``, their places among all rows; each row is held by one rank.
        num_rows: r, all rows.
        group: context-parallel group.

    Returns:
        ``[r, ...]``, the same on every rank; carries the gradient, multiplied by the group's size.
    """
    joined: Tensor = _JoinContext.apply(held, index, num_rows, group)
    return joined
