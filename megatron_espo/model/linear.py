"""Megatron's tensor-parallel linear layers with the faster kernels on CPUs."""

from typing import Any

from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    layers,
)
from torch import Tensor

from megatron_espo.parallel import products


def multiply(megatrons: Any, input: Tensor, weight: Tensor, *args: Any, **settings: Any) -> Tensor:
    """Multiply with the CPU's faster kernels, or as Megatron does where they do not apply.

    Args:
        megatrons: Megatron's product of the layer, its ``_forward_impl``.
        input: ``[..., h]``.
        weight: ``[n, h]``, this rank's part.
        *args: further arguments of Megatron's product.
        **settings: the same.

    Returns:
        ``[..., n]``, with gradients to both.
    """
    plain = not args and settings.get("bias") is None and settings.get("gtp_remat_size", 1) == 1
    if not plain or not products.is_handled(input, weight):
        output: Tensor = megatrons(input, weight, *args, **settings)
        return output
    # Collectives of the kinds that Megatron's function makes: gather and reduce-scatter of the
    # sequence, or the sum of the input's gradient.
    if settings["sequence_parallel"]:
        input = gather_from_sequence_parallel_region(input, group=settings["tp_group"])
    elif settings["allreduce_dgrad"]:
        input = copy_to_tensor_model_parallel_region(input, group=settings["tp_group"])
    return products.linear(input, weight)


class ColumnParallelLinear(layers.ColumnParallelLinear):
    """Megatron's layer with the faster kernels on CPUs."""

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **settings: Any) -> Tensor:
        return multiply(super()._forward_impl, input, weight, *args, **settings)


class RowParallelLinear(layers.RowParallelLinear):
    """Megatron's layer with the faster kernels on CPUs."""

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **settings: Any) -> Tensor:
        return multiply(super()._forward_impl, input, weight, *args, **settings)
