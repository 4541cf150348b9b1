"""LoRA adapters in PEFT's format, merged into the weights while these are read.

A PEFT adapter holds, for a linear layer with weight W, two matrices A [r, in] and B [out, r]; the
layer computes with W + scale * B A, where scale is lora_alpha / r (rank-stabilized: / sqrt(r)).
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_espo.conversion.hugging_face import (
    DTYPES,
    HuggingFaceWeights,
    read_headers,
    read_json,
    read_tensor,
)
from megatron_espo.errors import UserError
from megatron_espo.model.published_config import Config

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# base_model.model.PATH.lora_A.weight; older files name the adapter after lora_A.
# Beside the adapter of a head PEFT saves the head's own weight.
_COPY = re.compile(r"base_model\.model\.(?P<path>.+)\.base_layer\.weight")
_NAME = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<side>[AB])(\.[^.]+)?\.weight")


class Side(NamedTuple):
    """One of an adapter's two matrices of a layer."""

    name: str
    shape: tuple[int, ...]


def merge(weight: Tensor, delta: Tensor | None) -> Tensor:
    """Add an update to a weight in float32 and round once, as PEFT does.

    Args:
        weight: of any type.
        delta: float32 of its shape, or None.

    Returns:
        A tensor of the weight's type; the weight itself without an update.
    """
    return weight if delta is None else (weight.float() + delta).to(weight.dtype)


class MergedWeights(HuggingFaceWeights):
    """The weights of a model folder with an adapter merged in."""

    def __init__(self, folder: Path, adapter: Path) -> None:
        """Read the headers of the model and of the adapter.

        Args:
            folder: the model folder.
            adapter: the adapter's folder.

        Raises:
            UserError: the adapter is broken, of a kind that is not supported, or made for
                another model.
        """
        super().__init__(folder)
        self._adapter = Adapter(adapter)
        for path, (a, b) in self._adapter.modules.items():
            weight = self.tensors.get(f"{path}.weight")
            if weight is None:
                raise UserError(
                    f"--lora {adapter}: adapts {path}, which {folder} does not have; the adapter "
                    "was made for another model."
                )
            if weight.shape != (b.shape[0], a.shape[1]):
                raise UserError(
                    f"--lora {adapter}: the adapter of {path} fits a weight of "
                    f"{[b.shape[0], a.shape[1]]}, {folder} has {list(weight.shape)}."
                )
        self._adapter.check_copies(
            lambda path: super(MergedWeights, self).read(f"{path}.weight"), str(folder)
        )

    def read(self, name: str) -> Tensor:
        """Read a tensor; an adapted weight is merged in float32 and rounded once."""
        return merge(super().read(name), self._adapter.delta(name.removesuffix(".weight")))

    def unused_targets(self) -> list[str]:
        """List the adapter's target modules that no weight of the model is called by.

        As PEFT reads them, a name is the end of a path. A pattern or "all-linear" names no module.
        """
        paths = [f".{name.removesuffix('.weight')}" for name in self.tensors]
        return [
            target
            for target in self._adapter.targets
            if not any(path.endswith(f".{target}") for path in paths)
        ]

    @property
    def num_merged(self) -> int:
        """Number of weights that the adapter changes."""
        return len(self._adapter.modules)


class Adapter:
    """A LoRA adapter's folder.

    Attributes:
        modules: path of the adapted layer -> the names of its A and B, and their shapes.
        targets: the names of layers that were to be adapted; empty where a pattern said which.
        alpha: the update is scaled by alpha / rank,
        rank_stabilized: or by alpha / sqrt(rank).
        alphas: pattern of paths -> an alpha of their own.
    """

    def __init__(self, folder: Path) -> None:
        """Read config and headers.

        Raises:
            UserError: the folder is broken or its adapter is not plain LoRA.
        """
        if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
            raise UserError(f"--lora {folder}: must be a folder with {CONFIG} and {WEIGHTS}.")
        config = Config(read_json(folder / CONFIG), str(folder / CONFIG))
        _require_plain_lora(config)
        self.alpha = config.number("lora_alpha", float)
        self.rank_stabilized = bool(config.fields.get("use_rslora", False))
        self.alphas = dict(config.fields.get("alpha_pattern") or {})
        targets = config.fields.get("target_modules") or []
        self.targets = [] if isinstance(targets, str) else list(targets)
        self._file = folder / WEIGHTS
        self.modules, self._copies = _find_modules(self._file)

    def check_copies(self, read: Callable[[str], Tensor], base: str) -> None:
        """Compare the weights of the base that the file brings along with the base's own.

        Args:
            read: reads the weight of an adapted layer by its path.
            base: where from, for messages.

        Raises:
            UserError: they differ.
        """
        for path, name in self._copies.items():
            theirs, ours = read_tensor(self._file, name), read(path)
            if not torch.equal(theirs.to(ours.dtype), ours):
                raise UserError(
                    f"{self._file}: brings its own weight of {path}, which is not that of {base}; "
                    "the adapter was made for another model."
                )

    def delta(self, module: str) -> Tensor | None:
        """Compute what is added to a layer's weight.

        Args:
            module: path of the layer.

        Returns:
            float32, of the weight's shape; None if the layer is not adapted.
        """
        if module not in self.modules:
            return None
        a, b = (read_tensor(self._file, side.name).float() for side in self.modules[module])
        rank, alpha = a.size(0), self.alpha
        for pattern, own in self.alphas.items():
            if re.match(rf"(.*\.)?({pattern})$", module):  # the first one, as in PEFT
                alpha = own
                break
        return torch.mm(b, a).mul_(alpha / (rank**0.5 if self.rank_stabilized else rank))


# Fields of adapter_config.json that change nothing of what an adapter computes, or are read here.
# Which layers it adapts, and with which ranks, is read from its file.
_HARMLESS = frozenset(
    """
    alpha_pattern auto_mapping base_model_name_or_path corda_config eva_config exclude_modules
    inference_mode layers_pattern layers_to_transform lora_alpha lora_dropout lora_ga_config
    megatron_config megatron_core peft_version qalora_group_size r rank_pattern revision
    runtime_config target_modules task_type use_rslora velora_config
    """.split()
)
# What must be switched off, in each way that PEFT's versions write this.
_OFF: tuple[Any, ...] = (None, False, [], {}, "")


def _require_plain_lora(config: Config) -> None:
    """Refuse adapters that compute something else than W + scale * B A.

    PEFT has a new variant every few months, and each is a field: one that is not known here must be
    off.
    """
    config.require("peft_type", "LORA")
    config.require("bias", "none")
    # Other ways to start (PiSSA, OLoRA, LoftQ) change the base weights, too.
    config.require("init_lora_weights", True, False, "gaussian", "orthogonal")
    known = {"peft_type", "bias", "init_lora_weights", *_HARMLESS}
    for name, value in config.fields.items():
        if name not in known and not any(value == off and type(value) is type(off) for off in _OFF):
            raise UserError(
                f'{config.source}: "{name}" is {value!r}, which is not supported; only plain LoRA '
                "can be merged, and this field must be empty or off."
            )


def _find_modules(path: Path) -> tuple[dict[str, tuple[Side, Side]], dict[str, str]]:
    """Pair the matrices of an adapter file by layer; also list what it holds of the base."""
    sides: dict[str, dict[str, Side]] = {}
    copies: dict[str, str] = {}
    for name, stored in read_headers(path).items():
        if copy := _COPY.fullmatch(name):
            copies[copy["path"]] = name
            continue
        match = _NAME.fullmatch(name)
        if match is None or len(stored.shape) != 2 or stored.dtype not in DTYPES:
            raise UserError(f"{path}: {name} is no LoRA matrix of a linear layer.")
        sides.setdefault(match["path"], {})[match["side"]] = Side(name, stored.shape)
    for module, pair in sides.items():
        if set(pair) != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
            raise UserError(f"{path}: the LoRA matrices of {module} do not fit together.")
    for module, name in copies.items():
        if module not in sides:
            raise UserError(f"{path}: {name} belongs to no adapted layer.")
    return {module: (pair["A"], pair["B"]) for module, pair in sides.items()}, copies
