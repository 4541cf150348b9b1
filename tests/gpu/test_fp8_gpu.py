"""Transformer Engine against local layers, and FP8 in ELBOs, updates and rollouts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LOCAL, TE, Build, Built, recipe_or_skip
from torch import Tensor

from megatron_espo.config import EspoConfig, RolloutConfig
from megatron_espo.model.fp8 import STATELESS_RECIPES

N, LENGTH = 4, 64
ESPO = EspoConfig(num_mc=1, prompts_per_rollout=2, group_size=2, kl_coef=0.0)


def views_of(built: Built) -> tuple[Any, Any]:
    from megatron_espo.diffusion.noise import elbo_views
    from megatron_espo.passes.batch import pack_sequences, view_batches
    from megatron_espo.random import stream, uniform

    ids, model = torch.arange(N), built.model
    numbers = (uniform(stream(3, "test-tokens"), ids, 128) * 250).long()
    # Of different lengths, so that rows hold padding.
    prompts = [numbers[i, : 9 + 11 * i].tolist() for i in range(N)]
    views = elbo_views("coupled", stream(5, "elbo"), ids, ids, N, LENGTH, 1)
    sequences = pack_sequences(prompts, numbers[:, 64:], model.pad_token_id, model.shapes)
    return views, view_batches(sequences, views, model.mask_token_id, model.vocab_size, 4)


def set_mode(built: Built, training: bool) -> None:
    for chunk in built.model.chunks:
        chunk.train(training)


def elbo(built: Built) -> Tensor:
    """ELBO draws per token."""
    from megatron_espo.rl.elbo import elbo_of_views

    set_mode(built, training=False)
    views, batches = views_of(built)
    return elbo_of_views(built.model, batches, views) / LENGTH


def gradient(built: Built, mode: str) -> Tensor:
    """Accumulate a gradient and return the ELBO draws per token that it was taken at."""
    from megatron_espo.rl.update import accumulate_gradient

    set_mode(built, training=True)
    for chunk in built.model.chunks:
        chunk.zero_grad_buffer()
    built.optimizer.zero_grad()
    views, batches = views_of(built)
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])
    config = replace(ESPO, gradient=mode)
    found = accumulate_gradient(
        built.model, batches, views, None, None, advantages, LENGTH, config, N
    )
    return found.draws / LENGTH


def logits(built: Built) -> Tensor:
    """Float32 logits of the masked positions."""
    from megatron_espo.passes.pipeline import forward_only

    set_mode(built, training=False)
    _, batches = views_of(built)
    batch = batches[0].batch
    take = lambda values, _: values.float()  # noqa: E731
    return forward_only(built.model.chunks, [batch], take, False, built.model.layout)[0]


def saved(built: Built) -> None:
    from megatron.training.checkpointing import save_checkpoint

    save_checkpoint(1, list(built.model.chunks), built.optimizer, built.scheduler, 0)


@pytest.mark.parametrize(("first", "second"), [(LOCAL, TE), (TE, LOCAL)], ids=["to-te", "to-local"])
def test_checkpoints_move_between_the_backends_and_logits_agree(
    build: Build, tmp_path: Path, first: tuple[str, ...], second: tuple[str, ...]
) -> None:
    written = build(*first, "--save", str(tmp_path))
    saved(written)
    expected = logits(written)
    actual = logits(build(*second, "--pretrained-checkpoint", str(tmp_path), "--seed", "77"))
    # bf16 through two layers.
    assert (actual - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("recipe", STATELESS_RECIPES)
def test_fp8_elbo_is_near_that_of_bf16(build: Build, recipe: str) -> None:
    flags = recipe_or_skip(recipe)
    exact, rounded = elbo(build(*TE)), elbo(build(*flags))
    assert torch.isfinite(rounded).all()
    assert not torch.equal(exact, rounded)
    assert (rounded - exact).abs().max() < 0.05


@pytest.mark.parametrize("recipe", STATELESS_RECIPES)
def test_ratio_of_unchanged_weights_is_exactly_one(build: Build, recipe: str) -> None:
    built = build(*recipe_or_skip(recipe))
    old = elbo(built)
    assert torch.equal(elbo(built), old)
    for mode in ("two_pass", "joint"):
        assert torch.equal(gradient(built, mode), old)
    norm = sum(float(p.main_grad.norm()) for c in built.model.chunks for p in c.parameters())
    assert norm > 0


@pytest.mark.parametrize("recipe", STATELESS_RECIPES)
def test_weights_are_quantized_after_a_step_and_for_the_reference(
    build: Build, recipe: str
) -> None:
    from megatron_espo.rl.reference import ReferencePolicy

    built = build(*recipe_or_skip(recipe), "--lr", "1e-2")
    reference, before = ReferencePolicy(built.model.chunks), elbo(built)
    gradient(built, "two_pass")
    built.optimizer.step()
    after = elbo(built)
    assert not torch.equal(before, after)
    assert torch.equal(gradient(built, "two_pass"), after)
    with reference.in_model():
        assert torch.equal(elbo(built), before)
    assert torch.equal(elbo(built), after)


@pytest.mark.parametrize("recipe", STATELESS_RECIPES)
def test_rollout_in_fp8_fills_every_mask_and_repeats(build: Build, recipe: str) -> None:
    from megatron_espo.generation.sampler import generate

    built = build(*recipe_or_skip(recipe))
    set_mode(built, training=False)
    prompts = [[1, 2, 3], list(range(20)), list(range(37))]
    config = RolloutConfig(64, 32, 16, 1.0, micro_batch_size=2)

    def sample() -> Tensor:
        return generate(built.model, prompts, torch.arange(3), config, 1, "test").completions

    completions = sample()
    assert completions.shape == (3, 64)
    assert not (completions == built.model.mask_token_id).any()
    assert torch.equal(sample(), completions)


def test_reference_policy_waits_in_pinned_memory_and_comes_back_exactly(build: Build) -> None:
    from megatron_espo.rl.reference import ReferencePolicy

    built = build(*TE)
    reference = ReferencePolicy(built.model.chunks)
    assert all(w.device.type == "cpu" and w.is_pinned() for w in reference._weights)
    before = [p.detach().clone() for c in built.model.chunks for p in c.parameters()]
    with torch.no_grad():
        for chunk in built.model.chunks:
            for parameter in chunk.parameters():
                parameter.add_(1.0)
    with reference.in_model():
        now = [p for c in built.model.chunks for p in c.parameters()]
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(now, before, strict=True))
    for chunk in built.model.chunks:
        for ours, theirs in zip(chunk.parameters(), before, strict=True):
            assert torch.equal(ours, theirs + 1.0)
