"""Checkpoints of adapters and PEFT's folders: names, shapes, and the update of a weight.

Every projection has matrices of its own on both sides, so that only names and the layers' common
axis differ. Names of the projections are those of the model's weights (conversion/families.py).
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_espo.adapters.base import lora_settings
from megatron_espo.adapters.projections import HEAD, PROJECTIONS, targets_of
from megatron_espo.config import LoraConfig
from megatron_espo.conversion.mapping import Block, Names
from megatron_espo.conversion.torch_dist import CheckpointReader
from megatron_espo.errors import UserError
from megatron_espo.model.shape import ModelShape

PREFIX = "base_model.model."
"""PEFT's prefix of a layer's path in its files."""

# Projection -> its name among a family's.
_FIELDS = {
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "o_proj": "attention_output",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    HEAD: "head",
}
_OWNERS = {"linear_qkv": "self_attention", "linear_proj": "self_attention"}


def path_of(names: Names, projection: str, layer: int) -> str:
    """Say what a model folder calls a projection's layer.

    Args:
        names: the family's names.
        projection: one of adapters/projections.py.
        layer: number of the transformer layer; the head has none.

    Returns:
        The path, without ``.weight``.
    """
    name: str = getattr(names, _FIELDS[projection])
    return name if projection == HEAD else names.layer.format(layer=layer) + name


def shape_of(shape: ModelShape, projection: str) -> tuple[int, int]:
    """Return the shape of a projection's weight, ``[out, in]``."""
    hidden, inner = shape.hidden_size, shape.ffn_hidden_size
    queries = shape.num_attention_heads * shape.head_dim
    pair = shape.num_query_groups * shape.head_dim
    return {
        "q_proj": (queries, hidden),
        "k_proj": (pair, hidden),
        "v_proj": (pair, hidden),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
        "o_proj": (hidden, queries),
        HEAD: (shape.vocab_size, hidden),
    }[projection]


def adapter_blocks(
    shape: ModelShape, names: Names, targets: Sequence[str], rank: int
) -> list[Block]:
    """List the blocks of a checkpoint of adapters, and what PEFT calls them.

    Args:
        shape: the model.
        names: the family's names.
        targets: adapted projections.
        rank: r.

    Returns:
        A and B of each projection, layer by layer.

    Raises:
        UserError: the model has experts.
    """
    if shape.experts is not None:
        raise UserError(
            "adapters of a mixture of experts are not converted: train, sample and evaluate them "
            "with --lora-base as they are."
        )
    blocks = []
    for projection in (p for p in PROJECTIONS if p.name in targets):
        name, (rows, columns) = projection.name, shape_of(shape, projection.name)
        head = name == HEAD
        owner = "" if head else f"decoder.layers.{_OWNERS.get(projection.layer, 'mlp')}."
        for layer in range(1 if head else shape.num_layers):
            path = PREFIX + path_of(names, name, layer)
            for side, size in (("A", (rank, columns)), ("B", (rows, rank))):
                blocks.append(
                    Block(
                        f"{owner}{projection.layer}.adapter.{name}_{side.lower()}",
                        size if head else (shape.num_layers, *size),
                        (0, 0) if head else (layer, 0, 0),
                        not head,
                        {f"{path}.lora_{side}.weight": size},
                    )
                )
    return blocks


@dataclass(frozen=True)
class CheckpointAdapters:
    """The adapters of a checkpoint, read as updates of a model folder's weights.

    Attributes:
        reader: the checkpoint.
        lora: their settings.
        blocks: PEFT's name -> where it lies.
    """

    reader: CheckpointReader
    lora: LoraConfig
    blocks: Mapping[str, Block]

    @classmethod
    def of(
        cls, reader: CheckpointReader, args: argparse.Namespace, shape: ModelShape, names: Names
    ) -> "CheckpointAdapters":
        """Describe a checkpoint's adapters.

        Args:
            reader: the checkpoint.
            args: its arguments.
            shape: the model.
            names: the family's names.

        Raises:
            UserError: it holds something else than its arguments say.
        """
        lora = lora_settings(args)
        assert lora.rank is not None
        blocks = adapter_blocks(shape, names, targets_of(lora.targets), lora.rank)
        stored, wanted = reader.weights(), {block.key: block.global_shape for block in blocks}
        for key in stored.keys() | wanted.keys():
            found = stored[key][0] if key in stored else None
            size = wanted.get(key)
            # A layout may have padded the vocabulary.
            padded = found and size and key.endswith(f"{HEAD}_b") and found[0] >= size[0]
            if found != size and not (padded and found and size and found[1:] == size[1:]):
                raise UserError(
                    f"{reader.folder}: {key} has the shape {found}, its adapters of rank "
                    f"{lora.rank} ask for {size}."
                )
        return cls(reader, lora, {next(iter(block.sources)): block for block in blocks})

    def read(self, name: str) -> Tensor:
        """Read a matrix by PEFT's name."""
        block = self.blocks[name]
        return self.reader.read(block.key, block.offset, block.shape).reshape(
            next(iter(block.sources.values()))
        )

    def delta(self, module: str) -> Tensor | None:
        """Compute what is added to a layer's weight; see :meth:`lora.Adapter.delta`."""
        path = f"{PREFIX}{module}.lora_"
        if f"{path}A.weight" not in self.blocks:
            return None
        a, b = (self.read(f"{path}{side}.weight").float() for side in "AB")
        return torch.mm(b, a).mul_(self.lora.scale)


def peft_config(
    lora: LoraConfig, shape: ModelShape, names: Names, base: str | None
) -> dict[str, Any]:
    """Write the adapter_config.json of adapters.

    Args:
        lora: their settings.
        shape: the model.
        names: the family's names.
        base: name or folder of the model that they belong to.

    Returns:
        The fields.
    """
    targets = targets_of(lora.targets)
    leaves = [path_of(names, name, 0).split(".")[-1] for name in targets]
    modules: list[str] | str = leaves
    everywhere = [path_of(names, p.name, 0).split(".")[-1] for p in PROJECTIONS]
    if any(everywhere.count(leaf) > 1 for leaf in leaves):
        # LLaDA calls two projections ff_out: a list would adapt both.
        paths = [
            re.escape(path_of(names, name, 0)).replace(r"\.0\.", r"\.\d+\.") for name in targets
        ]
        modules = f"({'|'.join(paths)})"
    alpha = float(lora.rank or 0) if lora.alpha is None else lora.alpha
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": 0.0,
        "use_rslora": lora.rslora,
        "target_modules": modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def targets_in(modules: Sequence[str], names: Names, num_layers: int) -> tuple[str, ...] | None:
    """Find the projections that a PEFT folder adapts, by a family's names.

    Args:
        modules: paths of the adapted layers.
        names: the family's names.
        num_layers: of the model.

    Returns:
        The projections; None where a path is none of this family's.

    Raises:
        UserError: a projection is adapted in some layers only.
    """
    places = {
        path_of(names, p.name, layer): (p.name, layer)
        for p in PROJECTIONS
        for layer in range(1 if p.name == HEAD else num_layers)
    }
    if not set(modules) <= places.keys():
        return None
    adapted = {places[module] for module in modules}
    targets = tuple(p.name for p in PROJECTIONS if any(name == p.name for name, _ in adapted))
    for name in targets:
        layers = [layer for other, layer in sorted(adapted) if other == name]
        if len(layers) < (1 if name == HEAD else num_layers):
            raise UserError(
                f"the adapter changes {name} in {len(layers)} of {num_layers} layers only, and all "
                "would be trained; merge it instead (to-megatron --lora)."
            )
    return targets
