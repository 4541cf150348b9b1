"""One process whose GPUs are not there, with Transformer Engine's own Python layer.

In a process of its own: Megatron looks for its devices and for Transformer Engine when it is
imported. The jobs of test_jobs.py run in processes that they start.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest

from megatron_espo.dry_run import support
from megatron_espo.dry_run.roofline import Ceilings
from megatron_espo.simulate import transformer_engine
from megatron_espo.simulate.ledger import Ledger

REASON = support.check()
if REASON is None and support.transformer_engine_folder() is None:
    REASON = "Transformer Engine's Python layer is not here: make te installs it"
if REASON is not None:
    if os.environ.get("REQUIRE_TRANSFORMER_ENGINE"):
        pytest.exit(REASON, returncode=1)
    collect_ignore_glob = ["test_*.py"]
    print(f"tests/simulate is skipped: {REASON}")
else:
    import torch
    import torch.distributed as dist

    from megatron_espo.simulate import cuda

    torch.set_num_threads(1)
    cuda.install(8)
    cuda.use(Ledger(0, Ceilings()))
    transformer_engine.install()

SHAPE = (
    "--preset tiny --num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 "
    "--group-query-attention --num-query-groups 2 --add-qkv-bias --kv-channels 16 --bf16 "
    "--make-vocab-size-divisible-by 8 --seq-length 64 --micro-batch-size 2 --train-iters 10 "
    "--lr 1e-3 --mask-token-id 256"
).split()

Build = Callable[..., Any]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    from megatron_espo.data.tokenizer import byte_tokenizer, save_tokenizer

    folder = str(tmp_path_factory.mktemp("tokenizer"))
    save_tokenizer(byte_tokenizer(), folder)
    return folder


@pytest.fixture
def build(tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Build]:
    """Build a model as rank 0 of some, with the code that training uses; returns its handle."""
    from megatron.core import mpu
    from megatron.core.enums import ModelType
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
    from megatron.core.rerun_state_machine import destroy_rerun_state_machine
    from megatron.training import training as megatron_training
    from megatron.training.global_vars import destroy_global_vars

    from megatron_espo.model.provider import model_provider
    from megatron_espo.startup.arguments import initialize_arguments
    from megatron_espo.startup.setup import diffusion_model

    def forget() -> None:
        destroy_global_vars()
        unset_num_microbatches_calculator()
        destroy_rerun_state_machine()
        if mpu.model_parallel_is_initialized():
            mpu.destroy_model_parallel()
        if dist.is_initialized():
            dist.destroy_process_group()

    def make(*flags: str, world_size: int = 1) -> Any:
        forget()
        ledger = Ledger(0, Ceilings())
        ledger.rank.facts["gpus_per_node"] = 8
        cuda.use(ledger)
        told = {"RANK": 0, "WORLD_SIZE": world_size, "LOCAL_RANK": 0, "MASTER_ADDR": "localhost"}
        for name, value in told.items():
            monkeypatch.setenv(name, str(value))

        def no_checks(args: Any) -> None:
            args.max_position_embeddings = 4096
            args.rerun_mode = "disabled"

        initialize_arguments([*SHAPE, "--tokenizer-model", tokenizer, *flags], no_checks)
        megatron_training.initialize_megatron()
        chunks, _, _ = megatron_training.setup_model_and_optimizer(
            ModelType.encoder_or_decoder, model_provider, checkpointing_context={}
        )
        return diffusion_model(chunks)

    yield make
    forget()
