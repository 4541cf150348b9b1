"""Adapters on Transformer Engine's layers, with the stand-in's arithmetic; FP8 under them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FP8, TE, Build, Built
from megatron.core.utils import unwrap_model
from megatron.training.checkpointing import save_checkpoint
from test_fp8 import elbo, gradient
from test_layers import RECIPES
from torch import Tensor

from megatron_espo import device
from megatron_espo.adapters.attach import without_adapters

LORA = "--lora-rank 3 --lora-alpha 6 --lora-targets all-linear lm_head".split()


@pytest.fixture
def adapters(build: Build, tmp_path: Path) -> list[str]:
    """Flags of a model with adapters that change it, written by plain layers."""
    base, folder = str(tmp_path / "base"), str(tmp_path / "adapters")
    flags = ["--pretrained-checkpoint", base, *LORA]
    for own, what in ((("--save", base), 1), ((*flags, "--save", folder), "_b")):
        written = build(*own)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in model_of(written).named_parameters():
                # Norm weights of 1 and zero biases would hide a wrong input of the adapters.
                if parameter.dim() == what or name.endswith(str(what)):
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        written.optimizer.reload_model_params()
        chunks = list(written.model.chunks)
        save_checkpoint(1, chunks, written.optimizer, written.scheduler, 0)
    return [*flags, "--load", folder, "--no-load-optim"]


def model_of(built: Built) -> Any:
    (model,) = unwrap_model(list(built.model.chunks))
    return model


def gradients(built: Built) -> dict[str, Tensor]:
    return {
        name: parameter.main_grad.float().clone()
        for name, parameter in model_of(built).named_parameters()
        if parameter.requires_grad
    }


@pytest.mark.parametrize("mode", ["two_pass", "joint"])
def test_adapters_are_those_of_plain_layers(
    build: Build, adapters: list[str], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = build(*adapters)
    wanted, expected = gradient(plain, mode), gradients(plain)
    # As on GPUs, where weights that are trained add their gradients to the buffer themselves.
    monkeypatch.setitem(device.CPU_ARGUMENT_DEFAULTS, "gradient_accumulation_fusion", True)
    ours = build(*TE, *adapters)
    torch.testing.assert_close(gradient(ours, mode), wanted, rtol=1e-5, atol=1e-5)
    found = gradients(ours)
    assert found.keys() == expected.keys() and len(found) == 2 * (7 * 2 + 1)
    for name, theirs in expected.items():
        assert (found[name] - theirs).abs().max() < 1e-5 * theirs.abs().max(), name


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_fp8_base_has_bf16_adapters(build: Build, adapters: list[str], recipe: str) -> None:
    flags = (*FP8, "--fp8-recipe", recipe)
    built = build(*flags, *adapters)
    trained = {p.dtype for p in model_of(built).parameters() if p.requires_grad}
    assert trained == {torch.bfloat16}
    mine = elbo(built)
    # The ratio of unchanged weights is 1 exactly, and the gradient that of bf16 but for rounding.
    assert torch.equal(gradient(built, "two_pass"), mine)
    in_fp8 = gradients(built)
    with without_adapters(built.model.chunks):
        off = elbo(built)
    base = build(*flags, "--pretrained-checkpoint", adapters[1])
    assert torch.equal(elbo(base), off) and not torch.equal(off, mine)
    plain = build(*TE, "--bf16", *adapters)
    gradient(plain, "two_pass")
    # Of all matrices together: single ones of so small a model are little but rounding.
    pairs = [(in_fp8[name], theirs) for name, theirs in gradients(plain).items()]
    ours, theirs = (
        torch.cat([part.flatten() for part in side]) for side in zip(*pairs, strict=True)
    )
    assert 1e-4 < (ours - theirs).norm() / theirs.norm() < 0.5
