"""The 8B start scripts: what they call, what signals do, with stand-ins for Slurm and torchrun."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import EXAMPLES, ROOT, environment, run

# Stands for torchrun and its ranks: what it is called with, and ranks that take a second to save.
TORCHRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$LOG/torchrun-${SLURM_NODEID:-0}"
env > "$LOG/torchrun-environment"
bash -c 'trap "sleep 1; touch $LOG/saved-${SLURM_NODEID:-0}; exit 0" TERM
         touch "$LOG/ready-${SLURM_NODEID:-0}"; while true; do sleep 0.1; done' &
wait $!
"""


@pytest.fixture
def ranks(slurm: dict[str, str]) -> Iterator[dict[str, str]]:
    path = Path(slurm["LOG"], "python-stand-in")
    path.write_text(TORCHRUN)
    path.chmod(0o755)
    yield slurm | {"PYTHON": str(path), "SCRIPT": str(EXAMPLES / "run_espo_8b.sh")}


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + 60
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, paths
        time.sleep(0.05)


def test_time_limit_lets_the_ranks_save_and_requeues_the_job(ranks: dict[str, str]) -> None:
    log = Path(ranks["LOG"])
    job = subprocess.Popen(["bash", str(EXAMPLES / "slurm_espo_8b.sbatch")], env=ranks)
    wait_for(log / "ready-0", log / "ready-1")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == 0
    assert (log / "saved-0").exists() and (log / "saved-1").exists()
    assert (log / "scontrol").read_text().splitlines()[-1] == f"requeue {ranks['SLURM_JOB_ID']}"
    called = (log / "torchrun-1").read_text().split()
    assert called[: called.index("--rdzv-endpoint")] == [
        "-m", "torch.distributed.run", "--nnodes", "2", "--rdzv-backend", "c10d"
    ]  # fmt: skip
    assert called[called.index("--max-restarts") + 1] == "3"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_script_reaches_the_ranks_and_not_torchrun(
    ranks: dict[str, str], number: signal.Signals
) -> None:
    log = Path(ranks["LOG"])
    command = ["bash", str(EXAMPLES / "run_espo_8b.sh"), "--seed", "3"]
    job = subprocess.Popen(
        command,
        env=ranks | {"GPUS_PER_NODE": "8"},
        start_new_session=True,
        # Tests that run in the background ignore it, and bash cannot trap what was ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_for(log / "ready-0")
    # As a terminal or Slurm does: to the whole process group.
    os.killpg(job.pid, number)
    assert job.wait(60) == 0 and (log / "saved-0").exists()
    called = (log / "torchrun-0").read_text().split()
    assert called[2:] == [
        "--standalone", "--nproc-per-node", "8", "--max-restarts", "0", command[1], "--seed", "3"
    ]  # fmt: skip
    given = (log / "torchrun-environment").read_text().splitlines()
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in given
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=900" in given


def test_what_the_user_has_set_for_torchrun_stays(ranks: dict[str, str]) -> None:
    """And nothing is set for ranks, which torchrun alone would not set."""
    log = Path(ranks["LOG"])
    ranks = {name: value for name, value in ranks.items() if name != "OMP_NUM_THREADS"}
    own = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "0", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "77"}
    job = subprocess.Popen(
        ["bash", str(EXAMPLES / "run_espo_8b.sh")], env=ranks | own | {"GPUS_PER_NODE": "8"}
    )
    wait_for(log / "ready-0")
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) == 0
    given = (log / "torchrun-environment").read_text().splitlines()
    assert all(f"{name}={value}" in given for name, value in own.items())
    assert not [line for line in given if line.startswith(("OMP_", "CUDA_DEVICE", "NVTE_"))]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"GPUS_PER_NODE": "", "PATH": "/usr/bin:/bin"}, "nvidia-smi lists no GPU"),
        ({"GPUS_PER_NODE": "8", "NNODES": "2"}, "set RDZV_ENDPOINT"),
    ],
)
def test_missing_settings_are_named(more: dict[str, str], message: str) -> None:
    printed = run("bash", str(EXAMPLES / "run_espo_8b.sh"), cwd=ROOT, env=environment(**more),
                  status=2)  # fmt: skip
    assert printed.startswith("error: ") and message in printed


def test_dry_run_starts_no_ranks() -> None:
    printed = run(
        "bash", str(EXAMPLES / "run_espo_8b.sh"), "--dry-run", "--recipe", "sudoku", cwd=ROOT,
        env=environment(NNODES="2"),
    )  # fmt: skip
    assert "16 GPUs of 80 GB in 2 nodes of 8" in printed and "The plan fits." in printed
