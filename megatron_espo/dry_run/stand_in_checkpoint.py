"""Checkpoints that a simulated job finds where the real one would have some."""

import argparse
import json
from pathlib import Path

import torch

from megatron_espo.dry_run.job import SIMULATED_BASE
from megatron_espo.startup.adapters import SETTINGS


def base_arguments(args: argparse.Namespace) -> argparse.Namespace:
    """Arguments of the model under the adapters, if any."""
    return argparse.Namespace(**{**vars(args), **dict.fromkeys(SETTINGS)})


def adapter_arguments(args: argparse.Namespace, root: Path) -> argparse.Namespace:
    """Arguments of adapters on the base in a folder; see simulate/stand_ins.py."""
    base = {"lora_base": str(root), "lora_base_mark": "iter_0000001"}
    return argparse.Namespace(**{**vars(args), **base, "lora_base_fingerprint": SIMULATED_BASE})


def write_checkpoint(root: Path, args: argparse.Namespace) -> None:
    """Write the parts of a checkpoint that are not weights: the simulation has none.

    Args:
        root: the folder of a run, as --load or --pretrained-checkpoint name it.
        args: Megatron's arguments of the run that would have written it.
    """
    folder = root / "iter_0000001"
    folder.mkdir(parents=True)
    (root / "latest_checkpointed_iteration.txt").write_text("1", "utf-8")
    backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    common = {"common_backend": "torch", "common_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(backend | common), "utf-8")
    state = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 1,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": {"distrib_optim_sharding_type": "fully_reshardable"},
    }
    torch.save(state, folder / "common.pt")
