"""The 8B scripts with a tiny model on CPUs, started in all the ways that they promise."""

import os
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from megatron_espo.checkpoint.compare import checkpoint_tensors, unequal_tensors

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
CLEAN = {
    name: value
    for name, value in os.environ.items()
    if name not in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "NNODES", "GPUS_PER_NODE")
}


def environment(**more: str) -> dict[str, str]:
    return CLEAN | {
        "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)
    } | more  # fmt: skip


def run(*command: str, cwd: Path, env: Mapping[str, str], status: int = 0) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=env, text=True, timeout=280, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == status, done.stdout[-5000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of a tiny job, its data, and its base, fine-tuned for two steps."""
    folder = tmp_path_factory.mktemp("launch")
    run(sys.executable, str(ROOT / "tools/make_tokenizer.py"), "--out", "tokenizer",
        cwd=folder, env=environment())  # fmt: skip
    run(sys.executable, str(ROOT / "tools/prepare_data.py"), "sudoku", "--out", "data", "--seed",
        "1", "--train", "16", "--test", "4", "--demonstrations", "16",
        cwd=folder, env=environment())  # fmt: skip
    tiny = (
        "--preset tiny --num-layers 2 --tokenizer-model tokenizer --seq-length 32 "
        "--tensor-model-parallel-size 1\n"
    )
    (folder / "espo.flags").write_text(
        "--recipe sudoku\n" + tiny + "--pretrained-checkpoint base\n"
        "--espo-train-data data/train.jsonl --espo-eval-data data/test.jsonl\n"
        "--rollout-completion-length 16 --rollout-block-length 8 --rollout-denoising-steps 8\n"
        "--espo-num-rollouts 1 --espo-prompts-per-rollout 2 --espo-group-size 2\n"
        "--espo-updates-per-rollout 2 --lr 1e-3\n"
    )
    run(
        sys.executable, "-m", "megatron_espo.training.pretrain", *tiny.split(), "--sft-train-data",
        "data/demonstrations.jsonl", "--sft-completion-length", "16", "--micro-batch-size", "4",
        "--global-batch-size", "8", "--train-iters", "2", "--lr", "1e-3", "--save", "base",
        "--bf16",
        cwd=folder, env=environment(),
    )  # fmt: skip
    return folder


def check_rollout(printed: str, folder: Path, save: str) -> None:
    assert printed.count("rollout 1/1 | ") == 1 and printed.count("held-out (after)") == 1
    assert (folder / save / "latest_checkpointed_iteration.txt").read_text() == "2"


@pytest.fixture(scope="module")
def by_bash(folder: Path) -> str:
    """``bash SCRIPT``, which calls torchrun itself; the run's folder is the recipe's."""
    printed = run("bash", str(EXAMPLES / "run_espo_8b.sh"), "--recipe", "espo.flags",
                  cwd=folder, env=environment(GPUS_PER_NODE="2"))  # fmt: skip
    save = "runs/sudoku-tiny"
    check_rollout(printed, folder, save)
    assert list((folder / save / "tensorboard").iterdir())
    return save


def assert_same_run(folder: Path, one: str, other: str) -> None:
    ours, theirs = (checkpoint_tensors(str(folder / name)) for name in (one, other))
    assert len(ours) > 25 and not unequal_tensors(ours, theirs)


def test_torchrun_starts_the_script_as_bash_does(folder: Path, by_bash: str) -> None:
    printed = run(
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(EXAMPLES / "run_espo_8b.sh"), "--recipe", "espo.flags", "--save", "by-torchrun",
        cwd=folder, env=environment(),
    )  # fmt: skip
    check_rollout(printed, folder, "by-torchrun")
    assert_same_run(folder, by_bash, "by-torchrun")


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


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job of two nodes, with srun and scontrol that write down their calls."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        path = programs / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return environment(
        PATH=f"{programs}:{os.environ['PATH']}", LOG=str(tmp_path),
        SLURM_JOB_ID=str(os.getpid()), SLURM_JOB_NUM_NODES="2",
        SLURM_JOB_NODELIST="node[1-2]", SLURM_SUBMIT_DIR=str(tmp_path), SLURM_GPUS_ON_NODE="1",
    )  # fmt: skip


FAILING_TASK = """
import os, signal
from pathlib import Path
from megatron_espo.tasks.sudoku import *
from megatron_espo.tasks import sudoku
flag = Path(os.environ["LOG"], "failed")
def score(example, completion):
    if os.environ["RANK"] == "1" and not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return sudoku.score(example, completion)
"""


def test_slurm_script_runs_two_nodes_and_restarts_them_after_a_kill(
    folder: Path, by_bash: str, slurm: dict[str, str]
) -> None:
    """Two torchrun agents; a rank is killed once, and the job is the same run as without."""
    log = Path(slurm["LOG"])
    (log / "failing_task.py").write_text(FAILING_TASK)
    slurm |= {"SCRIPT": str(EXAMPLES / "run_espo_8b.sh"), "MAX_RESTARTS": "1",
              "SLURM_SUBMIT_DIR": str(folder), "PYTHONPATH": f"{ROOT}:{log}"}  # fmt: skip
    printed = run(
        "bash", str(EXAMPLES / "slurm_espo_8b.sbatch"), "--recipe", "espo.flags",
        "--espo-task", "failing_task", "--save", "by-slurm", cwd=folder, env=slurm,
    )  # fmt: skip
    assert (log / "failed").exists()
    check_rollout(printed, folder, "by-slurm")
    assert_same_run(folder, by_bash, "by-slurm")
    assert (log / "srun").read_text().split()[:5] == [
        "--ntasks", "2", "--ntasks-per-node", "1", "--kill-on-bad-exit=1"
    ]  # fmt: skip
    given = dict(line.split("=", 1) for line in (log / "environment").read_text().splitlines()
                 if "=" in line)  # fmt: skip
    port = 20000 + int(slurm["SLURM_JOB_ID"]) % 10000
    assert given["RDZV_ENDPOINT"] == f"localhost:{port}"
    assert (given["NNODES"], given["GPUS_PER_NODE"], given["MAX_RESTARTS"]) == ("2", "1", "1")
    assert (log / "scontrol").read_text() == "show hostnames node[1-2]\n"
