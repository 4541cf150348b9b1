"""Tests on one GPU, with the real Transformer Engine; skipped where there is none.

``make test-gpu`` runs them. The models are small: what is tested is that the kernels compute what
the CPU tests say, not how fast.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_espo import device
from megatron_espo.data.tokenizer import byte_tokenizer, save_tokenizer
from megatron_espo.model.handle import DiffusionModel

device.prepare()

# Dimensions that every recipe takes, and heads that the fused attention kernels take.
SHAPE = (
    "--preset tiny --num-layers 2 --hidden-size 512 --ffn-hidden-size 1024 "
    "--num-attention-heads 8 --group-query-attention --num-query-groups 4 --add-qkv-bias "
    "--make-vocab-size-divisible-by 8 --seq-length 128 --micro-batch-size 2 --train-iters 10 "
    "--lr 1e-3 --init-method-std 0.05 --mask-token-id 256"
).split()
TE = ("--transformer-impl", "transformer_engine", "--bf16")
LOCAL = ("--transformer-impl", "local", "--bf16")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.gpu)
        if not device.has_cuda():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@dataclass(frozen=True)
class Built:
    """A model, and what trains it."""

    model: DiffusionModel
    optimizer: Any
    scheduler: Any
    args: Any


Build = Callable[..., Built]


@pytest.fixture
def build(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Build]:
    """Build a model from flags, with the code that training uses."""
    from megatron.core import mpu
    from megatron.core.enums import ModelType
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
    from megatron.core.rerun_state_machine import destroy_rerun_state_machine
    from megatron.training import training as megatron_training
    from megatron.training.global_vars import destroy_global_vars

    from megatron_espo.model.provider import model_provider
    from megatron_espo.startup.arguments import initialize_arguments
    from megatron_espo.startup.setup import diffusion_model
    from megatron_espo.training.own_loop import connect_schedule

    tokenizer = str(tmp_path_factory.mktemp("tokenizer"))
    save_tokenizer(byte_tokenizer(), tokenizer)
    torch.cuda.set_device(0)
    if not dist.is_initialized():
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)

    def make(*flags: str) -> Built:
        destroy_global_vars()
        unset_num_microbatches_calculator()
        destroy_rerun_state_machine()
        if mpu.model_parallel_is_initialized():
            mpu.destroy_model_parallel()

        def no_checks(args: Any) -> None:
            args.max_position_embeddings = 4096
            args.rerun_mode = "disabled"

        args = initialize_arguments([*SHAPE, "--tokenizer-model", tokenizer, *flags], no_checks)
        megatron_training.initialize_megatron()
        chunks, optimizer, scheduler = megatron_training.setup_model_and_optimizer(
            ModelType.encoder_or_decoder, model_provider, checkpointing_context={}
        )
        connect_schedule(chunks, optimizer)
        return Built(diffusion_model(chunks), optimizer, scheduler, args)

    yield make


def recipe_or_skip(recipe: str) -> tuple[str, ...]:
    """Flags of an FP8 recipe; skips the test where the GPU does not run it."""
    from megatron_espo.model.fp8 import check_device

    try:
        check_device(recipe)
    except (ImportError, ValueError) as error:
        pytest.skip(str(error))
    return (*TE, "--fp8-format", "hybrid", "--fp8-recipe", recipe)
