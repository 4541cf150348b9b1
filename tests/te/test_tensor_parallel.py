"""Transformer Engine's layers on two ranks that share a model.

The ranks are tensor-parallel, with and without sequence parallelism, or context-parallel. The file
starts itself again under torchrun.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import TE, Build
from megatron.training.checkpointing import save_checkpoint
from test_fp8 import completions_of, elbo

WORLD = int(os.environ.get("WORLD_SIZE", "1"))
TP = ("--tensor-model-parallel-size", "2")
SPLITS = {
    "tp": TP,
    "tp, sequence parallel": (*TP, "--sequence-parallel"),
    "cp": ("--context-parallel-size", "2"),
}
on_two_ranks = pytest.mark.skipif(WORLD != 2, reason="runs inside test_two_ranks_share_a_model")


@pytest.mark.skipif(WORLD != 1, reason="starts the others")
def test_two_ranks_share_a_model() -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            "--no-python", sys.executable, "-m", "pytest", __file__, "-q", "-x", "--timeout", "240",
            "-p", "no:cacheprovider",
        ],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    assert done.stdout.count(" passed") == 2, done.stdout[-2000:]


@pytest.fixture(scope="module", autouse=True)
def end() -> Iterator[None]:
    yield
    if WORLD == 2 and dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One folder of both ranks."""
    box = [str(tmp_path_factory.mktemp("weights"))]
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    dist.broadcast_object_list(box, 0)
    return box[0]


@pytest.fixture
def weights(folder: str, build: Build) -> tuple[str, ...]:
    """Flags that load the weights that all models here have."""
    if not Path(folder, "latest_checkpointed_iteration.txt").exists():
        dist.barrier()
        written = build(*TE, "--save", folder)
        save_checkpoint(1, list(written.model.chunks), written.optimizer, written.scheduler, 0)
    dist.barrier()
    return ("--pretrained-checkpoint", folder)


@on_two_ranks
@pytest.mark.parametrize("split", SPLITS)
def test_a_model_in_two_parts_is_the_same_model(
    build: Build, weights: tuple[str, ...], split: str
) -> None:
    whole = build(*TE, *weights)
    wanted, tokens = elbo(whole), completions_of(whole, 3)
    parts = build(*TE, *SPLITS[split], *weights)
    assert ((elbo(parts) - wanted).abs().max() / wanted.abs().max()) < 1e-5
    assert torch.equal(completions_of(parts, 3), tokens)
