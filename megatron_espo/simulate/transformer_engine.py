"""Transformer Engine's own Python layer over kernels that are shapes (``te_kernels``).

The wheel on PyPI holds it; its libraries are not loaded, so no CUDA is needed. It may be installed
as usual, or lie unpacked in a folder (``make te`` puts it into the virtual environment).
"""

import dataclasses
import enum
import importlib
import os
import re
import sys
import types
from pathlib import Path
from typing import Any

import torch

from megatron_espo.dry_run import support
from megatron_espo.simulate import te_kernels

SEEN_WITH = "2.20"
_EXTENSION = "transformer_engine_torch"
_OVER_TENSORS = (
    *("multi_tensor_adam", "multi_tensor_adam_param_remainder", "multi_tensor_adam_fp8"),
    *("multi_tensor_adam_capturable", "multi_tensor_adam_capturable_master"),
    *("multi_tensor_scale", "multi_tensor_scale_tensor", "multi_tensor_sgd"),
    "multi_tensor_unscale_l2norm",
)
_ENUMS = (
    *("NVTE_QKV_Layout", "NVTE_QKV_Format", "NVTE_Bias_Type", "NVTE_Mask_Type"),
    *("NVTE_Softmax_Type", "NVTEScalingMode", "CommOverlapType", "CommOverlapAlgo"),
    *("NVTERoutingMapFormat", "NVTEQBHistogramMode"),
)
_CLASSES = (
    *("CommOverlap", "CommOverlapP2P", "CommOverlapHelper", "FP8TensorMeta", "CommOverlapBase"),
)
# What the extension says of its libraries.
_CONSTANTS = {
    "get_cublasLt_version": 130400,
    "get_cudnn_version": 92600,
    "get_num_cublas_streams": 4,
    "device_supports_multicast": True,
    "get_stream_priority_range": (0, -5),
    "ubuf_built_with_mpi": False,
}


class _Named(type):
    """An enumeration whose members come into being when they are named."""

    members: dict[str, Any]

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        member = _Member(len(cls.members))
        member.name = name
        cls.members[name] = member
        setattr(cls, name, member)
        return member


class _Member(int):
    name: str


def install() -> str | None:
    """Let this process import Transformer Engine's Python layer.

    Returns:
        Its version, or None where it is not here: Megatron then finds no Transformer Engine.
    """
    folder = support.transformer_engine_folder()
    if folder is None:
        return None
    sys.path.insert(0, str(folder))
    # Its import looks for shared libraries unless it is told that it is being built.
    os.environ["NVTE_PROJECT_BUILDING"] = "1"
    os.environ.pop("NVTE_RELEASE_BUILD", None)
    sys.modules[_EXTENSION] = _extension(folder)
    package = types.ModuleType("transformer_engine")
    package.__path__ = [str(folder / "transformer_engine")]
    sys.modules["transformer_engine"] = package
    common = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = lambda framework: None  # type: ignore[attr-defined]
    del sys.modules["transformer_engine"]
    engine = importlib.import_module("transformer_engine")
    engine.common = common  # type: ignore[attr-defined]
    _allow_fake_tensors_in_attention()
    return str(engine.__version__)


def _extension(folder: Path) -> types.ModuleType:
    """Make a module in place of the C++ extension."""
    module = types.ModuleType(_EXTENSION)
    for name in vars(te_kernels):
        if not name.startswith("_") and name not in ("Any", "Tensor", "torch", "enum", "device"):
            setattr(module, name, getattr(te_kernels, name))
    for name in _OVER_TENSORS:
        setattr(module, name, te_kernels.over_tensors(name))
    for name in _ENUMS:
        setattr(module, name, _Named(name, (), {"members": {}}))
    for name in _CLASSES:
        setattr(module, name, type(name, (), {}))
    for name, value in _CONSTANTS.items():
        setattr(module, name, lambda *args, value=value, **kwargs: value)
    for group, tensors in (("FP8FwdTensors", 3), ("FP8BwdTensors", 2)):
        setattr(module, group, _tensor_names(group, tensors))
    # The package imports names one by one, with a star, and through the module.
    module.__getattr__ = _missing  # type: ignore[method-assign]
    for file in (folder / "transformer_engine" / "pytorch").rglob("*.py"):
        for name in re.findall(r"\btex\.([A-Za-z_][A-Za-z_0-9]*)", file.read_text("utf-8")):
            if name not in vars(module):
                setattr(module, name, _missing(name))
    return module


def _tensor_names(name: str, tensors: int) -> Any:
    """Number the tensors of up to three matrix products, as FP8 scales are laid out."""
    if tensors == 3:
        names = [f"GEMM{i}_{part}" for i in (1, 2, 3) for part in ("INPUT", "WEIGHT", "OUTPUT")]
    else:
        names = [f"GRAD_{part}{i}" for i in (1, 2, 3) for part in ("OUTPUT", "INPUT")]
    return enum.IntEnum(name, {member: place for place, member in enumerate(names)})


def _missing(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def call(*args: object, **kwargs: object) -> None:
        raise NotImplementedError(f"Transformer Engine's kernel {name} is not simulated")

    call.__name__ = name
    return call


def _allow_fake_tensors_in_attention() -> None:
    """Attention backends are chosen for plain tensors; a fake one is of a class of its own."""
    utils: Any = importlib.import_module(
        "transformer_engine.pytorch.attention.dot_product_attention.utils"
    )
    choose = utils.get_attention_backend

    def get_attention_backend(parameters: Any) -> Any:
        return choose(dataclasses.replace(parameters, qkv_type=torch.Tensor))

    utils.get_attention_backend = get_attention_backend
