"""What is computed from the logits of masked positions."""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_espo.parallel.vocab import cross_entropy
from megatron_espo.passes.batch import MaskedTargets


def masked_cross_entropy(
    logits: Tensor, payload: MaskedTargets, *, tp_group: dist.ProcessGroup
) -> Tensor:
    """Compute the cross entropy at the masked positions of a micro-batch.

    Args:
        logits: float ``[r, n]``, this rank's part of the vocabulary; used up.
        payload: which tokens they predict; on the device of the logits.
        tp_group: tensor-parallel group.

    Returns:
        float32 ``[R, c]``, zero where nothing is masked; carries the gradient.
    """
    losses = cross_entropy(logits, payload.targets, payload.vocab_size, tp_group)
    if payload.is_dummy:
        losses = losses * 0.0
    table = losses.new_zeros(payload.num_rows, payload.num_columns)
    # Each place is written once, so the sums over the table do not depend on an order of adding.
    return torch.index_put(table, (payload.rows, payload.columns), losses)
