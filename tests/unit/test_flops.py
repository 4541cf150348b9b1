"""Counted operations against the matrix products that PyTorch dispatches for the real model."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core import mpu
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.training import get_args
from megatron_state import new_groups
from torch.utils.flop_counter import FlopCounterMode

from megatron_espo.adapters.attach import without_adapters
from megatron_espo.config import EspoConfig, RolloutConfig
from megatron_espo.data.tokenizer import byte_tokenizer, save_tokenizer
from megatron_espo.diffusion.noise import elbo_views
from megatron_espo.generation.sampler import generate
from megatron_espo.model.cpu import matmul
from megatron_espo.model.handle import DiffusionModel
from megatron_espo.model.provider import model_provider
from megatron_espo.monitor.flops import (
    ModelDimensions,
    forward_flops,
    generation_flops,
    passed_flops,
    rollout_flops,
    training_flops,
)
from megatron_espo.passes import block_mask
from megatron_espo.passes.batch import pack_sequences, view_batches
from megatron_espo.passes.shapes import Shapes
from megatron_espo.random import stream
from megatron_espo.rl.elbo import cut_views, draw_views, elbo_of_views
from megatron_espo.rl.update import accumulate_gradient
from megatron_espo.startup.arguments import initialize_arguments
from megatron_espo.startup.setup import start_anew

PROMPTS = [[5, 7, 11, 2], [3, 1, 4, 8]]
LENGTH = 16
POSITIONS = 4 + LENGTH


@pytest.fixture(scope="module")
def model(one_rank: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DiffusionModel]:
    from megatron_espo.startup.setup import diffusion_model

    folder = tmp_path_factory.mktemp("model") / "tokenizer"
    save_tokenizer(byte_tokenizer(), folder)
    start_anew()
    argv = (
        "--preset tiny --num-layers 2 --group-query-attention --num-query-groups 2 --add-qkv-bias "
        "--kv-channels 12 --qk-layernorm "
        "--make-vocab-size-divisible-by 2 --vocab-size 262 --seq-length 64 "
        f"--micro-batch-size 1 --train-iters 1 --tokenizer-model {folder}"
    )
    initialize_arguments(argv.split(), lambda args: None)
    new_groups()
    model_parallel_cuda_manual_seed(3)
    yield diffusion_model([model_provider()])
    mpu.destroy_model_parallel()
    start_anew()


@pytest.fixture
def dimensions(model: DiffusionModel) -> ModelDimensions:
    return ModelDimensions.from_args(get_args())


def _onednn_flops(rows: torch.Size, weight: torch.Size, *_: object, **__: object) -> int:
    """Operations of oneDNN's linear layer, which PyTorch's counter does not know."""
    return 2 * rows.numel() * weight[0]


def counted(work: Callable[[], object]) -> int:
    """Operations of the layers and the output head (drawing tokens takes a product of its own)."""
    known = {torch.ops.mkldnn._linear_pointwise: _onednn_flops} if matmul.is_handled() else {}
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        work()
    counts = counter.get_flop_counts()
    return sum(sum(counts[f"GPTModel.{part}"].values()) for part in ("decoder", "output_layer"))


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"denoising_steps": 16},
        {"remasking": "random"},
        {"remasking": "entropy"},
        {"guidance_scale": 1.0},
    ],
)
def test_generation_flops_are_those_of_the_sampler(
    model: DiffusionModel, dimensions: ModelDimensions, sampling: dict[str, object]
) -> None:
    config = RolloutConfig(**{"completion_length": LENGTH, "block_length": 8,
                              "denoising_steps": 6, **sampling})  # fmt: skip
    ids = torch.arange(len(PROMPTS))
    got = counted(lambda: generate(model, PROMPTS, ids, config, 1, "flops"))
    assert got == generation_flops(dimensions, len(PROMPTS), POSITIONS, config)


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"remasking": "random"},
        {"guidance_scale": 1.0},
        {"cache": "prefix"},
        {"cache": "dual"},
        {"cache": "dual", "cache_refresh_steps": 2, "denoising_steps": 16},
        {"cache": "dual", "block_length": 16},
        {"threshold": 1e-9},
        {"cache": "dual", "threshold": 0.5, "micro_batch_size": 1},
        {"early_stop": True, "micro_batch_size": 1},
    ],
)
def test_what_a_call_says_that_it_passed_is_what_it_computed(
    model: DiffusionModel, dimensions: ModelDimensions, sampling: dict[str, Any]
) -> None:
    config = RolloutConfig(**{"completion_length": LENGTH, "block_length": 8,
                              "denoising_steps": 6, **sampling})  # fmt: skip
    made = []
    got = counted(
        lambda: made.append(
            generate(model, PROMPTS, torch.arange(len(PROMPTS)), config, 1, "flops")
        )
    )
    work = made[0].work
    assert work.shape == (2, 4) and bool((work > 0).all())
    assert got == passed_flops(dimensions, *work.sum(0).tolist())


@pytest.mark.parametrize("gradient", ["joint", "two_pass"])
@pytest.mark.parametrize("kl_coef", [0.0, 1e-3])
def test_rollout_flops_are_those_of_its_phases(
    model: DiffusionModel, dimensions: ModelDimensions, gradient: str, kl_coef: float
) -> None:
    espo = EspoConfig(
        prompts_per_rollout=1, group_size=2, updates_per_rollout=3, num_mc=2,
        gradient=gradient, kl_coef=kl_coef,  # type: ignore[arg-type]
    )  # fmt: skip
    rollout = RolloutConfig(completion_length=LENGTH, block_length=8, denoising_steps=8)
    completions = torch.randint(0, 250, (2, LENGTH))
    ids = torch.arange(2)
    views = elbo_views("coupled", stream(1, "e"), ids, ids, 2, LENGTH, espo.num_mc)
    sequences = pack_sequences(PROMPTS, completions, model.pad_token_id, Shapes())
    batches = view_batches(sequences, views, model.mask_token_id, model.vocab_size, 4)

    def evaluate() -> None:
        elbo_of_views(model, batches, views)

    def update() -> None:
        advantages, ref = torch.tensor([1.0, -1.0]), torch.zeros(2, 2)
        ref_elbo = ref if kl_coef else None
        accumulate_gradient(model, batches, views, None, ref_elbo, advantages, LENGTH, espo, 2)

    flops = rollout_flops(dimensions, POSITIONS, espo, rollout)
    one = counted(evaluate)
    # Views differ in the number of masked positions, to which the last layer's attention is
    # filled up; that is some hundredth here and less in large models.
    assert flops.old_elbo == pytest.approx(2 * one, rel=0.02) and flops.old_elbo <= 2 * one
    assert flops.ref_elbo == (1.5 * flops.old_elbo if kl_coef else 0)
    assert flops.update == pytest.approx(3 * counted(update), rel=0.02)
    assert flops.total == sum((flops.generation, flops.old_elbo, flops.ref_elbo, flops.update))


def test_flops_of_adapters_are_those_of_an_update(model: DiffusionModel) -> None:
    """Frozen weights have a gradient of their inputs alone; the reference is without adapters."""
    args = get_args()
    args.lora_rank, args.lora_targets = 3, ["q_proj", "v_proj", "o_proj", "up_proj", "lm_head"]
    try:
        adapted = replace(model, chunks=(model_provider(),))
        dimensions = ModelDimensions.from_args(args)
    finally:
        args.lora_rank = args.lora_targets = None
    espo = EspoConfig(prompts_per_rollout=1, group_size=2, updates_per_rollout=3, num_mc=2)
    rollout = RolloutConfig(completion_length=LENGTH, block_length=8, denoising_steps=8)
    ids = torch.arange(2)
    views = elbo_views("coupled", stream(1, "e"), ids, ids, 2, LENGTH, espo.num_mc)
    completions = torch.randint(0, 250, (2, LENGTH))
    sequences = pack_sequences(PROMPTS, completions, model.pad_token_id, Shapes())
    batches = view_batches(sequences, views, model.mask_token_id, model.vocab_size, 4)
    flops = rollout_flops(dimensions, POSITIONS, espo, rollout)
    one = counted(lambda: elbo_of_views(adapted, batches, views))
    with without_adapters(adapted.chunks):
        base = counted(lambda: elbo_of_views(adapted, batches, views))
    update = counted(
        lambda: accumulate_gradient(
            adapted, batches, views, None, torch.zeros(2, 2), torch.ones(2), LENGTH, espo, 2
        )
    )
    assert flops.old_elbo == pytest.approx(2 * one, rel=0.02) and base < one
    assert flops.ref_elbo == pytest.approx(3 * base, rel=0.02)
    # What the last layer's attention is filled up to is a larger share where weights cost less.
    assert flops.update == pytest.approx(3 * update, rel=0.03) and flops.update <= 3 * update
    assert flops.update < 0.85 * rollout_flops(dimensions.base, POSITIONS, espo, rollout).update


def test_forward_flops_by_hand() -> None:
    tiny = ModelDimensions(2, 2, 3, 2, 1, 1, vocab_size=5)
    # q 2x2, k and v 2x1 each, output 2x2, gate, up and down 2x3 each, scores and their
    # application 4x2 each; the last layer gives 3 of 4 positions; 3 head rows of 2x5.
    products = 2 * 4 * (4 + 4) + (4 + 3) * (4 + 18 + 2 * 4 * 2) + 3 * 10
    assert forward_flops(tiny, 1, 4, 3) == 2 * products
    assert training_flops(tiny, 1, 4, 3) == 6 * products
    # A window of 3 positions that attends to 4: the last layer gives all of them.
    assert forward_flops(tiny, 1, 3, 3, keys=4) == 2 * (2 * 3 * 8 + 2 * 3 * (22 + 16) + 30)
    assert forward_flops(tiny, 2, 4, 6) == 2 * forward_flops(tiny, 1, 4, 3)


def test_flops_of_llada_are_two_per_weight_and_token() -> None:
    # Without attention scores, a forward pass costs twice the weights but embedding and norms.
    llada = ModelDimensions(32, 4096, 12288, 32, 32, 128, 126464)
    weights = 8_015_581_184 - 126464 * 4096 - (2 * 32 + 1) * 4096
    one_token = forward_flops(llada, 1, 1, 1, keys=0)
    assert one_token == 2 * weights
    assert forward_flops(replace(llada, num_layers=0), 1, 1, 1) == 2 * 126464 * 4096


@pytest.mark.parametrize("gradient", ["joint", "two_pass"])
def test_flops_of_block_models_are_those_of_their_passes(
    model: DiffusionModel, dimensions: ModelDimensions, gradient: Any, monkeypatch: Any
) -> None:
    """Sampling with and without a cache, and rows that hold several noisy copies."""
    monkeypatch.setattr(block_mask, "_SEGMENT", 8)
    copies = 4 if gradient == "joint" else 2
    model = replace(model, blocks=block_mask.BlockAttention(4, False))
    dimensions = replace(dimensions, blocks=model.blocks.with_copies(copies))
    ids = torch.arange(2)
    for cache in ("none", "exact"):
        rollout = RolloutConfig(LENGTH, 4, 8, cache=cache)  # type: ignore[arg-type]
        made: list[Any] = []

        def sample(made: list[Any] = made, rollout: RolloutConfig = rollout) -> None:
            made.append(generate(model, PROMPTS, ids, rollout, 1, "flops"))

        got = counted(sample)
        assert passed_flops(dimensions, *made[0].work.sum(0).tolist()) == pytest.approx(got, 0.02)
        # One state is read of passes without candidates, which a plan leaves out.
        assert generation_flops(dimensions, 2, POSITIONS, rollout) == pytest.approx(got, rel=0.04)
    espo = EspoConfig(prompts_per_rollout=1, group_size=2, updates_per_rollout=3,
                      gradient=gradient, num_mc=2)  # fmt: skip
    completions = torch.randint(0, 250, (2, LENGTH))
    sequences = pack_sequences(PROMPTS, completions, model.pad_token_id, Shapes())
    views = draw_views(model, sequences, "coupled", stream(1, "e"), ids, ids, 2, espo.num_mc)
    batches = cut_views(model, sequences, views, copies)
    flops = rollout_flops(dimensions, POSITIONS, espo, rollout)
    one = counted(lambda: elbo_of_views(model, batches, views))
    assert flops.old_elbo == pytest.approx(2 * one, rel=0.02)
    update = counted(
        lambda: accumulate_gradient(
            model, batches, views, None, torch.zeros(2, 2), torch.ones(2), LENGTH, espo, 2
        )
    )
    assert flops.update == pytest.approx(3 * update, rel=0.02)
