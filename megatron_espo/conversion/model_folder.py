"""A published model as its config.json describes it."""

import argparse
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_espo.conversion.families import Family, family_of
from megatron_espo.conversion.hugging_face import read_json
from megatron_espo.conversion.mapping import Block, model_blocks, tied_copies
from megatron_espo.data.mask_token import choose_mask_token
from megatron_espo.data.tokenizer import copy_tokenizer, load_tokenizer
from megatron_espo.errors import UserError
from megatron_espo.model.published_config import Config
from megatron_espo.model.shape import ModelShape


@dataclass(frozen=True)
class PublishedModel:
    """A model folder.

    Attributes:
        folder: the folder.
        family: its family.
        shape: what its config.json says.
        given: what is taken for fields that the file of an autoregressive model does not have.
    """

    folder: Path
    family: Family
    shape: ModelShape
    given: Mapping[str, Any]

    @property
    def blocks(self) -> list[Block]:
        """The blocks of its checkpoint."""
        return model_blocks(self.shape, self.family.names)

    @property
    def sources(self) -> dict[str, tuple[int, ...]]:
        """Hugging Face names and shapes."""
        return {name: size for block in self.blocks for name, size in block.sources.items()}

    @property
    def copies(self) -> dict[str, str]:
        """Tensors that a folder may hold besides -> what they are copies of."""
        return tied_copies(self.shape, self.family.names)

    @property
    def num_parameters(self) -> int:
        """Numbers in its tensors, copies not counted."""
        return sum(torch.Size(size).numel() for size in self.sources.values())

    @property
    def fields(self) -> dict[str, Any]:
        """Its config.json, with what was given."""
        return {**self.given, **read_json(self.folder / "config.json")}

    @property
    def end_tokens(self) -> list[int]:
        """The tokens that its config.json calls ends of a sequence."""
        ends = self.fields.get("eos_token_id")
        return list(ends) if isinstance(ends, list) else [self.shape.eos_token_id]


def read_model(folder: Path, given: Mapping[str, Any] | None = None) -> PublishedModel:
    """Read a model folder.

    Args:
        folder: the folder.
        given: for an autoregressive model, what is taken for fields that its file does not have:
            ``mask_token_id`` and ``logit_shift``; other families' files must say all.

    Returns:
        The model.

    Raises:
        UserError: naming the field that is missing, broken or not supported.
    """
    source = str(folder / "config.json")
    fields = read_json(folder / "config.json")
    family = family_of(fields, source)
    given = dict(given or {}) if family.autoregressive else {}
    shape = family.read_config(Config({**given, **fields}, source))
    return PublishedModel(folder, family, shape, given)


def stored_facts(args: argparse.Namespace) -> dict[str, Any]:
    """Read from a checkpoint's arguments what an autoregressive template does not say."""
    known = ("mask_token_id", "logit_shift", "attention_mask", "block_size")
    facts = {name: getattr(args, name, None) for name in known}
    return {name: value for name, value in facts.items() if value not in (None, "full")}


def read_model_with_mask(
    folder: Path, tokenizer: Path, mask_token_id: int | None, logit_shift: bool | None
) -> PublishedModel:
    """Read a model folder to start from; one of an autoregressive model gets a mask token.

    Args:
        folder: the folder.
        tokenizer: folder of its tokenizer.
        mask_token_id: the mask token that was asked for; None chooses one.
        logit_shift: whether logits are to be those of the next position; None keeps the family's.

    Returns:
        The model.

    Raises:
        UserError: as :func:`read_model`; or what was asked for does not fit the model.
    """
    fields = read_json(folder / "config.json")
    family = family_of(fields, str(folder / "config.json"))
    asked = {"mask_token_id": mask_token_id, "logit_shift": logit_shift}
    for name, value in asked.items():
        if value is None:
            continue
        flag = "--mask-token-id" if name == "mask_token_id" else "--no-logit-shift"
        if not family.autoregressive:
            raise UserError(
                f"{flag}: {folder} holds a masked-diffusion model ({family.architecture}), which "
                "has its own; leave the flag out."
            )
        if fields.get(name, value) != value:
            raise UserError(
                f'{flag}: {folder / "config.json"} says "{name}" {fields[name]!r}; leave the flag '
                "out."
            )
    given = {name: value for name, value in asked.items() if value is not None}
    if family.autoregressive and "mask_token_id" not in fields:
        rows = Config(fields, str(folder / "config.json")).number("vocab_size", int)
        with tempfile.TemporaryDirectory() as scratch:
            copy_tokenizer(tokenizer, Path(scratch, "tokenizer"), family.tokenizer_class)
            own = load_tokenizer(Path(scratch, "tokenizer"))
        given["mask_token_id"] = choose_mask_token(own, rows, mask_token_id, str(folder))
    return read_model(folder, given)
