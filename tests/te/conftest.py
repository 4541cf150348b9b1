"""One process with the stand-in for Transformer Engine in place of the real one.

In a folder and a process of its own: Megatron looks for Transformer Engine when it is imported.
"""

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent / "standin"))

import pytest
import torch.distributed as dist

from megatron_espo import device

device.prepare()

from megatron.core import mpu  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.num_microbatches_calculator import (  # noqa: E402
    unset_num_microbatches_calculator,
)
from megatron.core.rerun_state_machine import destroy_rerun_state_machine  # noqa: E402
from megatron.training import training as megatron_training  # noqa: E402
from megatron.training.global_vars import destroy_global_vars  # noqa: E402
from transformer_engine.pytorch import quantization as te_fp8  # noqa: E402

from megatron_espo.data.tokenizer import byte_tokenizer, save_tokenizer  # noqa: E402
from megatron_espo.model.handle import DiffusionModel  # noqa: E402
from megatron_espo.startup import arguments  # noqa: E402
from megatron_espo.startup.arguments import initialize_arguments  # noqa: E402
from megatron_espo.startup.setup import build_model, diffusion_model  # noqa: E402
from megatron_espo.training.own_loop import connect_schedule  # noqa: E402

SHAPE = (
    "--preset tiny --num-layers 2 --hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 4 "
    "--group-query-attention --num-query-groups 2 --add-qkv-bias "
    "--make-vocab-size-divisible-by 8 --seq-length 48 --micro-batch-size 2 --train-iters 10 "
    "--lr 1e-3 --init-method-std 0.2 --mask-token-id 256"
).split()
TE = ("--transformer-impl", "transformer_engine")
FP8 = (*TE, "--bf16", "--fp8-format", "hybrid")

_check_backend = arguments.check_backend


def _check_backend_as_with_a_gpu(args: Any) -> None:
    with mock.patch.object(device, "has_cuda", lambda: True):
        _check_backend(args)


arguments.check_backend = _check_backend_as_with_a_gpu


@dataclass(frozen=True)
class Built:
    """A model, and what trains it."""

    model: DiffusionModel
    optimizer: Any
    scheduler: Any
    args: Any


Build = Callable[..., Built]


def forget() -> None:
    """Let Megatron start anew."""
    destroy_global_vars()
    unset_num_microbatches_calculator()
    destroy_rerun_state_machine()
    if mpu.model_parallel_is_initialized():
        mpu.destroy_model_parallel()


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("tokenizer"))
    save_tokenizer(byte_tokenizer(), folder)
    return folder


@pytest.fixture
def build(tokenizer: str) -> Iterator[Build]:
    """Build a model from flags, with the code that training uses, on one rank or under torchrun."""
    if not dist.is_initialized():
        alone: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group("gloo", **({} if "RANK" in os.environ else alone))

    def make(*flags: str) -> Built:
        forget()

        def no_checks(args: Any) -> None:
            args.max_position_embeddings = 4096
            args.rerun_mode = "disabled"

        args = initialize_arguments([*SHAPE, "--tokenizer-model", tokenizer, *flags], no_checks)
        mpu.initialize_model_parallel(
            args.tensor_model_parallel_size, context_parallel_size=args.context_parallel_size
        )
        megatron_training.initialize_megatron()
        chunks, optimizer, scheduler = megatron_training.setup_model_and_optimizer(
            ModelType.encoder_or_decoder, build_model, checkpointing_context={}
        )
        connect_schedule(chunks, optimizer)
        te_fp8.calls.clear()
        return Built(diffusion_model(chunks), optimizer, scheduler, args)

    yield make
    forget()
