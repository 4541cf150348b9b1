"""What the start scripts in examples/ share once they run in Python.

A script is read twice: bash reads its first part, which calls torchrun; Python, called by
torchrun, reads the second, which comes here. So ``bash SCRIPT`` and ``torchrun SCRIPT`` are one.
"""

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from megatron_espo.errors import UserError
from megatron_espo.recipes import expand_recipes, last_value
from megatron_espo.startup.setup import run_entry_point

# What torchrun tells its ranks; the torchrun that a rank starts must not inherit it.
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_RANK_PREFIXES = ("LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_")


def start(script: str, entry: str, recipes: Sequence[str]) -> None:
    """Run a start script's job on this rank.

    Args:
        script: path of the script.
        entry: module of megatron_espo.training to run.
        recipes: recipes that hold where the command line says nothing else.
    """

    def run(argv: Sequence[str]) -> None:
        flags = complete_flags(recipes, argv)
        gpus = missing_ranks(os.environ) if "--dry-run" not in flags else 0
        if gpus:
            print(f"one process, {gpus} GPUs: starting a rank for each, as bash {script} does")
            sys.stdout.flush()
            own = {"GPUS_PER_NODE": str(gpus), "PYTHON": sys.executable}
            os.execvpe("bash", ["bash", script, *argv], _without_rank(os.environ) | own)
        warn_of_restarts(os.environ)
        importlib.import_module(f"megatron_espo.training.{entry}").main(flags)

    run_entry_point(run)


def complete_flags(recipes: Sequence[str], argv: Sequence[str]) -> list[str]:
    """Put the default recipes in front of the command line and name the run's folder.

    Args:
        recipes: names of recipes.
        argv: the command line.

    Returns:
        Flags without recipes. Without --save, the run is kept in ``runs/JOB-MODEL``; it continues
        from there (--load), and its curves lie in ``tensorboard`` inside it.
    """
    defaults = [word for name in recipes for word in ("--recipe", name)]
    flags = expand_recipes([*defaults, *argv])
    job = _short(last_value(flags, "--espo-task") or recipes[-1].removesuffix("_8b"))
    save = last_value(flags, "--save") or f"runs/{job}-{last_value(flags, '--preset')}"
    for flag, value in (
        ("--save", save),
        ("--load", save),
        ("--tensorboard-dir", f"{save}/tensorboard"),
    ):
        if last_value(flags, flag) is None:
            flags += [flag, value]
    return flags


def _short(task: str) -> str:
    """Return what a folder is called after: of tasks/mine.py:easy, "mine-easy"."""
    path, colon, attribute = task.partition(":")
    stem = Path(path).stem if path.endswith(".py") else path
    return f"{stem}-{attribute}" if colon else stem


def missing_ranks(environment: Mapping[str, str]) -> int:
    """Say how many ranks to start where this process is alone although there are several GPUs.

    ``torchrun SCRIPT`` starts one process unless it is told a number.

    Args:
        environment: as torchrun sets it. GPUS_PER_NODE says how many ranks; without it, all
            visible GPUs.

    Returns:
        Their number, or 0 where the ranks are as they should be.

    Raises:
        UserError: There are several nodes with one process each, or GPUS_PER_NODE is no number.
    """
    given = environment.get("GPUS_PER_NODE") or str(torch.cuda.device_count())
    if not given.isdigit():
        raise UserError(f"the environment's GPUS_PER_NODE is {given!r}; set a number of GPUs.")
    gpus = int(given)
    if gpus < 2 or environment.get("LOCAL_WORLD_SIZE", "1") != "1":
        return 0
    if environment.get("WORLD_SIZE", "1") != "1":
        raise UserError(
            f"torchrun started one process on a node with {gpus} GPUs; pass --nproc-per-node "
            f"{gpus} to torchrun."
        )
    return gpus


def _without_rank(environment: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in environment.items()
        if name not in _RANK_VARIABLES and not name.startswith(_RANK_PREFIXES)
    }


def warn_of_restarts(environment: Mapping[str, str]) -> None:
    """Warn where torchrun's restarts would meet stale addresses; see docs/cluster.md."""
    nodes = environment.get("WORLD_SIZE", "1") != environment.get("LOCAL_WORLD_SIZE", "1")
    restarts = environment.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    shared = environment.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1"
    if nodes and restarts and shared and environment.get("RANK") == "0":
        print(
            "warning: torchrun's restarts over several nodes need "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's environment.",
            file=sys.stderr,
            flush=True,
        )
