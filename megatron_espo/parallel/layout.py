"""The process groups of a run, looked up once and passed down."""

from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Process groups and this rank's place in them.

    Attributes:
        tp: tensor-parallel group.
        pp: pipeline-parallel group.
        dp: data-parallel group (without context parallelism).
        mp: all ranks that hold one copy of the model (tensor x pipeline).
    """

    tp: dist.ProcessGroup
    pp: dist.ProcessGroup
    dp: dist.ProcessGroup
    mp: dist.ProcessGroup

    @property
    def tp_rank(self) -> int:
        """Rank in the tensor-parallel group."""
        return self.tp.rank()

    @property
    def tp_size(self) -> int:
        """Tensor-parallel size."""
        return self.tp.size()

    @property
    def pp_size(self) -> int:
        """Pipeline-parallel size."""
        return self.pp.size()

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the output head."""
        return self.pp.rank() == self.pp.size() - 1

    @property
    def dp_rank(self) -> int:
        """Rank in the data-parallel group."""
        return self.dp.rank()

    @property
    def dp_size(self) -> int:
        """Data-parallel size."""
        return self.dp.size()

    @property
    def is_reporter(self) -> bool:
        """Whether this rank writes logs: the last one, where Megatron opens its writers."""
        return dist.get_rank() == dist.get_world_size() - 1


def current_layout() -> Layout:
    """Read the groups that Megatron has initialised."""
    return Layout(
        tp=mpu.get_tensor_model_parallel_group(),
        pp=mpu.get_pipeline_model_parallel_group(),
        dp=mpu.get_data_parallel_group(),
        mp=mpu.get_model_parallel_group(),
    )


def broadcast_from_last_stage(tensor: Tensor, layout: Layout) -> Tensor:
    """Give every pipeline stage the last stage's tensor.

    Args:
        tensor: the value on the last stage; on the others a tensor of the same shape and dtype,
            which is overwritten.
        layout: process groups.

    Returns:
        ``tensor``.
    """
    if layout.pp_size > 1:
        source = dist.get_global_rank(layout.pp, layout.pp_size - 1)
        dist.broadcast(tensor, source, group=layout.pp)
    return tensor


def sum_over_data_parallel(values: Tensor, layout: Layout) -> Tensor:
    """Add float64 sums over the data-parallel group, in place."""
    if layout.dp_size > 1:
        dist.all_reduce(values, group=layout.dp)
    return values
