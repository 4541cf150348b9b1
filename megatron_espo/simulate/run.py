"""Simulates ranks of jobs, each in a process of its own.

``python -m megatron_espo.simulate JOB [JOB ...]``: Megatron is imported once, on fake devices; each
rank is a fork of that process.
"""

import importlib
import json
import os
import resource
import runpy
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_espo.dry_run.job import OWN_FOLDER, Job
from megatron_espo.rewards.worker import die_with_parent
from megatron_espo.simulate import cuda, transformer_engine
from megatron_espo.simulate.ledger import Ledger

# What examples/launch.sh and the image set: a job must start without it.
_UNSET = (
    *("CUDA_DEVICE_MAX_CONNECTIONS", "OMP_NUM_THREADS", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"),
    *("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "GPUS_PER_NODE", "NNODES", "SLURM_PROCID"),
)


def main(paths: Sequence[str]) -> None:
    """Simulate the ranks of jobs.

    Args:
        paths: files of the jobs, which have equally many GPUs in a node.
    """
    jobs = [Job.read(Path(path)) for path in paths]
    import torch

    torch.set_num_threads(1)
    cuda.install(jobs[0].gpus_per_node)
    cuda.use(Ledger(0, jobs[0].ceilings))  # some modules make tensors when they are imported
    version = transformer_engine.install()
    modules = {"megatron_espo.commands.launch" if j.is_script else j.target for j in jobs}
    for name in (*sorted(modules), "megatron_espo.simulate.hooks"):
        importlib.import_module(name)
    running: list[int] = []
    for job in jobs:
        for rank in job.ranks:
            if len(running) >= job.processes:
                running.remove(os.wait()[0])
            own = os.getpid()
            process = os.fork()
            if process == 0:
                die_with_parent(own)
                _rank(job, rank, version)
            running.append(process)
    for process in running:
        os.waitpid(process, 0)


def _rank(job: Job, number: int, version: str | None) -> None:
    """Run one rank in this process, and end it."""
    started = time.perf_counter()
    folder = Path(job.folder)
    ledger = Ledger(number, job.ceilings)
    rank = ledger.rank
    rank.facts |= {
        "gpus_per_node": job.gpus_per_node,
        "world_size": job.world_size,
        "transformer_engine": version,
    }
    log = os.open(folder / f"rank{number}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    try:
        _environment(job, number)
        own = str(folder / f"own{number}")
        flags = [flag.replace(OWN_FOLDER, own) for flag in job.flags]
        cuda.use(ledger)
        # Imports Megatron, which looks for the device.
        hooks: Any = importlib.import_module("megatron_espo.simulate.hooks")
        hooks.install(job, ledger)
        _start(job, flags)
    except SystemExit as end:
        if end.code not in (None, 0):
            rank.status = f"exit status {end.code}"
    except BaseException as error:
        rank.status = f"{type(error).__name__}: {error}"
        rank.traceback = traceback.format_exc()
    rank.lasting = ledger.live
    rank.wall = time.perf_counter() - started
    rank.host_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if not job.record_trace:
        rank.trace = []
    sys.stdout.flush()
    sys.stderr.flush()
    (folder / f"rank{number}.json").write_text(json.dumps(rank.as_json()), "utf-8")
    os._exit(0)


def _environment(job: Job, number: int) -> None:
    """What torchrun tells a rank, and nothing of what the start scripts set."""
    for name in _UNSET:
        os.environ.pop(name, None)
    local = number % job.gpus_per_node
    told: dict[str, Any] = {
        "RANK": number,
        "WORLD_SIZE": job.world_size,
        "LOCAL_RANK": local,
        "LOCAL_WORLD_SIZE": min(job.gpus_per_node, job.world_size),
        # That one rank is meant to be alone, whatever GPUs there would be.
        "GPUS_PER_NODE": min(job.gpus_per_node, job.world_size),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": 29500,
        "TORCHELASTIC_RESTART_COUNT": 0,
    }
    os.environ.update({name: str(value) for name, value in told.items()})


def _start(job: Job, flags: list[str]) -> None:
    """Start the job as torchrun starts it."""
    if job.is_script:
        sys.argv = [job.target, *flags]
        runpy.run_path(job.target, run_name="__main__")
        return
    module: Any = importlib.import_module(job.target)
    sys.argv = [str(module.__file__), *flags]
    module.main(flags)
