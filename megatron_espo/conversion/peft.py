"""Adapters to PEFT's folders and back, and merged into the weights of their base."""

import argparse
import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_espo.adapters.base import lora_settings
from megatron_espo.adapters.projections import targets_of
from megatron_espo.checkpoint.tracker import TRACKER, checkpoint_folder, has_checkpoint
from megatron_espo.checkpoint.weights_mark import fingerprint
from megatron_espo.conversion.adapters import (
    PREFIX,
    CheckpointAdapters,
    adapted_places,
    peft_config,
    targets_in,
)
from megatron_espo.conversion.families import FAMILIES, Family
from megatron_espo.conversion.hugging_face import read_tensor, resolve_folder
from megatron_espo.conversion.lora import CONFIG, WEIGHTS, Adapter
from megatron_espo.conversion.mapping import Block
from megatron_espo.conversion.model_folder import read_model, stored_facts
from megatron_espo.conversion.torch_dist import CheckpointReader, write_checkpoint
from megatron_espo.data.atomic_folder import atomic_folder
from megatron_espo.errors import UserError
from megatron_espo.model.shape import ModelShape
from megatron_espo.startup.stored import stored_arguments


def base_folder(megatron: str, args: argparse.Namespace, base: str | None) -> str:
    """Find the base of a checkpoint of adapters.

    Args:
        megatron: the checkpoint's --save folder, for messages.
        args: its arguments.
        base: where it is now, or None where it still is where it was.

    Returns:
        The folder of the base's checkpoint.

    Raises:
        UserError: it is not there, or has other weights.
    """
    root, mark = base or args.lora_base, args.lora_base_mark
    if not has_checkpoint(root):
        raise UserError(
            f"--megatron {megatron} holds adapters of {root}, where no checkpoint is; pass --base "
            "with the place it has now."
        )
    folder = os.path.join(root, mark)
    folder = folder if os.path.isdir(folder) else checkpoint_folder(root)
    if fingerprint(folder) != args.lora_base_fingerprint:
        raise UserError(
            f"{folder} is not what the adapters in --megatron {megatron} were trained on (that was "
            f"{os.path.join(args.lora_base, mark)}, with other weights); pass --base with that one."
        )
    return folder


def convert_to_peft(
    megatron: str,
    out: str,
    template: str | None = None,
    family: str | None = None,
    iteration: int | None = None,
    base_name: str | None = None,
) -> None:
    """Write a checkpoint's adapters as a folder that PEFT loads onto the published model.

    Args:
        megatron: a --save folder of a run with adapters.
        out: the folder to make.
        template: folder or hub name of the model that they are for.
        family: without a template, its family.
        iteration: which checkpoint; None takes the latest.
        base_name: what the adapter's config calls the model; None takes the template.

    Raises:
        UserError: one sentence on what is wrong; ``out`` does not exist then.
    """
    folder = checkpoint_folder(megatron, iteration)
    args, reader = stored_arguments(folder), CheckpointReader(Path(folder))
    lora = lora_settings(args)
    if lora.rank is None:
        raise UserError(f"--megatron {megatron} holds a whole model; write it with to-hf.")
    shape = ModelShape.of(args, args.stop_token_ids[0])
    if template is not None:
        source = resolve_folder(template, "--hf-template", weights=False)
        published = read_model(source, stored_facts(args))
        chosen, differences = published.family, published.shape.differences(args)
        if differences:
            raise UserError(
                f"--megatron {megatron} does not fit --hf-template {template}: "
                f"{'; '.join(differences)}."
            )
    else:
        assert family is not None
        chosen = FAMILIES[family]
    adapters = CheckpointAdapters.of(reader, args, shape, chosen.names)
    tensors = {
        f"{PREFIX}{path}.lora_{letter}.weight": side.contiguous()
        for path in adapters.modules
        for letter, side in zip("AB", adapters.read(path), strict=True)
    }
    config = peft_config(lora, shape, chosen.names, base_name or template)
    with atomic_folder(out, needed=sum(t.nbytes for t in tensors.values())) as partial:
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    print(f"{out}: {len(tensors) // 2} adapted weights of rank {lora.rank}.")


def convert_from_peft(lora: str, base: str, out: str) -> None:
    """Write a PEFT folder as a checkpoint of adapters to go on from.

    Args:
        lora: folder or hub name of the adapter.
        base: --save folder of the model that it was trained on.
        out: the --save folder to make.

    Raises:
        UserError: one sentence on what is wrong; ``out`` does not exist then.
    """
    source = resolve_folder(lora, "--lora", "adapter_config.json")
    adapter = Adapter(source)
    folder = checkpoint_folder(base)
    args = copy.copy(stored_arguments(folder))
    if getattr(args, "lora_rank", None) is not None:
        raise UserError(f"--base {base} holds adapters itself; give the model under them.")
    shape = ModelShape.of(args, args.stop_token_ids[0])
    family, targets = _family(adapter, lora, shape)
    ranks = {a.shape[0] for a, _ in adapter.modules.values()}
    if len(ranks) != 1 or adapter.alphas:
        raise UserError(
            f"--lora {lora}: its layers have ranks {sorted(ranks)} or alphas of their own; one is "
            "needed."
        )
    (rank,) = ranks
    places = adapted_places(shape, family.names, targets)
    blocks = [block for place in places for block in place.blocks(rank)]
    stored = _stored_names(adapter)
    for block in blocks:
        ((name, size),) = block.sources.items()
        if stored[name][1] != size:
            raise UserError(
                f"--lora {lora}: {name} is {list(stored[name][1])}, --base {base} asks for "
                f"{list(size)}; the adapter was made for another model."
            )
    of_head = (shape.vocab_size, shape.hidden_size)
    # PEFT saves no other weight of the base than that of an adapted head.
    adapter.check_copies(
        lambda _: CheckpointReader(Path(folder)).read("output_layer.weight", (0, 0), of_head), base
    )
    args.lora_rank, args.lora_alpha, args.lora_targets = rank, adapter.alpha, list(targets)
    args.lora_rslora = adapter.rank_stabilized
    args.lora_base, args.lora_base_mark = os.path.abspath(base), os.path.basename(folder)
    args.lora_base_fingerprint = fingerprint(folder)

    def read(block: Block) -> Tensor:
        (name,) = block.sources
        tensor = read_tensor(source / WEIGHTS, stored[name][0])
        return block.pack([tensor.to(args.params_dtype)])

    numbers = sum(torch.Size(block.shape).numel() for block in blocks)
    with atomic_folder(out, needed=numbers * args.params_dtype.itemsize) as partial:
        release = partial / "release"
        release.mkdir()
        common = {"args": args, "checkpoint_version": 3.0, "iteration": 0}
        write_checkpoint(release, blocks, args.params_dtype, read, {}, common)
        (partial / TRACKER).write_text("release")
    print(
        f"{out}: adapters of rank {rank} on {' '.join(targets)}. Pass it with "
        "--pretrained-checkpoint and --use-checkpoint-args to train on, with --load to evaluate."
    )


def _family(adapter: Adapter, lora: str, shape: ModelShape) -> tuple[Family, tuple[str, ...]]:
    """Find the family whose layers an adapter names, and the projections that it adapts."""
    for family in FAMILIES.values():
        targets = targets_in(list(adapter.modules), family.names, shape)
        if targets:
            return family, targets_of(targets)
    raise UserError(
        f"--lora {lora}: adapts {min(adapter.modules, default='nothing')}, which is no layer of a "
        f"model of {', '.join(FAMILIES)} with {shape.num_layers} layers."
    )


def _stored_names(adapter: Adapter) -> Mapping[str, tuple[str, tuple[int, ...]]]:
    """Map PEFT's present names of the matrices to those in the file, and their shapes."""
    return {
        f"{PREFIX}{path}.lora_{letter}.weight": (side.name, side.shape)
        for path, sides in adapter.modules.items()
        for letter, side in zip("AB", sides, strict=True)
    }
