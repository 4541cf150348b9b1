"""Weight gradients that go to Megatron's gradient buffer without a copy of their own.

Megatron's column-parallel layer, which the output head is, refuses to fuse without an extension of
apex. Transformer Engine's layers bring the kernels they need, and the head's product is made here;
so are those of all layers in float32 on CPUs (model/cpu/).

Symbols: r rows, h hidden size, n vocabulary entries of this rank.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

# Rows of a weight whose float32 gradient is held at a time; fewer where the CPU's caches count.
_BLOCK, _BLOCK_ON_CPU = 4096, 2048


@contextlib.contextmanager
def built_unfused(config: TransformerConfig, unfused: bool) -> Iterator[None]:
    """Let Megatron build a model that it would refuse to build with fused weight gradients.

    Args:
        config: the model's transformer config; as before after the context.
        unfused: whether to do anything.
    """
    fused = config.gradient_accumulation_fusion
    config.gradient_accumulation_fusion = fused and not unfused
    try:
        yield
    finally:
        config.gradient_accumulation_fusion = fused


def fuse_layers(block: torch.nn.Module) -> None:
    """Let Transformer Engine's linear layers add their weight gradients to the buffer.

    In FP8 they overwrite the buffer in the first micro-batch of a call of Megatron's schedule: an
    optimizer step's gradient must come from one call.

    Args:
        block: layers that were built without; those of other kinds are left alone.
    """
    for module in block.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True  # type: ignore[assignment]


def has_buffer(weight: Tensor) -> bool:
    """Say whether a gradient can be added to a weight's buffer, and only there.

    Args:
        weight: a parameter.

    Returns:
        False outside of Megatron's data-parallel wrapper, and for a weight that is also the
        embedding's: what comes from there would be taken for added.
    """
    return hasattr(weight, "main_grad") and not getattr(weight, "zero_out_wgrad", False)


def add_weight_gradient(
    weight: Tensor,
    gradient: Tensor,
    hidden: Tensor,
    product: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Add the gradient of a product ``hidden @ weight.t()`` to the weight's buffer, in float32.

    Args:
        weight: ``[n, h]``; its ``main_grad`` is added to, and marked as added to.
        gradient: of the product, ``[..., n]`` in the weight's type.
        hidden: ``[..., h]`` in the weight's type.
        product: makes ``a b^T`` of ``[k, r]`` and ``[h, r]`` in the buffer's type; None: PyTorch's.

    Returns:
        ``[n, h]`` for autograd, which Megatron's hook drops: it wants a gradient of each weight to
        know when a bucket is complete. The weight's own memory, so that it takes none.
    """
    gradient, hidden = gradient.flatten(0, -2), hidden.flatten(0, -2)
    buffer: Tensor = weight.main_grad  # type: ignore[attr-defined]
    if gradient.dtype == buffer.dtype and product is None:
        buffer.addmm_(gradient.t(), hidden)
        return mark_added(weight)
    rows = _BLOCK if product is None else _BLOCK_ON_CPU
    for part, place in zip(gradient.split(rows, dim=1), buffer.split(rows), strict=True):
        if product is not None:
            place.add_(product(part.t(), hidden.t()))
        elif part.is_cuda and part.dtype != torch.float32:
            place.add_(torch.mm(part.t(), hidden, out_dtype=torch.float32))
        else:
            place.add_(part.t().float() @ hidden.float())
    return mark_added(weight)


def mark_added(weight: Tensor) -> Tensor:
    """Note that a gradient was added to a weight's buffer.

    Args:
        weight: the parameter.

    Returns:
        What to give to autograd, see :func:`add_weight_gradient`.
    """
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return weight.detach()
