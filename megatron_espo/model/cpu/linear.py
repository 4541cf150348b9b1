"""Megatron's tensor-parallel linear layers with the faster kernels on CPUs."""

from typing import Any

from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    layers,
)
from torch import Tensor

from megatron_espo.model.cpu import matmul
from megatron_espo.passes.state import current_pass


def multiply(
    megatrons: Any,
    input: Tensor,
    weight: Tensor,
    *args: Any,
    by_features: bool = False,
    **settings: Any,
) -> Tensor:
    """Multiply with the CPU's faster kernels, or as Megatron does where they do not apply.

    Args:
        megatrons: Megatron's product of the layer, its ``_forward_impl``.
        input: ``[..., h]``.
        weight: ``[n, h]``, this rank's part.
        *args: further arguments of Megatron's product.
        by_features: see :func:`matmul.linear`.
        **settings: further arguments of Megatron's product.

    Returns:
        ``[..., n]``, with gradients to both.
    """
    plain = not args and settings.get("bias") is None and settings.get("gtp_remat_size", 1) == 1
    plain = plain and settings.get("output_dtype") in (None, input.dtype)  # from 0.20 on
    if not plain or not matmul.is_handled(input, weight):
        output: Tensor = megatrons(input, weight, *args, **settings)
        return output
    # Collectives of the kinds that Megatron's function makes: gather and reduce-scatter of the
    # sequence, or the sum of the input's gradient.
    if settings["sequence_parallel"]:
        input = gather_from_sequence_parallel_region(input, group=settings["tp_group"])
    elif settings["allreduce_dgrad"]:
        input = copy_to_tensor_model_parallel_region(input, group=settings["tp_group"])
    return matmul.linear(input, weight, by_features)


class _FasterLinear:
    """What Megatron's two layers get alike; stands before one of them among the bases."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        layer: Any = self
        # Nothing but a product: whole on this rank, without a bias.
        self._is_plain = (
            layer.tp_group.size() == 1
            and layer.weight is not None
            and layer.bias is None
            and not layer.explicit_expert_comm
            and layer.gtp_remat_size == 1
            and not layer.config.defer_embedding_wgrad_compute
            and not layer.config.cpu_offloading
        )

    def forward(self, input_: Tensor, *args: Any, **settings: Any) -> tuple[Tensor, Tensor | None]:
        """Multiply; see Megatron's layer.

        Args:
            input_: ``[w, b, h]``.
            *args: as in Megatron's.
            **settings: as in Megatron's.

        Returns:
            ``[w, b, n]`` and the bias that is left to the caller.
        """
        layer: Any = self
        plain = self._is_plain and not args and not settings
        if plain and matmul.is_handled(input_, layer.weight):
            return matmul.linear(input_, layer.weight, self._by_features()), None
        output: tuple[Tensor, Tensor | None] = super().forward(  # type: ignore[misc]
            input_, *args, **settings
        )
        return output

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **settings: Any) -> Tensor:
        megatrons = super()._forward_impl  # type: ignore[misc]
        by_features = self._by_features()
        return multiply(megatrons, input, weight, *args, by_features=by_features, **settings)

    def _by_features(self) -> bool:
        """Say whether the output's reader takes any layout; see :func:`matmul.linear`."""
        return False


class ColumnParallelLinear(_FasterLinear, layers.ColumnParallelLinear):
    """Megatron's layer with the faster kernels on CPUs."""


class FeatureMajorColumnParallelLinear(ColumnParallelLinear):
    """The same with an output that may be laid out by features where tokens are sampled.

    Elsewhere the layout would have to be the same with and without gradients, and costs more in the
    backward pass than it saves.
    """

    def _by_features(self) -> bool:
        state = current_pass()
        return state is not None and state.sampling


class RowParallelLinear(_FasterLinear, layers.RowParallelLinear):
    """Megatron's layer with the faster kernels on CPUs."""
