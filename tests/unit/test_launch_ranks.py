"""The 8B scripts with a tiny model on CPUs, started in all the ways that they promise."""

import sys
from pathlib import Path

import pytest
from launching import EXAMPLES, ROOT, environment, run

from megatron_espo.checkpoint.compare import checkpoint_tensors, unequal_tensors


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
