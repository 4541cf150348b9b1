"""Transformer Engine's own Python layer under this package's specs: what needs no numbers."""

from typing import Any

import pytest
import torch
import transformer_engine.pytorch as te
from conftest import Build
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.utils import unwrap_model
from torch import Tensor
from transformer_engine.pytorch.quantization import FP8GlobalStateManager

from megatron_espo.passes.pipeline import RowBatch, forward_only
from megatron_espo.simulate.cuda import device

FP8 = ("--fp8-format", "hybrid")
RECIPES = {"tensorwise": "Float8CurrentScaling", "blockwise": "Float8BlockScaling"}


def passed(model: Any, width: int = 64, lengths: tuple[int, ...] = (64, 50)) -> Tensor:
    """Logits of all positions of rows of different lengths."""
    for chunk in model.chunks:
        chunk.eval()
    host = torch.tensor(lengths)
    rows, positions = (torch.arange(width)[None] < host[:, None]).nonzero(as_tuple=True)
    tokens = torch.zeros(len(lengths), width, dtype=torch.int64)
    batch = RowBatch(tokens, host, rows, positions)
    return forward_only(model.chunks, [batch], lambda x, _: x, False, model.layout)[0]


def sharded(model: Any) -> dict[tuple[Any, ...], tuple[Any, ...]]:
    """Key, kind, shape and place of everything in a checkpoint of the model."""
    (chunk,) = unwrap_model(list(model.chunks))
    state = chunk.sharded_state_dict()
    apply_factories(state)
    parts, found = list(state.values()), {}
    while parts:
        part = parts.pop()
        if isinstance(part, list | dict):  # what a factory made: the halves of a gated layer
            parts += part.values() if isinstance(part, dict) else part
            continue
        assert isinstance(part, ShardedTensor | ShardedObject), part
        place = (part.key, tuple(part.global_offset))
        assert place not in found
        found[place] = (type(part).__name__, tuple(part.global_shape))
    return found


def test_layers_are_transformer_engines_own(build: Build) -> None:
    (model,) = unwrap_model(list(build().chunks))
    kinds = {
        kind: sum(isinstance(module, kind) for module in model.modules())
        for kind in (te.LayerNormLinear, te.Linear, te.DotProductAttention, te.RMSNorm)
    }
    assert list(kinds.values()) == [4, 4, 2, 1], kinds
    assert type(model.output_layer) is ColumnParallelLinear


@pytest.mark.parametrize("flags", [(), FP8], ids=["bf16", "fp8"])
def test_checkpoint_keys_and_shapes_are_those_of_the_local_layers(
    build: Build, flags: tuple[str, ...]
) -> None:
    ours = sharded(build(*flags))
    local = sharded(build("--transformer-impl", "local"))
    extra = {place for place in ours if "_extra_state" in place[0]}
    # Transformer Engine's layers keep one per layer whether it computes in FP8 or not.
    assert len(extra) >= 2 * 4
    assert {k: v for k, v in ours.items() if k not in extra} == {
        k: v for k, v in local.items() if "_extra_state" not in k[0]
    }
    assert all(kind == "ShardedObject" for kind, _ in (ours[place] for place in extra))


def test_attention_is_bidirectional_and_takes_cudnns_kernel(build: Build) -> None:
    model = build()
    (chunk,) = unwrap_model(list(model.chunks))
    for layer in chunk.decoder.layers:
        assert layer.self_attention.attn_mask_type == AttnMaskType.padding
    passed(model)
    shapes = device().ledger.phase.attention
    # The last layer's queries may be fewer than its keys: PyTorch's kernel.
    assert shapes == {
        "cuDNN 2 x 64 x 64 padding_mask": 1,
        "PyTorch 2 x 64 x 64 masked": 1,
    }
    assert not device().ledger.phase.complaints


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_reaches_the_linear_layers_and_not_the_head(build: Build, recipe: str) -> None:
    model = build(*FP8, "--fp8-recipe", recipe)
    (chunk,) = unwrap_model(list(model.chunks))
    seen: list[tuple[str, bool, str]] = []

    def note(module: Any, *_: Any) -> None:
        on = FP8GlobalStateManager.is_fp8_enabled()
        used = type(FP8GlobalStateManager.get_fp8_recipe()).__name__ if on else ""
        seen.append((type(module).__name__, on, used))

    for module in chunk.modules():
        if isinstance(module, te.Linear | te.LayerNormLinear | ColumnParallelLinear):
            module.register_forward_pre_hook(note)
    passed(model)
    name = RECIPES[recipe]
    layer = [
        ("TELayerNormColumnParallelLinear", True, name),
        ("TERowParallelLinear", True, name),
    ]
    assert seen == 4 * layer + [("ColumnParallelLinear", False, "")]
    operations = device().ledger.phase.operations
    # Eight products of activations and weights, each cast once; the head's is in bf16.
    assert operations["generic_gemm"] == 8 and operations["quantize"] >= 16, operations


def test_fp8_refuses_shapes_that_its_matrix_products_cannot_take(build: Build) -> None:
    model = build(*FP8)
    assert model.pad_multiple % 16 == 0
    passed(model, 48, (48, 30))
    with pytest.raises(ValueError, match="divisible by 8"):
        passed(model, 41, (41, 30, 7))


def test_default_recipe_is_stateless_only_where_there_is_fp8(build: Build) -> None:
    from megatron.training import get_args

    build(*FP8)
    assert get_args().fp8_recipe == "tensorwise"
    build()
    # Megatron's optimizer reads the recipe in any run.
    assert get_args().fp8_recipe == "delayed"


def test_kernels_are_counted_with_their_operations_and_memory(build: Build) -> None:
    model = build()
    ledger = device().ledger
    before, live = ledger.phase.flops, ledger.live
    logits = passed(model)
    rows = 64 + 50
    assert logits.shape == (rows, model.chunks[0].module.module.output_layer.weight.size(0))
    # Two layers over 2 x 64 tokens; after its keys and values the last one, and the head, go on
    # with the rows that are read.
    tokens, h, ffn, heads, groups, d = 2 * 64, 64, 128, 4, 2, 16
    projection, attention = 2 * h * (heads + 2 * groups) * d, 4 * 2 * 64 * 64 * heads * d
    after = 2 * heads * d * h + 2 * h * 3 * ffn
    expected = 2 * (tokens * projection + attention) + (tokens + rows) * after
    expected += 2 * rows * h * logits.size(1)
    assert ledger.phase.flops - before == expected
    del logits
    assert ledger.live - live < 1 << 16
