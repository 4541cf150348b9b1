"""The process groups of a run, looked up once and passed down."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor

from megatron_espo.errors import UserError


@dataclass(frozen=True)
class Layout:
    """Process groups and this rank's place in them.

    Attributes:
        tp: tensor-parallel group.
        pp: pipeline-parallel group.
        dp: data-parallel group: ranks that work on different samples.
        cp: context-parallel group: ranks that share the positions of the same samples.
        mp: the ranks of one tensor x pipeline grid; with context parallelism several of them work
            on the same samples.
        experts: ranks that hold the experts of a layer among them, where ranks with other samples
            are among them: all of these must make the same passes. None where there are none.
    """

    tp: dist.ProcessGroup
    pp: dist.ProcessGroup
    dp: dist.ProcessGroup
    cp: dist.ProcessGroup
    mp: dist.ProcessGroup
    experts: dist.ProcessGroup | None = None

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
    def cp_size(self) -> int:
        """Context-parallel size."""
        return self.cp.size()

    @property
    def is_first_of_samples(self) -> bool:
        """Whether this is the first of all ranks that work on the same samples."""
        return self.mp.rank() == 0 and self.cp.rank() == 0

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
        cp=mpu.get_context_parallel_group(),
        mp=mpu.get_model_parallel_group(),
        experts=_experts_over_samples(),
    )


def _experts_over_samples() -> dist.ProcessGroup | None:
    group = mpu.get_expert_tensor_and_model_parallel_group()
    peers = mpu.get_tensor_model_parallel_world_size() * mpu.get_context_parallel_world_size()
    return group if group.size() > peers else None


def most_over_experts(count: int, layout: Layout, device: torch.device) -> int:
    """Return the largest of what the ranks say that must make the same passes; a collective.

    Args:
        count: what this rank says.
        layout: process groups.
        device: where their collectives work.

    Returns:
        The largest; ``count`` itself where experts are shared with no other samples.
    """
    if layout.experts is None:
        return count
    counts = torch.full((1,), count, device=device)
    dist.all_reduce(counts, op=dist.ReduceOp.MAX, group=layout.experts)
    return int(counts.item())


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


def object_from_first_of_samples[Value](value: Value, layout: Layout) -> Value:
    """Give all ranks that work on the same samples what the first of them has.

    Args:
        value: an object that can be pickled; read on the first rank only.
        layout: process groups.

    Returns:
        The first rank's object.
    """
    box = [value]
    # The first rank's context-parallel peers are the first ranks of the other grids.
    for group in (layout.cp, layout.mp):
        if group.size() > 1 and (group is layout.mp or layout.mp.rank() == 0):
            dist.broadcast_object_list(box, dist.get_global_rank(group, 0), group=group)
    return box[0]


def raise_on_all(error: UserError | None, layout: Layout) -> None:
    """Raise on every data-parallel rank what one of them has found; a collective.

    Args:
        error: what this rank has found.
        layout: process groups.

    Raises:
        UserError: the first rank's error, where there is any.
    """
    errors: list[UserError | None] = [error] * layout.dp_size
    if layout.dp_size > 1:
        dist.all_gather_object(errors, error, group=layout.dp)
    for found in errors:
        if found is not None:
            raise found


@contextlib.contextmanager
def raised_on_all(layout: Layout) -> Iterator[None]:
    """Raise a user's error of the block on every data-parallel rank; see :func:`raise_on_all`.

    All ranks enter, and the collective comes after the block.

    Args:
        layout: process groups.

    Raises:
        UserError: the first rank's error, where there is any.
    """
    mistake = None
    try:
        yield
    except UserError as error:
        mistake = error
    raise_on_all(mistake, layout)


def any_over_samples(vote: bool, layout: Layout, device: torch.device) -> bool:
    """Say whether any of the ranks that work on the same samples votes yes."""
    votes = torch.full((1,), int(vote), device=device)  # filled there: nothing is copied
    _largest_over_samples(votes, layout)
    return bool(votes.item())


def union_over_samples(marks: Tensor, layout: Layout, device: torch.device) -> Tensor:
    """Mark what any of the ranks that work on the same samples marks.

    Args:
        marks: bool ``[n]`` on the host.
        layout: process groups.
        device: where their collectives work.

    Returns:
        bool ``[n]`` on the host, the same on these ranks.
    """
    if layout.mp.size() == layout.cp.size() == 1:
        return marks
    votes = marks.int().to(device)
    _largest_over_samples(votes, layout)
    return votes.cpu() > 0


def _largest_over_samples(votes: Tensor, layout: Layout) -> None:
    for group in (layout.mp, layout.cp):
        if group.size() > 1:
            dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=group)


def stack_over_ranks(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Stack the ranks' small tensors in rank order: ``[ranks, ...]``, equal on all of them."""
    if group.size() == 1:
        return values[None]
    values = values.contiguous()  # NCCL takes no tensor with gaps
    gathered = [torch.empty_like(values) for _ in range(group.size())]
    dist.all_gather(gathered, values, group=group)
    return torch.stack(gathered)


def sum_over_data_parallel(values: Tensor, layout: Layout) -> Tensor:
    """Add float64 sums over the data-parallel group, in place."""
    if layout.dp_size > 1:
        dist.all_reduce(values, group=layout.dp)
    return values
