"""What the tests of the start scripts share: how to run one, and stand-ins for Slurm's programs."""

import os
import stat
import subprocess
from collections.abc import Mapping
from pathlib import Path

from interpreter import python

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
CLEAN = {
    name: value
    for name, value in os.environ.items()
    if name not in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "NNODES", "GPUS_PER_NODE")
    # What runs set by themselves must not come from elsewhere.
    and not name.startswith(("CUDA_DEVICE_MAX", "NVTE_", "TORCHDYNAMO"))
}


def environment(**more: str) -> dict[str, str]:
    return CLEAN | {
        "OMP_NUM_THREADS": "1", "PYTHON": python(), "PYTHONPATH": str(ROOT)
    } | more  # fmt: skip


def run(*command: str, cwd: Path, env: Mapping[str, str], status: int = 0) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=env, text=True, timeout=560, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == status, done.stdout[-5000:]
    return done.stdout


# Stands for Slurm: a task per node, all on this machine; signals go to the tasks.
SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$LOG/srun"
env > "$LOG/environment"
nodes="" command=()
while (($#)); do
  case $1 in
    --ntasks) nodes=$2; shift 2 ;;
    --ntasks-per-node) shift 2 ;;
    --kill-on-bad-exit=1) shift ;;
    *) command=("$@"); break ;;
  esac
done
pids=() status=0
for ((node = 0; node < nodes; node++)); do
  SLURM_NODEID=$node "${command[@]}" & pids+=($!)
done
trap 'kill -TERM "${pids[@]}"' TERM
for pid in "${pids[@]}"; do
  while true; do
    result=0; wait "$pid" || result=$?
    if ((result <= 128)) || ! kill -0 "$pid" 2>/dev/null; then break; fi
  done
  ((result == 0)) || status=$result
done
exit $status
"""
SCONTROL = """#!/usr/bin/env bash
printf '%s\\n' "$*" >> "$LOG/scontrol"
if [[ $1 == show ]]; then echo localhost; echo localhost; fi
"""


def job_of_two_nodes(folder: Path) -> dict[str, str]:
    """The environment of a job, with srun and scontrol that write down their calls in a folder."""
    programs = folder / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        path = programs / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return environment(
        PATH=f"{programs}:{os.environ['PATH']}", LOG=str(folder),
        SLURM_JOB_ID=str(os.getpid()), SLURM_JOB_NUM_NODES="2",
        SLURM_JOB_NODELIST="node[1-2]", SLURM_SUBMIT_DIR=str(folder), SLURM_GPUS_ON_NODE="1",
    )  # fmt: skip
