"""Transformer Engine layers against Megatron's local ones, with the stand-in's arithmetic.

What needs no numbers is tested with Transformer Engine's own Python layer: tests/simulate.
"""

from pathlib import Path

import pytest
import torch
import transformer_engine as te
from conftest import FP8, TE, Build, Built
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.utils import unwrap_model
from megatron.training.checkpointing import save_checkpoint
from torch import Tensor
from transformer_engine.pytorch import quantization as te_fp8

from megatron_espo.passes.pipeline import RowBatch, forward_only

RECIPES = {
    "tensorwise": "Float8CurrentScaling",
    "blockwise": "Float8BlockScaling",
    "mxfp8": "MXFP8BlockScaling",
}


def test_standin_refuses_what_the_real_one_does_not_take() -> None:
    with pytest.raises(TypeError, match="no_such_option"):
        te.pytorch.Linear(16, 16, no_such_option=1)
    with pytest.raises(TypeError, match="num_attention_heads"):
        te.pytorch.DotProductAttention(kv_channels=16)


def logits_of(built: Built) -> Tensor:
    """Logits of all positions of three rows of different lengths."""
    model = built.model
    for chunk in model.chunks:
        chunk.eval()
    tokens = torch.randint(250, (3, 32), generator=torch.Generator().manual_seed(5))
    lengths = torch.tensor([32, 21, 9])
    rows, positions = (torch.arange(32)[None] < lengths[:, None]).nonzero(as_tuple=True)
    batch = RowBatch(tokens, lengths, rows, positions)
    function = lambda logits, _: logits.float()  # noqa: E731
    return forward_only(model.chunks, [batch], function, False, model.layout)[0]


def test_attention_is_bidirectional_in_every_layer(build: Build) -> None:
    for flags, core in ((TE, "BidirectionalTEAttention"), ((), None)):
        built = build(*flags)
        (model,) = unwrap_model(list(built.model.chunks))
        layers = list(model.decoder.layers)
        assert len(layers) == 2
        for layer in layers:
            assert layer.self_attention.attn_mask_type == AttnMaskType.padding
        if core is not None:
            logits_of(built)
            cores = [layer.self_attention.core_attention for layer in layers]
            assert {type(c).__name__ for c in cores} == {core}
            # The last layer's queries are fewer than its keys: PyTorch's kernel.
            assert [c.mask_types for c in cores] == [["padding"], []]


@pytest.mark.parametrize("source", ["local", "transformer_engine"])
def test_checkpoints_move_between_the_backends(build: Build, tmp_path: Path, source: str) -> None:
    order = ((), TE) if source == "local" else (TE, ())
    written = build(*order[0], "--save", str(tmp_path))
    # Norm weights of 1 and zero biases would hide a wrong name.
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in unwrap_model(list(written.model.chunks))[0].parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    expected = logits_of(written)
    written.optimizer.reload_model_params()
    save_checkpoint(1, list(written.model.chunks), written.optimizer, written.scheduler, 0)
    read = build(*order[1], "--pretrained-checkpoint", str(tmp_path), "--seed", "77")
    actual = logits_of(read)
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_reaches_the_linear_layers_and_not_the_head(build: Build, recipe: str) -> None:
    built = build(*FP8, "--fp8-recipe", recipe)
    (model,) = unwrap_model(list(built.model.chunks))
    assert type(model.output_layer) is ColumnParallelLinear
    seen = []
    model.output_layer.register_forward_pre_hook(lambda *_: seen.append(te_fp8.state.enabled))
    model.output_layer.register_forward_hook(lambda *call: seen.append(call[2][0].dtype))
    logits = logits_of(built)
    name = RECIPES[recipe]
    layer = [
        ("TELayerNormColumnParallelLinear", name),
        ("BidirectionalTEAttention", name),
        ("TERowParallelLinear", name),
        ("TELayerNormColumnParallelLinear", name),
        ("TERowParallelLinear", name),
    ]
    # The last layer, where fewer queries than keys are left, attends through PyTorch's kernel.
    assert te_fp8.calls == layer + layer[:1] + layer[2:]
    assert seen == [False, torch.float32]
    # The rounding is there, and it is small.
    plain = logits_of(build(*TE, "--bf16"))
    deviation = (logits - plain).abs().mean() / plain.std()
    assert 1e-4 < deviation < 0.2
