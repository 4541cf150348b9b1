"""What is computed from the logits of masked positions."""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_espo.parallel.vocab import cross_entropy
from megatron_espo.passes.batch import MaskedTargets
from megatron_espo.passes.head import ByRows


def masked_cross_entropy(tp_group: dist.ProcessGroup) -> ByRows:
    """Make the function of the logits at the masked positions of a micro-batch.

    Args:
        tp_group: tensor-parallel group.

    Returns:
        From float logits ``[r, n]``, this rank's part of the vocabulary, used up, and MaskedTargets
        on their device: the cross entropy, float32 ``[R, c]``, zero where nothing is masked;
        carries the gradient.
    """
    return ByRows(partial(_losses, tp_group=tp_group), _targets, _as_table)


def view_cross_entropy(tp_group: dist.ProcessGroup) -> ByRows:
    """Make the function that sums it over each row, each token weighted: float32 ``[R]``."""
    return ByRows(partial(_losses, tp_group=tp_group), _targets, _summed)


def _losses(
    logits: Tensor, targets: Tensor, payload: Any, *, tp_group: dist.ProcessGroup
) -> Tensor:
    return cross_entropy(logits, targets, payload.vocab_size, tp_group)


def _targets(payload: MaskedTargets) -> Tensor:
    return payload.targets


def _as_table(losses: Tensor, payload: MaskedTargets) -> Tensor:
    if payload.is_dummy:
        losses = losses * 0.0
    table = losses.new_zeros(payload.num_rows, payload.num_columns)
    # Each place is written once, so the sums over the table do not depend on an order of adding.
    return torch.index_put(table, (payload.rows, payload.columns), losses)


def _summed(losses: Tensor, payload: MaskedTargets) -> Tensor:
    if payload.weights is not None:
        losses = losses * payload.weights
    return _as_table(losses, payload).sum(dim=1)
