"""A model of a published shape through the converter and back: equal bytes, time, memory.

    python -m benchmarks.conversion llada2 --layers 15 --folder /tmp/conversion

Writes a Hugging Face folder of random weights, converts it to a checkpoint and back, each in a
process of its own, and compares every tensor by its hash, read by code that shares nothing with the
converter. The source's weights go before the way back, the checkpoint before the hashes are taken
again, everything at the end: the disk holds two copies of the model at most.
"""

import argparse
import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_espo.commands.make_random_model import PUBLISHED, tiny
from megatron_espo.conversion.families import FAMILIES
from megatron_espo.conversion.random_model import write_random_model
from megatron_espo.data.tokenizer import byte_tokenizer
from megatron_espo.errors import UserError
from megatron_espo.model.shape import ModelShape
from megatron_espo.startup.setup import run_entry_point

GB = 1e9
_TOOL = Path(__file__).parents[1] / "tools" / "convert_hf.py"
_CHUNK = 1 << 24


class Stored(NamedTuple):
    """A tensor of a safetensors file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    digest: str


class Cost(NamedTuple):
    """What a process took: seconds of the clock and of its processor, peak bytes in memory."""

    clock: float
    processor: float
    memory: int


def main(argv: Sequence[str]) -> None:
    """Measure and print a Markdown table.

    Args:
        argv: command line.

    Raises:
        UserError: the disk has no room, or a conversion or a tensor's way back failed.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--layers", type=int, help="of the published ones, from the first")
    parser.add_argument("--tiny", action="store_true", help="few and narrow layers")
    parser.add_argument("--folder", type=Path, required=True, help="to make, and to delete")
    parser.add_argument("--leave-free", type=float, default=15.0, help="GB of its disk")
    options = parser.parse_args(argv)
    shape = shape_of(options.family, options.layers, options.tiny)
    options.folder.mkdir(parents=True)
    try:
        print(measure(options.family, shape, options.folder, options.leave_free * GB), flush=True)
    finally:
        shutil.rmtree(options.folder)


def shape_of(family: str, layers: int | None, small: bool) -> ModelShape:
    """Cut a published shape.

    Args:
        family: whose.
        layers: how many are left; None for all.
        small: whether they are made narrow.

    Returns:
        The shape.
    """
    shape = tiny(PUBLISHED[family]) if small else PUBLISHED[family]
    if layers is None:
        return shape
    experts = shape.experts
    if experts is not None:
        experts = dataclasses.replace(experts, layers=experts.layers[:layers])
    return dataclasses.replace(shape, num_layers=layers, experts=experts)


def measure(family: str, shape: ModelShape, folder: Path, leave_free: float) -> str:
    """Convert a model both ways.

    Args:
        family: of the model.
        shape: of the model.
        folder: an empty one.
        leave_free: bytes of its disk that stay free.

    Returns:
        A Markdown table.

    Raises:
        UserError: as :func:`main`.
    """
    source, checkpoint, back = folder / "hf", folder / "megatron", folder / "back"
    started = time.perf_counter()
    # In a process of its own: a child's peak begins with its parent's.
    making = multiprocessing.get_context("spawn").Process(target=make, args=(family, shape, source))
    making.start()
    making.join()
    if making.exitcode != 0:
        raise UserError(f"--folder {folder}: the model was not made; see above.")
    made = time.perf_counter() - started
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    free = shutil.disk_usage(folder).free
    if free - size < leave_free:
        raise UserError(
            f"--folder {folder}: {free / GB:.1f} GB are free and {size / GB:.1f} GB more are "
            f"needed, --leave-free {leave_free / GB:g} are to stay; pass fewer --layers."
        )
    before = hashes(source)
    there = convert("to-megatron", "--hf", str(source), "--out", str(checkpoint))
    for path in source.glob("*.safetensors"):
        path.unlink()
    # The index is left, from which the tensors are split into files as they were.
    home = convert(
        *("to-hf", "--megatron", str(checkpoint), "--hf-template", str(source)),
        *("--out", str(back)),
    )
    shutil.rmtree(checkpoint)
    if (found := difference(before, hashes(back))) is not None:
        raise UserError(f"not the same: {found}.")
    rows = [
        f"| {name} | {cost.clock:.0f} s | {cost.processor:.0f} s | {cost.memory / GB:.2f} GB |"
        for name, cost in (("to-megatron", there), ("to-hf", home))
    ]
    return "\n".join(
        [
            f"{family}, {shape.num_layers} layers, {size / GB:.1f} GB, made in {made:.0f} s: "
            f"{len(before):,} of {len(before):,} tensors equal in {_files(before)} files",
            "| | wall clock | processor | peak resident memory |",
            "|---|---|---|---|",
            *rows,
        ]
    )


def make(family: str, shape: ModelShape, folder: Path) -> None:
    """Make a model folder of random weights.

    Args:
        family: of the model.
        shape: of the model.
        folder: to make.
    """
    tokenizer = byte_tokenizer()
    if tokenizer.mask_token_id != shape.mask_token_id:
        tokenizer.mask_token = None
    write_random_model(folder, FAMILIES[family], shape, torch.bfloat16, tokenizer)


def _files(tensors: Mapping[str, Stored]) -> int:
    return len({stored.file for stored in tensors.values()})


def hashes(folder: Path) -> dict[str, Stored]:
    """Hash the tensors of a folder's safetensors files.

    Args:
        folder: of a model.

    Returns:
        By name.
    """
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            for name, entry in json.loads(file.read(length)).items():
                if name == "__metadata__":
                    continue
                start, end = entry["data_offsets"]
                file.seek(8 + length + start)
                digest = hashlib.sha256()
                for place in range(start, end, _CHUNK):
                    digest.update(file.read(min(_CHUNK, end - place)))
                shape = tuple(entry["shape"])
                found[name] = Stored(path.name, entry["dtype"], shape, digest.hexdigest())
    return found


def difference(before: Mapping[str, Stored], after: Mapping[str, Stored]) -> str | None:
    """Find the first tensor that did not come back.

    Args:
        before: the source's, by name.
        after: those that came back.

    Returns:
        What it was and is, or None.
    """
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            return f"{name} was {before.get(name)} and is {after.get(name)}"
    return None


def convert(*flags: str) -> Cost:
    """Run the converter.

    Args:
        *flags: its command line.

    Returns:
        What it took.

    Raises:
        UserError: it failed.
    """
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-W", "ignore", str(_TOOL), *flags])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise UserError(f"{' '.join(flags)}: the converter ended with {process.returncode}.")
    return Cost(
        time.perf_counter() - started,
        usage.ru_utime + usage.ru_stime,
        usage.ru_maxrss * 1024,
    )


if __name__ == "__main__":
    run_entry_point(main)
