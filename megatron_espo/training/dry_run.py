"""``--dry-run``: check the flags of a run and print what it will need, without a GPU."""

import argparse
import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from megatron_espo.arguments import config_from_args, plan_arguments
from megatron_espo.checkpoint.tracker import has_checkpoint
from megatron_espo.config import EspoConfig, LaunchConfig, RolloutConfig
from megatron_espo.plan.memory import GB
from megatron_espo.plan.parameters import count_parameters
from megatron_espo.plan.plan import Plan, check_plan, make_plan
from megatron_espo.plan.report import plan_report
from megatron_espo.recipes import expand_recipes, last_value
from megatron_espo.tasks import load_task
from megatron_espo.training.setup import pad_multiple
from megatron_espo.training.simulation import is_simulation, simulate

Prepare = Callable[[argparse.Namespace], None]


def is_dry_run(argv: Sequence[str]) -> bool:
    """Whether the command line, recipes included, asks for a dry run.

    Raises:
        ValueError: a recipe does not exist.
    """
    return "--dry-run" in expand_recipes(argv)


def dry_run(
    argv: Sequence[str], prepare: Prepare, *, module: str, with_espo: bool
) -> Plan | None:
    """Check a run and print its plan; with --simulate, run it on GPUs that are not there.

    Args:
        argv: the command line without the program name.
        prepare: the entry point's checks.
        module: the entry point.
        with_espo: whether it is an ESPO run.

    Returns:
        The plan; None on all ranks but the first, which say nothing.

    Raises:
        ValueError: The run cannot work; one sentence with the flag to change.
    """
    if os.environ.get("RANK", "0") != "0":
        return None
    world_size = planned_world_size(expand_recipes(argv), os.environ)
    with _quiet():
        args = plan_arguments(argv, prepare, world_size)
        stages = count_parameters(args)
    args.dry_run_gpus_per_node = _number(os.environ, "GPUS_PER_NODE", 8)
    espo, rollout = None, None
    if with_espo:
        espo, rollout = config_from_args(EspoConfig, args), config_from_args(RolloutConfig, args)
        load_task(espo.task, flag="--espo-task")
    gpu_memory = config_from_args(LaunchConfig, args).dry_run_gpu_memory * GB
    plan = make_plan(args, stages, espo, rollout, gpu_memory, pad_multiple(args))
    print(plan_report(plan, espo, rollout))
    print(_files(args), flush=True)
    if is_simulation(args):
        simulate(module, argv, args, args.dry_run_gpus_per_node)
    check_plan(plan)
    print("The plan fits.", flush=True)
    return plan


def planned_world_size(flags: Sequence[str], environment: Mapping[str, str]) -> int:
    """How many GPUs to plan for.

    Args:
        flags: the command line with recipes expanded.
        environment: WORLD_SIZE as torchrun sets it; NNODES and GPUS_PER_NODE as for launch.sh.

    Returns:
        --dry-run-world-size; else the ranks that torchrun has started, where it was told a number;
        else NNODES (1) x GPUS_PER_NODE (8).

    Raises:
        ValueError: a value is no number.
    """
    given = last_value(flags, "--dry-run-world-size")
    if given is not None:
        if not given.isdigit():
            raise ValueError(f"--dry-run-world-size {given} is no number of GPUs.")
        return int(given)
    if environment.get("WORLD_SIZE", "1") != "1":
        return _number(environment, "WORLD_SIZE", 1)
    return _number(environment, "NNODES", 1) * _number(environment, "GPUS_PER_NODE", 8)


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    value = environment.get(name) or str(default)
    if not value.isdigit() or int(value) < 1:
        raise ValueError(f"the environment's {name} is {value!r}; set a positive number.")
    return int(value)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Megatron's list of arguments and its notes from the plan."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(nowhere),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _files(args: argparse.Namespace) -> str:
    """Say which of the run's files are here; their contents are not read."""
    named = {
        "--tokenizer-model": args.tokenizer_model,
        "--espo-train-data": args.espo_train_data,
        "--espo-eval-data": args.espo_eval_data,
        "--sft-train-data": args.sft_train_data,
        "--sft-valid-data": args.sft_valid_data,
    }
    here = {flag: Path(path).exists() for flag, path in named.items() if path is not None}
    for path in args.data_path or []:
        if not path.replace(".", "").isdigit():
            here["--data-path"] = Path(f"{path}.idx").exists() and here.get("--data-path", True)
    if args.pretrained_checkpoint is not None:
        here["--pretrained-checkpoint"] = has_checkpoint(args.pretrained_checkpoint)
    missing = [flag for flag, found in here.items() if not found]
    line = "Not checked: the contents of tokenizer, data and checkpoints"
    if missing:
        line += f"; not found on this machine: {', '.join(missing)}"
    return line + "."
