"""``--dry-run --simulate``: runs the real job as some of its ranks, on GPUs that are not there.

The ranks run in a process of their own (``python -m megatron_espo.simulate``), since Megatron finds
its devices when it is imported. This module prepares the job for it, and reads what it found.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megatron_espo.checkpoint.tracker import has_checkpoint
from megatron_espo.config import EspoConfig, LaunchConfig, RolloutConfig, SimulateConfig
from megatron_espo.data.tokenizer import byte_tokenizer, save_tokenizer
from megatron_espo.dry_run import support
from megatron_espo.dry_run.chosen_ranks import chosen_ranks, stage_of, stage_ranks
from megatron_espo.dry_run.compare import find_mismatch
from megatron_espo.dry_run.extrapolate import Cost, espo_costs, update_cost
from megatron_espo.dry_run.job import OWN_FOLDER, Job
from megatron_espo.dry_run.planned import (
    entry_point,
    planned_world_size,
    positive_number,
    quiet,
)
from megatron_espo.dry_run.record import Rank
from megatron_espo.dry_run.roofline import Ceilings
from megatron_espo.dry_run.simulated_text import estimate, failures, refusals, report
from megatron_espo.dry_run.stand_in_checkpoint import (
    adapter_arguments,
    base_arguments,
    write_checkpoint,
)
from megatron_espo.errors import UserError
from megatron_espo.model.experts import shares_experts
from megatron_espo.plan.plan import PEAK_FLOPS
from megatron_espo.recipes import expand_recipes, last_value
from megatron_espo.startup.arguments import config_from_args, plan_arguments

# Updates of a rollout, or steps, that are run: the first one makes the optimizer's state.
_UPDATES = 2
# Flags of a dry run, and how many words follow each.
_OWN_FLAGS = {
    "--verbose": 0,
    "--dry-run": 0,
    "--dry-run-world-size": 1,
    "--dry-run-gpu-memory": 1,
    "--simulate": 0,
    "--simulate-compare": 0,
    "--simulate-ranks": 1,
    "--simulate-processes": 1,
    "--simulate-out": 1,
    "--simulate-matmul-tflops": 1,
    "--simulate-memory-tbs": 1,
    "--simulate-nvlink-gbs": 1,
    "--simulate-network-gbs": 1,
    "--simulate-launch-us": 1,
}


def simulate(
    module: str,
    argv: Sequence[str],
    args: argparse.Namespace,
    gpus_per_node: int,
    peaks: Sequence[float] | None = None,
) -> list[Rank]:
    """Simulate a job, print what was found, and refuse what cannot work.

    Args:
        module: the entry point that was started.
        argv: its command line.
        args: Megatron's validated arguments of the planned run.
        gpus_per_node: of the planned nodes.
        peaks: the plan's own peaks of the pipeline stages in bytes, without its reserve.

    Returns:
        The simulated ranks.

    Raises:
        UserError: A rank failed, a GPU would refuse something, ranks would wait for each other,
            or this machine cannot simulate.
    """
    if (reason := support.check()) is not None:
        raise UserError(reason)
    with_te = args.transformer_impl == "transformer_engine"
    if with_te and support.transformer_engine_folder() is None:
        raise UserError(
            "--simulate takes Transformer Engine's own Python layer, which is not here: `make te` "
            "installs it, or pass --transformer-impl local."
        )
    with tempfile.TemporaryDirectory(prefix="megatron_espo-simulate-") as folder:
        job = make_job(module, argv, args, gpus_per_node, Path(folder))
        print(
            f"Simulating {', '.join(map(str, job.ranks))} of {args.world_size} ranks of "
            f"{job.target}: not a run on GPUs.",
            flush=True,
        )
        (found,) = run_jobs([job])
    conclude(module, job, args, found, peaks)
    return found


def make_job(
    module: str,
    argv: Sequence[str],
    args: argparse.Namespace,
    gpus_per_node: int,
    folder: Path,
) -> Job:
    """Prepare a job: cut short, and without this machine's files.

    Args:
        module: the entry point that was started.
        argv: its command line.
        args: Megatron's validated arguments of the planned run.
        gpus_per_node: of the planned nodes.
        folder: an empty one, which must last as long as the job.

    Returns:
        The job.

    Raises:
        UserError: --simulate-ranks names a rank that the run does not have, or ranks are to be
            compared that make passes for each other.
    """
    config = config_from_args(SimulateConfig, args)
    if config.compare and shares_experts(args):
        raise UserError(
            "--simulate-compare: ranks that share experts go on with padding until the last one is "
            "done, and a simulated rank does not know when the others are; leave it out."
        )
    target, flags = _target(module, argv)
    return Job(
        target=target,
        flags=[*without_own_flags(flags), *_changes(module, args, folder)],
        world_size=args.world_size,
        gpus_per_node=gpus_per_node,
        ranks=chosen_ranks(args, config),
        folder=str(folder),
        ceilings=_ceilings(config),
        record_trace=config.compare,
        processes=config.processes,
    )


def conclude(
    module: str,
    job: Job,
    args: argparse.Namespace,
    found: Sequence[Rank],
    peaks: Sequence[float] | None,
) -> None:
    """Print what ranks did, and refuse what cannot work.

    Args:
        module: the entry point.
        job: what was run.
        args: Megatron's validated arguments of the planned run.
        found: the ranks.
        peaks: the plan's own peaks of the pipeline stages in bytes, without its reserve.

    Raises:
        UserError: A rank failed, a GPU would refuse something, or ranks would wait for each other.
    """
    config = config_from_args(SimulateConfig, args)
    shown = set(stage_ranks(args)) if config.ranks is None else set(job.ranks)
    written = []
    for rank in found:
        if rank.status != "ok" or rank.rank not in shown:
            continue
        costs, tokens = _costs(module, rank, args)
        times = estimate(job.ceilings, costs, tokens, PEAK_FLOPS)
        stage = stage_of(args, rank.rank)
        planned = None if peaks is None else peaks[stage]
        print(report(job, rank, times, planned), flush=True)
        plain = dataclasses.replace(rank, trace=[]).as_json()
        plain |= {"stage": stage, "planned_peak": planned}
        written.append(plain | {"estimate": times and dataclasses.asdict(times)})
    if config.out is not None:
        Path(config.out).write_text(json.dumps({"target": job.target, "ranks": written}), "utf-8")
    _refuse(found)
    if config.compare:
        mismatch = find_mismatch(found)
        if mismatch is not None:
            raise UserError(f"this plan would hang: {mismatch}.")
        number = sum(len(rank.trace) for rank in found)
        print(f"Compared: {number:,} collectives of {len(found)} ranks agree.", flush=True)


def simulate_inference(
    module: str,
    argv: Sequence[str],
    rest: Sequence[str],
    prepare: Callable[[argparse.Namespace], None],
) -> None:
    """Simulate an evaluation or a generation (``--dry-run --simulate``).

    Args:
        module: the entry point that was started.
        argv: its command line.
        rest: the flags of it that are not the entry point's own.
        prepare: checks and completes the parsed arguments.

    Raises:
        UserError: --simulate is missing, or as :func:`simulate`.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    if "--simulate" not in argv:
        raise UserError("--dry-run of this tool needs --simulate; add it.")
    load = last_value(rest, "--load")
    # Without a checkpoint the command line says the shape.
    shape = ["--use-checkpoint-args"] if has_checkpoint(load) else []
    with quiet():
        args = plan_arguments(
            [*shape, *rest], prepare, planned_world_size(expand_recipes(rest), os.environ)
        )
    simulate(module, argv, args, positive_number(os.environ, "GPUS_PER_NODE", 8))


def run_jobs(jobs: Sequence[Job]) -> list[list[Rank]]:
    """Run the ranks of jobs, one job after another, in a process of their own.

    Args:
        jobs: each with a folder that exists.

    Returns:
        The ranks of each job, in its order.

    Raises:
        UserError: The process failed before a rank began.
    """
    files = [Path(job.folder) / "job.json" for job in jobs]
    for job, file in zip(jobs, files, strict=True):
        job.write(file)
    package = Path(__file__).parents[2]
    paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        # The same on a machine that has GPUs.
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    program = [sys.executable, "-m", "megatron_espo.simulate"]
    command = [*program, str(os.getpid()), *map(str, files)]
    done = subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    return [[_read(Path(job.folder), rank, done.stderr) for rank in job.ranks] for job in jobs]


def _read(folder: Path, number: int, said: str) -> Rank:
    """Read what a rank found; ``said`` is what the whole process wrote."""
    file = folder / f"rank{number}.json"
    if file.exists():
        return Rank.from_json(json.loads(file.read_text("utf-8")))
    log = folder / f"rank{number}.log"
    text = log.read_text("utf-8", "replace") if log.exists() else said
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "nothing")
    raise UserError(f"the simulation of rank {number} ended early; it said last: {last}")


def without_own_flags(flags: Sequence[str]) -> list[str]:
    """Take the flags of a dry run out of a command line."""
    kept: list[str] = []
    rest = iter(flags)
    for flag in rest:
        name, _, value = flag.partition("=")
        if name not in _OWN_FLAGS:
            kept.append(flag)
        elif not value:
            for _ in range(_OWN_FLAGS[name]):
                next(rest, None)
    return kept


def _target(module: str, argv: Sequence[str]) -> tuple[str, Sequence[str]]:
    """What was started: a start script with its own flags, or a module."""
    script = Path(sys.argv[0])
    if script.suffix == ".sh" and script.is_file():
        return str(script), sys.argv[1:]
    return module, argv


def _changes(module: str, args: argparse.Namespace, folder: Path) -> list[str]:
    """Flags that cut the job short, and keep it from this machine's files."""
    runs = f"{OWN_FOLDER}/run"
    changes = ["--tensorboard-dir", f"{OWN_FOLDER}/tensorboard", "--num-workers", "0"]
    if args.save is not None:
        changes += ["--save", runs]
    if args.tokenizer_model is None or not Path(args.tokenizer_model).is_dir():
        tokenizer = str(folder / "tokenizer")
        save_tokenizer(byte_tokenizer(), tokenizer)
        changes += ["--tokenizer-model", tokenizer]
    if args.pretrained_checkpoint is not None and not has_checkpoint(args.pretrained_checkpoint):
        write_checkpoint(folder / "base", base_arguments(args))
        changes += ["--pretrained-checkpoint", str(folder / "base")]
    entry = entry_point(module)
    if entry in ("evaluate", "generate"):
        if not has_checkpoint(args.load):
            loaded = folder / "base"
            write_checkpoint(loaded, base_arguments(args))
            if args.lora_rank is not None:
                loaded = folder / "adapters"
                write_checkpoint(loaded, adapter_arguments(args, folder / "base"))
            changes += ["--load", str(loaded)]
        if entry == "evaluate":
            (folder / "problems.jsonl").write_text("", "utf-8")
            changes += ["--espo-reward-workers", "0", "--out", f"{OWN_FOLDER}/out"]
            changes += ["--espo-eval-data", str(folder / "problems.jsonl")]
        else:
            changes += ["--prompt", "simulated"]
        return changes
    changes += ["--load", runs]
    if args.train_iters:
        changes += ["--lr-decay-iters", str(args.lr_decay_iters or args.train_iters)]
    if entry == "espo":
        updates = min(_UPDATES, args.espo_updates_per_rollout)
        # Made-up rewards would decide how many further prompts there are.
        changes += ["--espo-num-rollouts", "1", "--espo-reward-workers", "0", "--espo-refill", "0"]
        return [*changes, "--espo-updates-per-rollout", str(updates)]
    if args.sft_epochs:
        # The data that its steps are counted from need not be here.
        changes += ["--sft-epochs", "0", "--train-iters", str(args.train_iters)]
    batches = simulated_batches(args)
    rows = args.micro_batch_size * args.data_parallel_size
    changes += ["--exit-interval", str(_UPDATES), "--eval-iters", str(min(args.eval_iters or 0, 1))]
    return [*changes, "--global-batch-size", str(batches * rows)]


def simulated_batches(args: argparse.Namespace) -> int:
    """Micro-batches of a step of pre-training or fine-tuning that are run."""
    stages = args.pipeline_model_parallel_size
    total = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    # Enough to fill the pipeline; a multiple of its stages, as virtual stages want it.
    return int(min(2 * stages, total))


def _ceilings(config: SimulateConfig) -> Ceilings:
    return Ceilings(
        matmul=config.matmul_tflops * 1e12,
        memory=config.memory_tbs * 1e12,
        nvlink=config.nvlink_gbs * 1e9,
        network=config.network_gbs * 1e9,
        launch=config.launch_us * 1e-6,
    )


def _costs(module: str, rank: Rank, args: argparse.Namespace) -> tuple[Mapping[str, Cost], float]:
    """Extrapolate a rank's costs to a rollout with its updates, or to an optimizer step.

    Returns:
        Costs by phase, and the tokens that all ranks make or train on meanwhile.
    """
    rollout, entry = config_from_args(RolloutConfig, args), entry_point(module)
    if entry == "espo":
        espo = config_from_args(EspoConfig, args)
        simulated = min(_UPDATES, espo.updates_per_rollout)
        tokens = espo.completions_per_rollout * rollout.completion_length
        return espo_costs(rank, espo.updates_per_rollout, simulated), float(tokens)
    if entry == "pretrain":
        batches = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
        cost = update_cost(rank, batches / simulated_batches(args), 1 / _UPDATES)
        return {"step": cost}, float(args.global_batch_size * args.seq_length)
    return {}, 0.0


def _refuse(found: Sequence[Rank]) -> None:
    unexpected = next((rank.traceback for rank in found if rank.traceback), "")
    if unexpected:
        print(unexpected, file=sys.stderr, flush=True)
    problems = failures(found) or refusals(found)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"the simulated job failed: {problems[0]}{more}")


def is_simulation(args: argparse.Namespace) -> bool:
    """Whether --simulate was given."""
    return config_from_args(LaunchConfig, args).simulate
