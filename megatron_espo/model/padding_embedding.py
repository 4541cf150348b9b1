"""The padding token's row of the embedding, left as it is."""

from functools import partial
from typing import Any

import torch
from torch import Tensor


def freeze_row(embedding: Any, token: int) -> None:
    """Let looking a token up give its row of the embedding no gradient.

    As torch.nn.Embedding does with ``padding_idx``: weight decay goes on, and with tied embeddings
    the output head still trains the row.

    Args:
        embedding: Megatron's word embeddings, in any layout.
        token: the token.
    """
    embedding.register_forward_hook(partial(_without_gradient, token=token))


def _without_gradient(
    embedding: Any, arguments: tuple[Tensor], output: Tensor, *, token: int
) -> Tensor:
    """Cut the gradient off where the token was looked up.

    Args:
        embedding: the module.
        arguments: int64 ``[b, s]``.
        output: ``[b, s, h]``; under sequence parallelism this rank's part of ``[s, b, h]``.
        token: the token.

    Returns:
        The output.
    """
    frozen = arguments[0] == token
    if embedding.reduce_scatter_embeddings:
        group = embedding.tp_group
        frozen = frozen.t().chunk(group.size())[group.rank()]
    return torch.where(frozen[..., None], output.detach(), output)
