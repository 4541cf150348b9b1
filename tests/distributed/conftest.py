"""Four gloo ranks for the whole folder, started once (see ``make test-dist``).

Every rank runs the same tests in the same order. A layout is built with the code that training
uses, from a checkpoint that one fixture wrote, so all layouts hold the same weights.
"""

import gc
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from layouts import write_if_asked
from torch import Tensor

from megatron_espo import device

device.prepare()

from megatron.core import mpu  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.num_microbatches_calculator import (  # noqa: E402
    unset_num_microbatches_calculator,
)
from megatron.core.rerun_state_machine import destroy_rerun_state_machine  # noqa: E402
from megatron.training import training as megatron_training  # noqa: E402
from megatron.training.checkpointing import save_checkpoint  # noqa: E402
from megatron.training.global_vars import destroy_global_vars  # noqa: E402

from megatron_espo.data.tokenizer import byte_tokenizer, save_tokenizer  # noqa: E402
from megatron_espo.model.handle import DiffusionModel  # noqa: E402
from megatron_espo.startup.arguments import initialize_arguments  # noqa: E402
from megatron_espo.startup.setup import build_model, diffusion_model  # noqa: E402
from megatron_espo.training.own_loop import connect_schedule  # noqa: E402

WORLD = 4
# Four layers, grouped queries, and a vocabulary of 262 that layouts pad to 264, 272 or 288.
SHAPE = (
    "--preset tiny --num-layers 4 --hidden-size 64 --ffn-hidden-size 96 "
    "--num-attention-heads 8 --group-query-attention --num-query-groups 4 --add-qkv-bias "
    "--make-vocab-size-divisible-by 8 --seq-length 48 --micro-batch-size 2 --train-iters "
    "10 --lr 1e-3 --init-method-std 0.2 --mask-token-id 256"
).split()


@dataclass(frozen=True)
class Built:
    """A model in one layout."""

    model: DiffusionModel
    optimizer: Any
    scheduler: Any
    args: Any
    # Of the sequences of an update, once they were computed.
    elbos: list[Tensor] = field(default_factory=list)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) != WORLD:
        skip = pytest.mark.skip(reason="start with torchrun --nproc-per-node 4")
        for item in items:
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def process_group() -> Iterator[None]:
    if int(os.environ.get("WORLD_SIZE", "1")) == WORLD:
        dist.init_process_group("gloo", timeout=timedelta(minutes=3))
    yield
    if dist.is_initialized():
        write_if_asked()
        dist.destroy_process_group()


@pytest.fixture(scope="session")
def shared_folder(process_group: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    box = [str(tmp_path_factory.mktemp("shared")) if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(box, 0)
    return str(box[0])


@pytest.fixture(scope="session")
def tokenizer_folder(shared_folder: str) -> str:
    folder = os.path.join(shared_folder, "tokenizer")
    if dist.get_rank() == 0:
        save_tokenizer(byte_tokenizer(), folder)
    dist.barrier()
    return folder


def _no_checks(args: Any) -> None:
    args.max_position_embeddings = 4096
    args.rerun_mode = "disabled"


def build_layout(
    tokenizer: str,
    tp: int,
    pp: int,
    extra: tuple[str, ...] = (),
    solo: bool = False,
    shape: Sequence[str] = SHAPE,
) -> Built:
    """Build a model in a layout of the four ranks.

    Args:
        tokenizer: tokenizer folder.
        tp: tensor-parallel size.
        pp: pipeline-parallel size.
        extra: more flags.
        solo: each rank treats itself as the only one; the data-parallel copies that Megatron
            knows of compute the same thing, and the mean of equal gradients is the gradient.
        shape: the model's flags.
    """
    destroy_global_vars()
    unset_num_microbatches_calculator()
    destroy_rerun_state_machine()
    if mpu.model_parallel_is_initialized():
        mpu.destroy_model_parallel()
        # The objects that hold the last references refer to each other.
        gc.collect()
    argv = [
        *shape,
        "--tensor-model-parallel-size",
        str(tp),
        "--pipeline-model-parallel-size",
        str(pp),
        "--tokenizer-model",
        tokenizer,
        *extra,
    ]
    args = initialize_arguments(argv, _no_checks)
    mpu.initialize_model_parallel(
        tp,
        pp,
        args.virtual_pipeline_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
    )
    megatron_training.initialize_megatron()
    chunks, optimizer, scheduler = megatron_training.setup_model_and_optimizer(
        ModelType.encoder_or_decoder, build_model, checkpointing_context={}
    )
    connect_schedule(chunks, optimizer)
    model = diffusion_model(chunks)
    if solo:
        groups = [mpu.create_group([rank]) for rank in range(WORLD)]
        own = groups[dist.get_rank()]
        model = replace(model, layout=replace(model.layout, dp=own))
    return Built(model, optimizer, scheduler, args)


@pytest.fixture(scope="session")
def checkpoints(shared_folder: str, tokenizer_folder: str) -> dict[bool, str]:
    """Random weights of a model without and with the logit shift; every layout loads them."""
    return {shift: save_weights(shared_folder, tokenizer_folder, shift) for shift in (False, True)}


# A rank that no layout splits evenly, a scale, and the head besides all other projections.
LORA = "--lora-rank 5 --lora-alpha 8 --lora-targets all-linear lm_head".split()


@pytest.fixture(scope="session")
def adapters(shared_folder: str, tokenizer_folder: str, checkpoints: dict[bool, str]) -> list[str]:
    """Flags of a model with adapters that change what it computes; every layout loads them."""
    folder = os.path.join(shared_folder, "adapters")
    flags = ["--pretrained-checkpoint", checkpoints[False], *LORA]
    built = build_layout(tokenizer_folder, 1, 1, (*flags, "--save", folder))
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for chunk in built.model.chunks:
            for name, parameter in chunk.named_parameters():
                if name.endswith("_b"):
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    built.optimizer.reload_model_params()
    save_checkpoint(1, list(built.model.chunks), built.optimizer, built.scheduler, 0)
    return [*flags, "--load", folder, "--no-load-optim"]


def save_weights(shared_folder: str, tokenizer_folder: str, shift: bool) -> str:
    folder = os.path.join(shared_folder, f"weights-{shift}")
    flags = ("--save", folder, *(["--logit-shift"] if shift else []))
    built = build_layout(tokenizer_folder, 1, 1, flags)
    # Norm weights of 1 and zero biases would hide a wrong layout of them.
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for chunk in built.model.chunks:
            for _, parameter in sorted(chunk.named_parameters(), key=lambda pair: pair[0]):
                if parameter.dim() == 1:
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    built.optimizer.reload_model_params()
    save_checkpoint(1, list(built.model.chunks), built.optimizer, built.scheduler, 0)
    return folder
