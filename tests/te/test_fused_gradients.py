"""Weight gradients that layers and head add to Megatron's buffer themselves, without apex."""

import importlib.util

import pytest
import torch
from conftest import TE, Build, Built
from megatron.core.utils import unwrap_model
from test_fp8 import change, gradient
from torch import Tensor

from megatron_espo import device
from megatron_espo.model import presets

OVERLAPPED = ("--use-distributed-optimizer", "--overlap-grad-reduce")


def test_apex_is_not_here() -> None:
    """What the other tests rest on: with it, Megatron builds what it refuses to build without."""
    assert importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is None


def gradients(built: Built, mode: str = "two_pass") -> dict[str, Tensor]:
    """The buffers after a gradient of four sequences, and whether each was added to."""
    change(built)
    weights = [p.clone() for chunk in built.model.chunks for p in chunk.parameters()]
    gradient(built, mode)
    (chunk,) = built.model.chunks
    for now, before in zip(chunk.parameters(), weights, strict=True):
        assert torch.equal(now, before) and now.grad is None
    return {name: p.main_grad.clone() for name, p in chunk.named_parameters()}


def fused_parameters(built: Built) -> set[str]:
    (model,) = unwrap_model(list(built.model.chunks))
    return {n for n, p in model.named_parameters() if p.grad_added_to_main_grad}


@pytest.mark.parametrize("more", [(), OVERLAPPED], ids=["plain", "overlapped"])
def test_fused_gradients_are_the_others(
    build: Build, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    plain = build(*TE, "--bf16", *more)
    wanted = gradients(plain)
    assert not fused_parameters(plain)
    monkeypatch.setitem(device.CPU_ARGUMENT_DEFAULTS, "gradient_accumulation_fusion", True)
    built = build(*TE, "--bf16", *more)
    found = gradients(built)
    linear = {name for name in wanted if ".linear_" in name and name.endswith("weight")}
    layers = {f"module.module.{name}" for name in fused_parameters(built)}
    assert layers == {n for n in linear if "layer_norm" not in n} | {
        "module.module.output_layer.weight"
    }
    for name, theirs in wanted.items():
        assert theirs.abs().max() > 0
        if "output_layer" in name:
            # Not rounded to bf16 in each of two micro-batches.
            difference = (found[name] - theirs).abs().max() / theirs.abs().max()
            assert 0 < difference < 2**-8
        else:
            assert torch.equal(found[name], theirs), name


def test_tied_heads_keep_the_gradient_of_the_embedding(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    tied = presets.PRESETS["tiny"].replace("--untie-embeddings-and-output-weights", "")
    monkeypatch.setitem(presets.PRESETS, "tiny", tied)
    wanted = gradients(build(*TE, "--bf16"))
    monkeypatch.setitem(device.CPU_ARGUMENT_DEFAULTS, "gradient_accumulation_fusion", True)
    built = build(*TE, "--bf16")
    found = gradients(built)
    assert len(fused_parameters(built)) == 8
    for name, theirs in wanted.items():
        assert torch.equal(found[name], theirs), name
