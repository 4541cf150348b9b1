"""Checkpoints of adapters and PEFT's folders: names, shapes, and the update of a weight.

Every projection has matrices of its own on both sides, so that only names and the layers' common
axis differ; where a family has q, k and v in one layer, PEFT has one adapter of the sum of their
ranks. Names of the projections are those of the model's weights (conversion/families.py).
"""

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_espo.adapters.base import lora_settings
from megatron_espo.adapters.projections import HEAD, PROJECTIONS, Projection, targets_of
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
# What some families have in one projection, in its order.
_FUSED = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Place:
    """A projection of one layer that can have an adapter.

    Attributes:
        projection: its name in adapters/projections.py.
        layer: number of the transformer layer; 0 for the head.
        path: what a model folder calls it, without ``.weight``. Where the folder has q, k and v in
            one, the name that each would have.
        size: shape of its weight, ``[out, in]``.
        module: Megatron's path of the linear layer that holds it.
        stacked: layers of the model where Megatron stacks them in one tensor, else None.
    """

    projection: str
    layer: int
    path: str
    size: tuple[int, int]
    module: str
    stacked: int | None

    def blocks(self, rank: int) -> tuple[Block, Block]:
        """Describe its matrices A and B in a checkpoint, and what PEFT calls them."""
        rows, columns = self.size

        def block(side: str, size: tuple[int, int]) -> Block:
            return Block(
                f"{self.module}.adapter.{self.projection}_{side.lower()}",
                size if self.stacked is None else (self.stacked, *size),
                (0, 0) if self.stacked is None else (self.layer, 0, 0),
                self.stacked is not None,
                {f"{PREFIX}{self.path}.lora_{side}.weight": size},
            )

        return block("A", (rank, columns)), block("B", (rows, rank))


def places_of(shape: ModelShape, names: Names, projection: Projection) -> list[Place]:
    """List where a model has a projection, as adapters know it.

    In a mixture of experts the feed-forward part is the shared expert's: experts and routers have
    no adapters (:func:`megatron_espo.adapters.attach.attach_adapters`).

    Args:
        shape: the model.
        names: the family's names.
        projection: the projection.

    Returns:
        Its places, layer by layer; one for the head, none in mixtures without a shared expert.
    """
    name, experts = projection.name, shape.experts
    published: str = getattr(names, _FIELDS[name])
    if name == HEAD:
        size = (shape.vocab_size, shape.hidden_size)
        return [Place(name, 0, published, size, projection.layer, None)]
    found = []
    for layer in range(shape.num_layers):
        inner, path, owner = shape.ffn_hidden_size, published, _OWNERS.get(projection.layer, "mlp")
        if owner == "mlp" and experts is not None and experts.layers[layer]:
            if experts.shared_size is None:
                continue
            inner, owner = experts.shared_size, "mlp.shared_experts"
            path = f"{names.shared}{published.rsplit('.', 1)[-1]}"
        # Of a model with mixtures Megatron names each layer.
        number = "" if experts is None else f"{layer}."
        found.append(
            Place(
                name,
                layer,
                names.layer.format(layer=layer) + path,
                _weight_size(shape, name, inner),
                f"decoder.layers.{number}{owner}.{projection.layer}",
                shape.num_layers if experts is None else None,
            )
        )
    return found


def _weight_size(shape: ModelShape, projection: str, inner: int) -> tuple[int, int]:
    hidden, queries = shape.hidden_size, shape.num_attention_heads * shape.head_dim
    pair = shape.num_query_groups * shape.head_dim
    return {
        "q_proj": (queries, hidden),
        "k_proj": (pair, hidden),
        "v_proj": (pair, hidden),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
        "o_proj": (hidden, queries),
    }[projection]


def adapted_places(shape: ModelShape, names: Names, targets: Sequence[str]) -> list[Place]:
    """List the places of adapted projections, by names of adapters/projections.py."""
    chosen = [p for p in PROJECTIONS if p.name in targets]
    return [place for projection in chosen for place in places_of(shape, names, projection)]


@dataclass(frozen=True)
class Module:
    """A linear layer of a model folder, with the projections of it that are adapted.

    Attributes:
        path: what the folder calls it.
        parts: of each adapted projection its place, and its first row of the weight.
        rows: of the weight.
    """

    path: str
    parts: tuple[tuple[Place, int], ...]
    rows: int

    def join(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Make one A and B of those of its parts.

        Several are one of the sum of their ranks: A on top of each other, B in a diagonal, so that
        B A has each part's update in its rows.
        """
        if len(pairs) == 1 and self.rows == pairs[0][1].size(0):
            return pairs[0]
        a = torch.cat([a for a, _ in pairs])
        b, rank = a.new_zeros(self.rows, len(a)), 0
        for (_, row), (_, part) in zip(self.parts, pairs, strict=True):
            b[row : row + part.size(0), rank : rank + part.size(1)] = part
            rank += part.size(1)
        return a, b


def modules_of(shape: ModelShape, names: Names, targets: Sequence[str]) -> dict[str, Module]:
    """List the layers of a model folder that adapters change, by path."""
    modules: dict[str, Module] = {}
    for place in adapted_places(shape, names, targets):
        path, row, rows = place.path, 0, place.size[0]
        if names.fused and place.projection in _FUSED:
            path = names.layer.format(layer=place.layer) + names.fused
            sizes = [_weight_size(shape, name, 0)[0] for name in _FUSED]
            row, rows = sum(sizes[: _FUSED.index(place.projection)]), sum(sizes)
        before = modules[path].parts if path in modules else ()
        modules[path] = Module(path, (*before, (place, row)), rows)
    return modules


@dataclass(frozen=True)
class CheckpointAdapters:
    """The adapters of a checkpoint, read as updates of a model folder's weights.

    Attributes:
        reader: the checkpoint.
        lora: their settings.
        modules: path in the folder -> the layer.
    """

    reader: CheckpointReader
    lora: LoraConfig
    modules: Mapping[str, Module]

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
        targets = targets_of(lora.targets)
        stored = reader.weights()
        wanted = {
            block.key: block.global_shape
            for place in adapted_places(shape, names, targets)
            for block in place.blocks(lora.rank)
        }
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
        return cls(reader, lora, modules_of(shape, names, targets))

    def read(self, path: str) -> tuple[Tensor, Tensor]:
        """Read A and B of a layer of the model folder."""
        assert self.lora.rank is not None
        module = self.modules[path]
        pairs = []
        for place, _ in module.parts:
            a, b = (
                self.reader.read(block.key, block.offset, block.shape).reshape(
                    next(iter(block.sources.values()))
                )
                for block in place.blocks(self.lora.rank)
            )
            pairs.append((a, b))
        return module.join(pairs)

    def delta(self, module: str) -> Tensor | None:
        """Compute what is added to a layer's weight; see :meth:`lora.Adapter.delta`."""
        if module not in self.modules:
            return None
        a, b = (side.float() for side in self.read(module))
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
    modules = modules_of(shape, names, targets_of(lora.targets)).values()
    alpha = float(lora.rank or 0) if lora.alpha is None else lora.alpha
    ranks, alphas = {}, {}
    for module in modules:
        if len(module.parts) > 1:  # their ranks add up, and the scale stays
            count, leaf = len(module.parts), re.escape(module.path.split(".")[-1])
            ranks[leaf] = count * (lora.rank or 0)
            alphas[leaf] = alpha * (math.sqrt(count) if lora.rslora else count)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": 0.0,
        "use_rslora": lora.rslora,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "target_modules": _target_modules(shape, names, list(modules)),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _target_modules(shape: ModelShape, names: Names, modules: Sequence[Module]) -> list[str] | str:
    """Say which layers PEFT is to adapt: the ends of their paths, or a pattern of the whole."""
    first = [places_of(shape, names, p)[:1] for p in PROJECTIONS]
    ends = [place.path.split(".")[-1] for places in first for place in places]
    leaves = list(dict.fromkeys(module.path.split(".")[-1] for module in modules))
    # LLaDA calls two projections ff_out, and experts call theirs as dense layers do: a list would
    # adapt all of them.
    if shape.experts is None and all(ends.count(leaf) == 1 for leaf in leaves):
        return leaves
    any_layer = re.escape(names.layer).replace(re.escape("{layer}"), r"\d+")
    patterns = []
    for module in modules:
        prefix = names.layer.format(layer=module.parts[0][0].layer)
        is_head = not module.path.startswith(prefix)
        rest = re.escape(module.path.removeprefix(prefix))
        patterns.append(rest if is_head else any_layer + rest)
    return f"({'|'.join(dict.fromkeys(patterns))})"


def targets_in(modules: Sequence[str], names: Names, shape: ModelShape) -> tuple[str, ...] | None:
    """Find the projections that a PEFT folder adapts, by a family's names.

    Args:
        modules: paths of the adapted layers.
        names: the family's names.
        shape: the model.

    Returns:
        The projections; None where a path is none of this family's.

    Raises:
        UserError: a projection is adapted in some layers only, or q, k and v as one.
    """
    for layer in range(shape.num_layers if names.fused else 0):
        fused = names.layer.format(layer=layer) + names.fused
        if fused in modules:
            raise UserError(
                f"the adapter changes {fused}, and here queries, keys and values have adapters of "
                "their own: it cannot be trained on; merge it instead (to-megatron --lora)."
            )
    every = {p.name: places_of(shape, names, p) for p in PROJECTIONS}
    places = {place.path: name for name, found in every.items() for place in found}
    if not set(modules) <= places.keys():
        return None
    adapted = [places[module] for module in modules]
    targets = tuple(name for name in every if name in adapted)
    for name in targets:
        if adapted.count(name) < len(every[name]):
            raise UserError(
                f"the adapter changes {name} in {adapted.count(name)} of {len(every[name])} layers "
                "only, and all would be trained; merge it instead (to-megatron --lora)."
            )
    return targets
