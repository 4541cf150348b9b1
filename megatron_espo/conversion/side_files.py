"""What lies beside the weights of a Hugging Face folder, written from a model's shape."""

import json
from pathlib import Path

import torch

from megatron_espo.conversion.families import Family
from megatron_espo.data.tokenizer import FastTokenizer, write_tokenizer
from megatron_espo.errors import UserError
from megatron_espo.model.published_config import Config
from megatron_espo.model.shape import ModelShape


def write_side_files(
    folder: Path,
    family: Family,
    shape: ModelShape,
    dtype: torch.dtype,
    tokenizer: FastTokenizer,
) -> None:
    """Write config.json, generation_config.json and the tokenizer.

    Args:
        folder: an existing folder.
        family: decides the config.
        shape: the model.
        dtype: type of the weights.
        tokenizer: the tokenizer.

    Raises:
        UserError: the family has no such models.
    """
    fields = family.write_config(shape)
    if again := _differing(shape, family.read_config(Config(fields, "config.json"))):
        raise UserError(f"a {family.architecture} cannot have {again}.")
    write_tokenizer(tokenizer, folder)
    fields["torch_dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    tokens = {"eos_token_id": shape.eos_token_id, "pad_token_id": shape.eos_token_id}
    (folder / "generation_config.json").write_text(json.dumps(tokens, indent=2) + "\n")


def _differing(shape: ModelShape, read: ModelShape) -> str:
    """Name what a config.json loses of a shape."""
    theirs = vars(read)
    return ", ".join(
        f"{name} {value}" for name, value in vars(shape).items() if value != theirs[name]
    )
