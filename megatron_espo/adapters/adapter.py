"""The low-rank update of one linear layer, split over tensor-parallel ranks as the layer is.

A projection with weight W ``[out, in]`` computes ``W x + scale B A x`` with A ``[r, in]`` and
B ``[out, r]``. Where the ranks split the outputs, A is whole on each of them and B is split; where
they split the inputs, A is split and B whole. What goes between ranks is r numbers wide.

Symbols: T positions of all rows on this rank, r rank of the adapter, n adapted projections.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.nn import Parameter


@dataclass(frozen=True)
class Packing:
    """How a linear layer holds its projections on this rank.

    Attributes:
        rows: projection -> rows of its weight on this rank, in the order of one group.
        groups: query groups that take turns: each has its rows of every projection side by side.
        columns: inputs on this rank.
        splits_rows: whether ranks split outputs; else they split inputs.
    """

    rows: Mapping[str, int]
    groups: int
    columns: int
    splits_rows: bool


class Adapter(torch.nn.Module):
    """Low-rank updates of the projections of one linear layer.

    Its parameters are ``NAME_a`` and ``NAME_b`` of each adapted projection.

    Attributes:
        targets: the adapted projections, in packed order.
        active: whether the update is added; off, the layer computes what it did before.
    """

    def __init__(
        self,
        targets: Sequence[str],
        packing: Packing,
        rank: int,
        scale: float,
        dtype: torch.dtype,
        device: torch.device,
        tp_group: dist.ProcessGroup,
        sequence_parallel: bool,
    ) -> None:
        """Make the matrices, A without values and B zero.

        Args:
            targets: projections to adapt.
            packing: how the layer holds them.
            rank: r.
            scale: factor of the update.
            dtype: of the matrices.
            device: where they are.
            tp_group: tensor-parallel group.
            sequence_parallel: whether its ranks split the positions outside of the layer.
        """
        super().__init__()
        self.targets, self.packing, self.scale = tuple(targets), packing, scale
        self.active = True
        self._group = tp_group
        self._by_sequence = sequence_parallel and tp_group.size() > 1
        for name in targets:
            a = Parameter(torch.empty(rank, packing.columns, dtype=dtype, device=device))
            b = Parameter(torch.zeros(packing.rows[name], rank, dtype=dtype, device=device))
            whole, split = (a, b) if packing.splits_rows else (b, a)
            # Each rank sees the whole one's gradient of its own positions: Megatron adds them up.
            whole.sequence_parallel = self._by_sequence  # type: ignore[attr-defined]
            split.tensor_model_parallel = True  # type: ignore[attr-defined]
            split.partition_dim = self.split_axis  # type: ignore[attr-defined]
            split.partition_stride = 1  # type: ignore[attr-defined]
            self.register_parameter(f"{name}_a", a)
            self.register_parameter(f"{name}_b", b)

    @property
    def split_axis(self) -> int:
        """Axis of the split matrices: rows of B, or columns of A."""
        return 0 if self.packing.splits_rows else 1

    def is_split(self, name: str) -> bool:
        """Say whether tensor-parallel ranks split a parameter."""
        return name.endswith("_b" if self.packing.splits_rows else "_a")

    def forward(self, hidden: Tensor, output: Tensor) -> Tensor:
        """Add the update.

        The result is the same with and without gradients, to the bit.

        Args:
            hidden: the layer's input on this rank, ``[..., columns]``.
            output: what it made of that, ``[..., rows]``.

        Returns:
            Like ``output``; gradients flow to both and to the parameters.
        """
        # Flat: products of more axes take other kernels without gradients than with them.
        down: list[Tensor] = [self.get_parameter(f"{name}_a") for name in self.targets]
        low = hidden.flatten(0, -2) @ (down[0] if len(down) == 1 else torch.cat(down)).t()
        low = self._across_ranks(low)
        if self.scale != 1.0:
            low = low * self.scale
        parts = low.split(down[0].size(0), dim=1)
        updates = {
            # An output head gives float32 whatever its weights are.
            name: part.to(output.dtype) @ self.get_parameter(f"{name}_b").to(output.dtype).t()
            for name, part in zip(self.targets, parts, strict=True)
        }
        return output + self._packed(updates).view(output.shape)

    def _across_ranks(self, low: Tensor) -> Tensor:
        """Bring what is r wide to where B needs it: ``[T, n r]`` of other positions, or summed."""
        if self._group.size() == 1:
            return low
        collective = {
            (True, True): gather_from_sequence_parallel_region,
            (True, False): copy_to_tensor_model_parallel_region,
            (False, True): reduce_scatter_to_sequence_parallel_region,
            (False, False): reduce_from_tensor_model_parallel_region,
        }[self.packing.splits_rows, self._by_sequence]
        moved: Tensor = collective(low, group=self._group)
        return moved

    def _packed(self, updates: Mapping[str, Tensor]) -> Tensor:
        """Put the updates ``[T, rows]`` of the projections side by side as the layer does."""
        if len(self.packing.rows) == 1:
            return updates[self.targets[0]]
        first, groups = updates[self.targets[0]], self.packing.groups
        positions = first.size(0)
        parts = [
            updates[name].view(positions, groups, -1)
            if name in updates
            else first.new_zeros(positions, groups, rows // groups)
            for name, rows in self.packing.rows.items()
        ]
        return torch.cat(parts, dim=2).flatten(1)
