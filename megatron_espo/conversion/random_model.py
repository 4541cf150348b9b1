"""Model folders with random weights, for trying things out at any size."""

import zlib
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_espo.conversion.families import Family
from megatron_espo.conversion.hugging_face import write_weights
from megatron_espo.conversion.mapping import model_blocks
from megatron_espo.conversion.side_files import write_side_files
from megatron_espo.data.atomic_folder import atomic_folder
from megatron_espo.data.tokenizer import FastTokenizer
from megatron_espo.model.shape import ModelShape


def write_random_model(
    out: str | Path,
    family: Family,
    shape: ModelShape,
    dtype: torch.dtype,
    tokenizer: FastTokenizer,
    *,
    seed: int = 0,
    std: float = 0.02,
    max_shard_size: str = "5GB",
) -> None:
    """Write a folder of the published form: sharded safetensors, index, config, tokenizer.

    Args:
        out: the folder to make.
        family: decides names and config.
        shape: the model.
        dtype: type of the weights.
        tokenizer: the tokenizer to put beside them.
        seed: seed of the weights; a tensor's values depend on it and the tensor's name.
        std: standard deviation of the weights; norms and biases have ten times as much.
        max_shard_size: most bytes of a file, such as "5GB".

    Raises:
        UserError: ``out`` exists, or the disk is full.
    """
    sources = {
        name: size
        for block in model_blocks(shape, family.names)
        for name, size in block.sources.items()
    }
    total = sum(torch.Size(size).numel() for size in sources.values()) * dtype.itemsize

    with (
        atomic_folder(out, needed=total) as partial,
        tqdm(desc="random weights", total=total, unit="B", unit_scale=True) as bar,
    ):

        def make(name: str) -> Tensor:
            generator = torch.Generator().manual_seed(seed * 2**32 + zlib.crc32(name.encode()))
            values = torch.randn(sources[name], generator=generator)
            if values.dim() == 1:
                values = values * (10 * std) + float(name.endswith(".weight"))
            else:
                values *= std
            tensor = values.to(dtype)
            bar.update(tensor.nbytes)
            return tensor

        write_side_files(partial, family, shape, dtype, tokenizer)
        tensors = {name: (size, dtype) for name, size in sources.items()}
        write_weights(partial, tensors, make, max_shard_size=max_shard_size)
