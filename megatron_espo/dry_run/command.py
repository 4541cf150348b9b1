"""``--dry-run``: check the flags of a run and print what it will need, without a GPU."""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_espo.checkpoint.tracker import has_checkpoint
from megatron_espo.config import DpoConfig, EspoConfig, LaunchConfig, RolloutConfig
from megatron_espo.dry_run.planned import (
    entry_point,
    planned_world_size,
    positive_number,
    quiet,
)
from megatron_espo.dry_run.simulation import is_simulation, simulate
from megatron_espo.plan.memory import GB
from megatron_espo.plan.parameters import count_parameters
from megatron_espo.plan.plan import Plan, check_plan, make_plan
from megatron_espo.plan.text import plan_report
from megatron_espo.preference.rows import planned_pairs
from megatron_espo.recipes import expand_recipes
from megatron_espo.startup.arguments import config_from_args, plan_arguments
from megatron_espo.startup.setup import pad_multiple
from megatron_espo.supervised.rows import planned_rows
from megatron_espo.tasks import Blend, Task, load_task

Prepare = Callable[[argparse.Namespace], None]


def dry_run(argv: Sequence[str], prepare: Prepare, module: str) -> Plan | None:
    """Check a run and print its plan; with --simulate, run it on GPUs that are not there.

    Args:
        argv: the command line without the program name.
        prepare: the entry point's checks.
        module: the entry point's name.

    Returns:
        The plan; None on all ranks but the first, which say nothing.

    Raises:
        UserError: The run cannot work; one sentence with the flag to change.
    """
    if os.environ.get("RANK", "0") != "0":
        return None
    world_size = planned_world_size(expand_recipes(argv), os.environ)
    with quiet():
        args = plan_arguments(argv, prepare, world_size)
        stages = count_parameters(args)
        preferring = entry_point(module) == "dpo"
        rows = planned_pairs(args) if preferring else planned_rows(args)
    args.dry_run_gpus_per_node = positive_number(os.environ, "GPUS_PER_NODE", 8)
    espo, rollout, task = None, None, None
    if entry_point(module) == "espo":
        espo, rollout = config_from_args(EspoConfig, args), config_from_args(RolloutConfig, args)
        task = load_task(espo.task, flag="--espo-task")
    dpo = config_from_args(DpoConfig, args) if preferring else None
    gpu_memory = config_from_args(LaunchConfig, args).dry_run_gpu_memory * GB
    plan = make_plan(args, stages, espo, rollout, gpu_memory, pad_multiple(args), rows, dpo)
    print(plan_report(plan, espo, rollout, dpo))
    print(_files(args, task, rows is not None), flush=True)
    if is_simulation(args):
        peaks = [memory.peak for memory in plan.memory]
        simulate(module, argv, args, args.dry_run_gpus_per_node, peaks)
    check_plan(plan)
    print("The plan fits.", flush=True)
    return plan


def _files(args: argparse.Namespace, task: Task | None, read: bool) -> str:
    """Say which of the run's files are here, and whether fine-tuning's data was read."""
    named = {
        "--tokenizer-model": args.tokenizer_model,
        "--espo-train-data": args.espo_train_data,
        "--espo-eval-data": args.espo_eval_data,
        "--sft-train-data": args.sft_train_data,
        "--sft-valid-data": args.sft_valid_data,
        "--dpo-train-data": args.dpo_train_data,
        "--dpo-eval-data": args.dpo_eval_data,
    }
    here = {}
    for flag, path in named.items():
        if path is not None:
            files = [path]
            if isinstance(task, Blend) and flag.startswith("--espo-"):
                files = list(task.files(path, flag).values())
            here[flag] = all(Path(file).exists() for file in files)
    for path in args.data_path or []:
        if not path.replace(".", "").isdigit():
            here["--data-path"] = Path(f"{path}.idx").exists() and here.get("--data-path", True)
    if args.pretrained_checkpoint is not None:
        here["--pretrained-checkpoint"] = has_checkpoint(args.pretrained_checkpoint)
    missing = [flag for flag, found in here.items() if not found]
    line = "Not checked: the contents of tokenizer, data and checkpoints"
    if read:
        line = "Not checked: the contents of checkpoints, and of data but the training data"
    if missing:
        line += f"; not found on this machine: {', '.join(missing)}"
    return line + "."
