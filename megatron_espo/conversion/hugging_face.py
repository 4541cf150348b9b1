"""Hugging Face model folders: what they hold, read tensor by tensor and written shard by shard."""

import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_espo.errors import UserError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Types of weights that are understood, by their names in safetensors."""

# Weights in any format; everything else in a folder is copied as it is.
_OTHER_FORMATS = ("bin", "pt", "pth", "gguf", "h5", "msgpack", "onnx")
_WEIGHTS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.bin.index.json",
    *(f"*.{end}" for end in _OTHER_FORMATS),
)


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies and what it is."""

    file: str
    shape: tuple[int, ...]
    dtype: str


def resolve_folder(name: str, flag: str, config: str = "config.json", weights: bool = True) -> Path:
    """Return a local folder; a name on the Hugging Face hub is downloaded.

    Args:
        name: a folder, or ``ORGANIZATION/MODEL``.
        flag: the flag it came from, for messages.
        config: the file that makes it one.
        weights: whether the weights are needed.

    Returns:
        The folder.

    Raises:
        UserError: there is no such folder or model, or it has no such file.
    """
    folder = Path(name)
    if not folder.is_dir():
        if folder.is_absolute() or name.count("/") != 1:
            raise UserError(
                f"{flag} {name}: no such folder; give one, or a name on the Hugging Face hub "
                "(ORGANIZATION/MODEL)."
            )
        skipped = [f"*.{end}" for end in _OTHER_FORMATS]
        skipped += [] if weights else ["*.safetensors"]
        try:
            folder = Path(snapshot_download(name, ignore_patterns=skipped))
        except (OSError, HFValidationError) as error:
            first = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(
                f"{flag} {name}: no such folder here, and the Hugging Face hub does not give it "
                f"({first})."
            ) from error
    if not (folder / config).is_file():
        raise UserError(f"{flag} {name}: holds no {config}; give a folder that does.")
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: the file is missing or holds none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}).") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object.")
    return content


def weight_map(folder: Path) -> dict[str, str] | None:
    """Read which file holds which tensor.

    Args:
        folder: a model folder.

    Returns:
        Tensor -> file; None if the folder holds no weights and no index.

    Raises:
        UserError: the index is broken.
    """
    if (folder / INDEX).is_file():
        files = read_json(folder / INDEX).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(f, str) for f in files.values()):
            raise UserError(f'{folder / INDEX}: has no "weight_map" of tensor and file names.')
        return files
    if (folder / SINGLE).is_file():
        return dict.fromkeys(read_headers(folder / SINGLE), SINGLE)
    return None


def _no_safetensors(folder: Path) -> str:
    """Say what a folder without safetensors holds instead."""
    others = sorted(
        path.name for path in folder.iterdir() if path.suffix.removeprefix(".") in _OTHER_FORMATS
    )
    if not others:
        return f"{folder}: holds neither {INDEX} nor {SINGLE}; weights must be safetensors."
    named = others[0] + (f" and {len(others) - 1} more" if len(others) > 1 else "")
    return (
        f"{folder}: its weights are in {named}, and only safetensors are read (other files may run "
        "code); load the model with transformers and write it with save_pretrained."
    )


def read_headers(path: Path) -> dict[str, StoredTensor]:
    """Read what a file holds, and check that it is as long as it should be.

    Raises:
        UserError: the file is broken.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: StoredTensor(path.name, tuple(part.get_shape()), part.get_dtype())
                for name, part in slices.items()
            }
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: is no complete safetensors file ({error}); download it again."
        ) from error


def read_tensor(path: Path, name: str) -> Tensor:
    """Read a tensor; its pages are given back when it is dropped.

    Raises:
        UserError: the file is broken.
    """
    try:
        # Opened for each tensor: an open file keeps what was read of it in memory.
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot read {name} ({error}).") from error


class HuggingFaceWeights:
    """The weights of a model folder."""

    def __init__(self, folder: Path) -> None:
        """Read the headers of all files.

        Args:
            folder: a model folder.

        Raises:
            UserError: a file is missing or cut short, or index and files disagree.
        """
        self.folder = folder
        files = weight_map(folder)
        if files is None:
            raise UserError(_no_safetensors(folder))
        self.tensors: dict[str, StoredTensor] = {}
        for file in sorted(set(files.values())):
            path = folder / file
            if Path(file).name != file or not path.is_file():
                raise UserError(f"{folder / INDEX}: names {file}, which is not in the folder.")
            for name, stored in read_headers(path).items():
                if files.get(name) == file:
                    self.tensors[name] = stored
                elif name not in files:
                    raise UserError(f"{folder / INDEX}: has no entry for {name} of {file}.")
        for name, file in files.items():
            if name not in self.tensors:
                raise UserError(f"{folder / INDEX}: says that {file} holds {name}; it does not.")

    def read(self, name: str) -> Tensor:
        """Read a tensor (see :func:`read_tensor`)."""
        return read_tensor(self.folder / self.tensors[name].file, name)

    def check(
        self, wanted: Mapping[str, tuple[int, ...]], copies: Mapping[str, str] | None = None
    ) -> None:
        """Compare with the tensors that a model has.

        Args:
            wanted: name -> shape.
            copies: tensors that there may be besides -> those that they must be equal to.

        Raises:
            UserError: a tensor is missing, left over, has another shape, or is no copy.
        """
        copies = copies or {}
        for name, shape in wanted.items():
            if name not in self.tensors:
                raise UserError(f"{self.folder}: the tensor {name} is missing.")
            found = self.tensors[name].shape
            if found != shape:
                raise UserError(
                    f"{self.folder / self.tensors[name].file}: {name} has the shape "
                    f"{list(found)}, config.json asks for {list(shape)}."
                )
        for name, stored in self.tensors.items():
            if name in copies:
                if not torch.equal(self.read(name), self.read(copies[name])):
                    raise UserError(
                        f"{self.folder / stored.file}: {name} differs from {copies[name]}, which "
                        "config.json ties it to; correct the file or untie them."
                    )
            elif name not in wanted:
                raise UserError(
                    f"{self.folder / stored.file}: the tensor {name} has no place in a model of "
                    "this config.json."
                )

    def dtype(self, convert: bool = False, own: Collection[str] = ()) -> torch.dtype:
        """Return the type of the weights.

        Args:
            convert: they will be converted, so that types may differ.
            own: tensors whose type may differ in any case.

        Raises:
            UserError: types differ, or one is no floating-point type of 16 or 32 bits.
        """
        first = next(name for name in self.tensors if name not in own)
        for name, stored in self.tensors.items():
            if stored.dtype not in DTYPES:
                raise UserError(
                    f"{self.folder / stored.file}: {name} is {stored.dtype}; only "
                    f"{', '.join(DTYPES)} can be converted."
                )
            if stored.dtype != self.tensors[first].dtype and not convert and name not in own:
                raise UserError(
                    f"{self.folder / stored.file}: {name} is {stored.dtype} and {first} is "
                    f"{self.tensors[first].dtype}; pass --dtype to convert all to one type."
                )
        return DTYPES[self.tensors[first].dtype]


def write_weights(
    folder: Path,
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    read: Callable[[str], Tensor],
    files: Mapping[str, str] | None = None,
    max_shard_size: str = "5GB",
) -> None:
    """Write a model's weights, one file after the other.

    Args:
        folder: where to.
        tensors: name -> shape, type; in the order in which they are split into files.
        read: makes a tensor; called once for each.
        files: name -> file; None splits them anew.
        max_shard_size: most bytes of a file when they are split anew.

    Raises:
        OSError: the disk is full, and the like.
        SafetensorError: likewise.
    """
    total = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in tensors.values())
    if files is None:
        empty = {
            name: torch.empty(shape, dtype=dtype, device="meta")
            for name, (shape, dtype) in tensors.items()
        }
        files = split_torch_state_dict_into_shards(
            empty, max_shard_size=max_shard_size
        ).tensor_to_filename
    by_file: dict[str, list[str]] = {}
    for name in tensors:
        by_file.setdefault(files[name], []).append(name)
    for file, names in by_file.items():
        save_file({name: read(name) for name in names}, folder / file, metadata={"format": "pt"})
        # safetensors makes files that nobody else may read.
        (folder / file).chmod(0o666 & ~_umask())
    if set(by_file) != {SINGLE}:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: files[name] for name in sorted(tensors)},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def copy_other_files(source: Path, target: Path) -> None:
    """Copy everything but the weights: configs, tokenizer, code.

    Args:
        source: a model folder.
        target: an existing folder.
    """
    shutil.copytree(
        source,
        target,
        ignore=shutil.ignore_patterns(*_WEIGHTS, ".*", "__pycache__"),
        dirs_exist_ok=True,
    )
