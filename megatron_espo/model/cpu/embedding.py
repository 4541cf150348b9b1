"""Megatron's embedding whose gradient, on CPUs, visits only the rows of tokens that occurred.

The gradient of a lookup is a tensor as large as the embedding, nearly all of it zeros, which
Megatron's hook adds to the gradient buffer: with a large vocabulary that takes longer than a layer.

Symbols: b rows, s positions, h hidden size, n vocabulary.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel import VocabParallelEmbedding
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_espo.model.cpu import matmul
from megatron_espo.model.weight_gradients import has_buffer, mark_added


class RowwiseEmbedding(VocabParallelEmbedding):
    """Megatron's layer that adds the gradient of each token to the buffer."""

    def forward(self, input_: Tensor) -> Tensor:
        """Look tokens up; see Megatron's layer.

        Args:
            input_: int64 ``[b, s]``.

        Returns:
            ``[b, s, h]``, or as Megatron's layer gives it under sequence parallelism.
        """
        plain = (
            self.tp_group.size() == 1
            and self.gtp_remat_size == 1
            and not self.reduce_scatter_embeddings
            and self.weight.requires_grad
            and torch.is_grad_enabled()
            and matmul.is_handled(self.weight)
            and has_buffer(self.weight)
        )
        output: Tensor
        output = _Lookup.apply(input_, self.weight) if plain else super().forward(input_)
        return output


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(tokens, weight)
        return torch.nn.functional.embedding(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        tokens, weight = ctx.saved_tensors
        # One token after the other, in order, on one thread: the same sum each time.
        weight.main_grad.index_add_(0, tokens.flatten(), gradient.flatten(0, -2))
        return None, mark_added(weight)
