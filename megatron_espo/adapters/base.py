"""The base of a run with adapters: frozen weights, read from their own checkpoint each time."""

import argparse
from functools import partial
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import Tensor

from megatron_espo.adapters.attach import attach_adapters, base_state
from megatron_espo.config import LoraConfig


def lora_settings(args: argparse.Namespace) -> LoraConfig:
    """Read the adapters' settings from arguments, which may be a checkpoint's.

    Args:
        args: Megatron's arguments.

    Returns:
        The settings; without a rank where all weights are trained.
    """
    return LoraConfig(
        rank=getattr(args, "lora_rank", None),
        alpha=getattr(args, "lora_alpha", None),
        targets=getattr(args, "lora_targets", None),
        rslora=getattr(args, "lora_rslora", False),
    )


def adapt(model: Any, args: argparse.Namespace) -> None:
    """Put the adapters on a model that the arguments ask for, if any.

    Args:
        model: a GPTModel, one pipeline stage of it.
        args: Megatron's arguments.
    """
    lora = lora_settings(args)
    if lora.rank is not None:
        attach_adapters(model, lora, args.seed)


def load_base(model: Any, folder: str) -> None:
    """Read the frozen weights of a model with adapters; all ranks together.

    Args:
        model: the GPTModel.
        folder: a torch_dist checkpoint of the base, which any layout may have written.
    """
    _load(model, base_state(model), folder)


def load_adapters(model: Any, folder: str) -> None:
    """Read the adapters of a model, without an optimizer; all ranks together.

    Args:
        model: the GPTModel.
        folder: a torch_dist checkpoint of adapters, which any layout may have written.
    """
    group = model.pg_collection.dp_cp
    _load(model, model.sharded_state_dict(metadata={"dp_cp_group": group}), folder)


def _load(model: Any, described: dict[str, Any], folder: str) -> None:
    """Read tensors into a model, each where it is."""
    for tensor in described.values():
        if isinstance(tensor, ShardedTensorFactory):
            # The halves of a feed-forward weight are views of it, which the reader fills. Megatron
            # would put copies of them together, all layers at once: 6.4 GB of LLaDA-8B.
            tensor.merge_fn = partial(_already_there, tensor.data)
    # Of one chunk of a rank's several the checks of all ranks together would find parts missing.
    state = dist_checkpointing.load(described, folder, validate_access_integrity=False)
    model.load_state_dict(state, strict=False)


def _already_there(whole: Tensor, parts: Any) -> Tensor:
    return whole
