"""The 8B scripts with a tiny model on CPUs, started in all the ways that they promise."""

import json
import re
from pathlib import Path

import pytest
from interpreter import python
from launching import EXAMPLES, ROOT, environment, run

from megatron_espo.checkpoint.compare import checkpoint_tensors, unequal_tensors

pytestmark = pytest.mark.slow


def by_torchrun(folder: Path, script: str, *flags: str, bare: bool = False) -> str:
    """``torchrun SCRIPT`` with two ranks; if bare, without saying how many."""
    options = () if bare else ("--nproc-per-node", "2")
    return run(
        python(), "-m", "torch.distributed.run", "--standalone", *options,
        str(EXAMPLES / script), *flags,
        cwd=folder, env=environment(**({"GPUS_PER_NODE": "2"} if bare else {})),
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipes of tiny jobs, their data, and a base, pre-trained for four steps."""
    folder = tmp_path_factory.mktemp("launch")
    run(python(), str(ROOT / "tools/make_tokenizer.py"), "--out", "tokenizer",
        cwd=folder, env=environment())  # fmt: skip
    run(python(), str(ROOT / "tools/prepare_data.py"), "sudoku", "--out", "data", "--seed",
        "1", "--train", "16", "--test", "4", "--demonstrations", "16",
        cwd=folder, env=environment())  # fmt: skip
    corpus = [{"text": f"Document {i} of some length. " * 8} for i in range(20)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in corpus))
    run(python(), str(ROOT / "tools/preprocess_data.py"), "--input", "corpus.jsonl",
        "--tokenizer-model", "tokenizer", "--output-prefix", "data/text",
        cwd=folder, env=environment())  # fmt: skip
    tiny = "--preset tiny --num-layers 2 --tokenizer-model tokenizer --seq-length 32\n"
    steps = "--global-batch-size 4 --train-iters 4 --lr-warmup-iters 1 --lr-wsd-decay-iters 1\n"
    (folder / "pretrain.flags").write_text(
        f"{tiny} {steps} --data-path data/text --split 80,20,0 --eval-interval 2 --eval-iters 1\n"
        "--log-interval 1\n"
    )
    (folder / "sft.flags").write_text(
        f"{tiny} {steps} --pretrained-checkpoint base --sft-train-data data/demonstrations.jsonl\n"
        "--sft-completion-length 16 --tensor-model-parallel-size 1 --log-interval 1\n"
    )
    (folder / "espo.flags").write_text(
        f"--recipe sudoku\n {tiny} --pretrained-checkpoint base --tensor-model-parallel-size 1\n"
        "--espo-train-data data/train.jsonl --espo-eval-data data/test.jsonl\n"
        "--rollout-completion-length 16 --rollout-block-length 8 --rollout-denoising-steps 8\n"
        "--espo-num-rollouts 1 --espo-prompts-per-rollout 2 --espo-group-size 2\n"
        "--espo-updates-per-rollout 2 --lr 1e-3\n"
    )
    by_torchrun(folder, "pretrain_8b.sh", "--recipe", "pretrain.flags", "--save", "base")
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
    # A page on the console, everything in the log, and no alarm in a run that is well.
    logs = [(folder / save / f"logs/rank-{rank}.log").read_text() for rank in range(2)]
    assert printed.count("\n") < 40
    assert logs[0].count("\n") > 600 and "end of arguments" in logs[0]
    assert sum(log.count("rollout 1/1 | ") for log in logs) == 1
    assert not any("Overwriting old incomplete" in log for log in logs)
    return save


def assert_same_run(folder: Path, one: str, other: str) -> None:
    ours, theirs = (checkpoint_tensors(str(folder / name)) for name in (one, other))
    assert len(ours) > 25 and not unequal_tensors(ours, theirs)


def test_torchrun_starts_the_script_as_bash_does(folder: Path, by_bash: str) -> None:
    flags = ("--recipe", "espo.flags", "--save", "by-torchrun")
    printed = by_torchrun(folder, "run_espo_8b.sh", *flags)
    check_rollout(printed, folder, "by-torchrun")
    assert_same_run(folder, by_bash, "by-torchrun")


@pytest.mark.parametrize("job", ["pretrain", "sft"])
def test_pretraining_and_fine_tuning_run_save_and_resume(folder: Path, job: str) -> None:
    """bash, stopped half-way and started again, makes the run that torchrun makes in one go.

    Pre-training has its recipe's layout, two tensor-parallel ranks with sequence parallelism;
    fine-tuning loads what they wrote on two data-parallel ranks. There, torchrun is not told how
    many ranks to start, and the script starts one per GPU.
    """
    script, recipe = f"{job}_8b.sh", ("--recipe", f"{job}.flags")
    whole = {"pretrain": "base", "sft": "by-torchrun-sft"}[job]
    if job == "sft":
        printed = by_torchrun(folder, script, *recipe, "--save", whole, bare=True)
        assert "one process, 2 GPUs: starting a rank for each" in printed
    command = ("bash", str(EXAMPLES / script), *recipe)
    env = environment(GPUS_PER_NODE="2")
    first = run(*command, "--exit-interval", "2", cwd=folder, env=env)
    second = run(*command, cwd=folder, env=env)
    for printed, steps in ((first, (1, 2)), (second, (3, 4))):
        assert [int(n) for n in re.findall(r"iteration (\d+)/4 ", printed)] == list(steps)
    assert ("validation loss at iteration 4" in second) == (job == "pretrain")
    save = f"runs/{job}-tiny"
    assert (folder / save / "latest_checkpointed_iteration.txt").read_text() == "4"
    assert list((folder / save / "tensorboard").iterdir())
    assert_same_run(folder, whole, save)


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
