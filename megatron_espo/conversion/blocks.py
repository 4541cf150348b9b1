"""Streams weights between a Hugging Face folder and a torch_dist checkpoint, block by block."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_espo.conversion.hugging_face import HuggingFaceWeights, write_weights
from megatron_espo.conversion.lora import merge
from megatron_espo.conversion.mapping import Block
from megatron_espo.conversion.torch_dist import CheckpointReader, write_checkpoint
from megatron_espo.errors import UserError


def _progress(what: str, blocks: Sequence[Block], dtype: torch.dtype) -> tqdm:
    total = sum(torch.Size(block.shape).numel() for block in blocks) * dtype.itemsize
    # A log file gets a line every ten seconds.
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(
        desc=what, total=total, unit="B", unit_scale=True, mininterval=interval, maxinterval=30.0
    )


def write_megatron(
    weights: HuggingFaceWeights,
    folder: Path,
    blocks: Sequence[Block],
    dtype: torch.dtype,
    extra_states: Mapping[str, int],
    common: dict[str, Any],
) -> None:
    """Write a torch_dist checkpoint from Hugging Face weights.

    Args:
        weights: the source, checked against the blocks.
        folder: an empty folder for the checkpoint.
        blocks: the model's blocks.
        dtype: type to write; bits are kept where it is the source's.
        extra_states: key -> number of parts of the modules' extra states.
        common: what is not sharded.
    """
    with _progress("to Megatron", blocks, dtype) as bar:

        def read(block: Block) -> Tensor:
            own = block.dtype or dtype
            tensor = block.pack([weights.read(name).to(own) for name in block.sources])
            bar.update(tensor.nbytes)
            return tensor

        write_checkpoint(folder, blocks, dtype, read, extra_states, common)


def check_weights(reader: CheckpointReader, blocks: Sequence[Block]) -> None:
    """Compare a checkpoint's tensors with those of the model to write.

    Args:
        reader: the checkpoint.
        blocks: the model's blocks.

    Raises:
        UserError: a tensor is missing, left over, or has another shape.
    """
    stored, wanted = reader.weights(), {block.key: block.global_shape for block in blocks}
    for key, shape in wanted.items():
        if key not in stored:
            raise UserError(f"{reader.folder}: the tensor {key} is missing.")
        found = stored[key][0]
        # A layout may have padded the vocabulary.
        padded = not key.startswith("decoder.") and found[1:] == shape[1:] and found[0] >= shape[0]
        if found != shape and not padded:
            raise UserError(
                f"{reader.folder}: {key} has the shape {list(found)}, the template's config.json "
                f"asks for {list(shape)}."
            )
    for key in stored:
        if key not in wanted:
            raise UserError(
                f"{reader.folder}: the tensor {key} has no place in the template's architecture."
            )


def write_hugging_face(
    reader: CheckpointReader,
    folder: Path,
    blocks: Sequence[Block],
    dtype: torch.dtype,
    files: Mapping[str, str] | None,
    copies: Mapping[str, str],
    delta: Callable[[str], Tensor | None] | None = None,
    own_dtype: torch.dtype = torch.float32,
) -> None:
    """Write a Hugging Face folder's weights from a torch_dist checkpoint.

    Args:
        reader: the source, checked against the blocks.
        folder: where to.
        blocks: the model's blocks.
        dtype: type to write; bits are kept where it is the source's.
        files: which file takes which tensor; None splits them anew.
        copies: tensors that are written where ``files`` has them -> what they are copies of.
        delta: makes what is added to the weight of a module, in float32, or None.
        own_dtype: type of the blocks that have their own in a checkpoint.
    """
    home = {name: block for block in blocks for name in block.sources}
    types = {name: own_dtype if block.dtype else dtype for name, block in home.items()}
    tensors = {name: (block.sources[name], types[name]) for name, block in home.items()}
    tensors.update({copy: tensors[name] for copy, name in copies.items() if copy in (files or ())})
    parts: dict[str, Tensor] = {}
    with _progress("to Hugging Face", blocks, dtype) as bar:

        def read(name: str) -> Tensor:
            name = copies.get(name, name)
            if name not in parts:
                # What is left of the block before goes: its tensors lie in other files, and
                # reading twice is cheaper than keeping all of them.
                parts.clear()
                block = home[name]
                parts.update(block.unpack(reader.read(block.key, block.offset, block.shape)))
            tensor = parts.pop(name)
            if delta is not None:
                tensor = merge(tensor, delta(name.removesuffix(".weight")))
            tensor = tensor.to(types[name])
            bar.update(tensor.nbytes)
            return tensor

        write_weights(folder, tensors, read, files)
