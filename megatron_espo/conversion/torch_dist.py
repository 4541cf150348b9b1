"""Megatron's torch_dist checkpoints, written and read block by block.

Megatron's own functions want all tensors in memory. Its format is torch.distributed.checkpoint's,
whose planners can be asked for one tensor at a time.
"""

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_saver import save

from megatron_espo.conversion.mapping import Block, has_own_type
from megatron_espo.errors import UserError

# What Megatron's torch_dist writer stores beside the tensors: everything that is not sharded.
_COMMON = "common_state"
_BACKEND = CheckpointingConfig("torch_dist", 1)


def write_checkpoint(
    folder: Path,
    blocks: Sequence[Block],
    dtype: torch.dtype,
    read: Callable[[Block], Tensor],
    extra_states: Mapping[str, int],
    common: dict[str, Any],
) -> None:
    """Write a model's checkpoint; blocks are asked for when they are written.

    Args:
        folder: an empty folder.
        blocks: all blocks of the model.
        dtype: their type, unless a block says another.
        read: makes a block.
        extra_states: key -> number of parts of the extra states, which are written empty.
        common: what is not sharded ("args", "iteration", "checkpoint_version").

    Raises:
        OSError: the disk is full, and the like.
    """
    objects: dict[str, Any] = {_object_key(_COMMON, 0, 1): common}
    for key, parts in extra_states.items():
        objects.update({_object_key(key, part, parts): None for part in range(parts)})
    planner = _Writer(blocks, dtype, read, objects)
    # One thread: what goes wrong in a second one would be lost.
    writer = FileSystemWriter(folder, thread_count=1)
    failures: list[BaseException] = []
    try:
        with warnings.catch_warnings(action="ignore"):  # that this is one process
            save({}, storage_writer=writer, planner=planner, no_dist=True)
    except CheckpointException as error:
        failures = [failure for failure, _ in error.failures.values()] or [error]
    if failures:  # outside of the handler, so that the error keeps its own cause
        raise failures[0]
    save_config(_BACKEND, str(folder))


def _object_key(key: str, part: int, parts: int) -> str:
    return str(ShardedObject(key, None, (parts,), (part,)).unique_key)


class _Writer(DefaultSavePlanner):
    """Plans the blocks and makes each when it is due."""

    def __init__(
        self,
        blocks: Sequence[Block],
        dtype: torch.dtype,
        read: Callable[[Block], Tensor],
        objects: Mapping[str, Any],
    ) -> None:
        super().__init__(flatten_state_dict=False)
        self._blocks = {(block.key, block.offset): block for block in blocks}
        self._dtype, self._read, self._objects = dtype, read, objects

    def create_local_plan(self) -> SavePlan:
        """List what is to be written."""
        items = [
            WriteItem(
                MetadataIndex(block.key, torch.Size(block.offset)),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    ChunkStorageMetadata(torch.Size(block.offset), torch.Size(block.shape)),
                    TensorProperties(dtype=block.dtype or self._dtype),
                    torch.Size(block.global_shape),
                ),
            )
            for block in self._blocks.values()
        ]
        items += [
            WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in sorted(self._objects)
        ]
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """Make a block, or write an object the way Megatron does: as a list of one."""
        index = write_item.index
        if write_item.type == WriteItemType.BYTE_IO:
            stream = io.BytesIO()
            torch.save([self._objects[index.fqn]], stream)
            return stream
        assert index.offset is not None
        return self._read(self._blocks[index.fqn, tuple(index.offset)])


class CheckpointReader:
    """Reads blocks of a torch_dist checkpoint, whatever layout wrote it."""

    def __init__(self, folder: Path) -> None:
        """Open a checkpoint.

        Args:
            folder: the folder of one iteration.

        Raises:
            UserError: it holds no checkpoint that can be read.
        """
        self.folder = folder
        self._storage = FileSystemReader(folder)
        try:
            self._metadata: Metadata = self._storage.read_metadata()
        except Exception as error:
            raise UserError(f"{folder}: cannot read this checkpoint ({error}).") from error
        self._storage.set_up_storage_reader(self._metadata, is_coordinator=True)

    def weights(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """List the model's tensors, without those of the optimizer: key -> shape, type."""
        return {
            key: (tuple(entry.size), entry.properties.dtype)
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not key.startswith("optimizer")
        }

    def dtype(self) -> torch.dtype:
        """Return the type of the model's tensors.

        Raises:
            UserError: types differ.
        """
        weights = self.weights()
        types = {dtype: key for key, (_, dtype) in weights.items() if not has_own_type(key)}
        if len(types) > 1:
            found = " and ".join(f"{key} is {str(dtype)[6:]}" for dtype, key in types.items())
            raise UserError(f"{self.folder}: {found}; pass --dtype to convert all to one type.")
        return next(iter(types))

    def read(self, key: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Read a block of a tensor.

        Args:
            key: the tensor.
            offset: where the block starts in it.
            shape: of the block.

        Returns:
            The block, of the stored type.

        Raises:
            UserError: the files are broken, or the checkpoint has no such block.
        """
        entry = self._metadata.state_dict_metadata.get(key)
        if not isinstance(entry, TensorStorageMetadata):
            raise UserError(f"{self.folder}: the tensor {key} is missing.")
        target = torch.empty(tuple(shape), dtype=entry.properties.dtype)
        chunk = ChunkStorageMetadata(torch.Size(offset), torch.Size(shape))
        items = create_read_items_for_chunk_list(key, entry, [chunk])
        if sum(item.lengths.numel() for item in items) != target.numel():
            raise UserError(f"{self.folder}: parts of {key} are missing.")
        try:
            self._storage.read_data(LoadPlan(items), _Reader(target)).wait()
        except Exception as error:
            raise UserError(f"{self.folder}: cannot read {key} ({error}).") from error
        return target


class _Reader(DefaultLoadPlanner):
    """Puts the parts of one block into their places."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Return the part of the block that an item fills."""
        part = self._target
        for axis, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            part = part.narrow(axis, start, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing is left to do: the part was filled in place."""
