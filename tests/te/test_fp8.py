"""FP8 of policies: weights of the moment, equal ratios, phases, padding; end to end on a task."""

import contextlib
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import FP8, SHAPE, TE, Build, Built, forget
from megatron.core import mpu
from torch import Tensor
from transformer_engine.pytorch import quantization as te_fp8

from megatron_espo.config import EspoConfig, RolloutConfig
from megatron_espo.diffusion.noise import elbo_views
from megatron_espo.generation.sampler import generate
from megatron_espo.monitor import dashboard
from megatron_espo.passes.batch import pack_sequences, view_batches
from megatron_espo.random import stream, uniform
from megatron_espo.rl.elbo import elbo_of_views
from megatron_espo.rl.reference import ReferencePolicy
from megatron_espo.rl.scalars import Clock
from megatron_espo.rl.update import accumulate_gradient
from megatron_espo.startup.arguments import initialize_arguments
from megatron_espo.training import espo, own_loop, pretrain

N, LENGTH = 4, 8
ESPO = EspoConfig(num_mc=1, prompts_per_rollout=2, group_size=2, kl_coef=0.0)
RECIPES = ("tensorwise", "blockwise", "mxfp8")
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"


def views_of(built: Built, n: int = N, rows: int = 2) -> tuple[Any, Any]:
    numbers = (uniform(stream(3, "test-tokens"), torch.arange(n), 32) * 250).long()
    prompts = [numbers[i, : 6 + i].tolist() for i in range(n)]
    model, ids = built.model, torch.arange(n)
    views = elbo_views("coupled", stream(5, "elbo"), ids, ids, n, LENGTH, 1)
    sequences = pack_sequences(
        prompts, numbers[:, 16 : 16 + LENGTH], model.pad_token_id, model.shapes
    )
    return views, view_batches(sequences, views, model.mask_token_id, model.vocab_size, rows)


def elbo(built: Built, n: int = N, rows: int = 2) -> Tensor:
    for chunk in built.model.chunks:
        chunk.eval()
    views, batches = views_of(built, n, rows)
    return elbo_of_views(built.model, batches, views)


def completions_of(built: Built, n: int = 2) -> Tensor:
    for chunk in built.model.chunks:
        chunk.eval()
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8], [9]][:n]
    config = RolloutConfig(16, 16, 8, 0.0, micro_batch_size=2)
    return generate(built.model, prompts, torch.arange(n), config, 1, "test").completions


def gradient(built: Built, mode: str) -> Tensor:
    """Accumulate a gradient and return the ELBO draws that it was taken at."""
    for chunk in built.model.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    built.optimizer.zero_grad()
    views, batches = views_of(built)
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])
    config = replace(ESPO, gradient=mode)
    return accumulate_gradient(
        built.model, batches, views, None, None, advantages, LENGTH, config, N
    ).draws


def change(built: Built, seed: int = 3) -> None:
    """Replace the weights in place, as an optimizer does."""
    generator = torch.Generator().manual_seed(seed)
    for chunk in built.model.chunks:
        for parameter in chunk.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(0.1 * noise.to(parameter.dtype))


def forget_fp8_weights(built: Built) -> None:
    for chunk in built.model.chunks:
        for module in chunk.modules():
            if hasattr(module, "_fp8_workspaces"):
                module._fp8_workspaces.clear()


def test_elbo_and_samples_are_of_the_weights_of_the_moment(build: Build) -> None:
    built = build(*FP8)
    before = elbo(built), completions_of(built)
    change(built)
    after = elbo(built), completions_of(built)
    forget_fp8_weights(built)
    for old, kept, fresh in zip(before, after, (elbo(built), completions_of(built)), strict=True):
        assert torch.equal(kept, fresh)
        assert not torch.equal(kept, old)


def test_reference_policy_visits_with_its_own_weights(build: Build) -> None:
    built = build(*FP8)
    reference, of_reference = ReferencePolicy(built.model.chunks), elbo(built)
    change(built)
    # Now the FP8 copies are the policy's.
    forget_fp8_weights(built)
    of_policy = elbo(built)
    with reference.in_model():
        assert torch.equal(elbo(built), of_reference)
    assert torch.equal(elbo(built), of_policy)
    assert not torch.equal(of_policy, of_reference)


def test_update_evaluates_the_weights_that_it_differentiates(build: Build) -> None:
    built = build(*FP8)
    gradient(built, "two_pass")
    assert built.optimizer.step()[0]
    assert torch.equal(gradient(built, "two_pass"), gradient(built, "joint"))


@pytest.mark.parametrize("recompute", ["", FULL], ids=["stored", "recomputed"])
@pytest.mark.parametrize("recipe", [*RECIPES, "delayed"])
def test_ratio_of_unchanged_weights_is_one_exactly_if_the_recipe_is_stateless(
    build: Build, recipe: str, recompute: str
) -> None:
    built = build(*FP8, "--fp8-recipe", recipe, *recompute.split())
    elbo(built)
    old = elbo(built)
    for mode in ("two_pass", "joint"):
        assert torch.equal(gradient(built, mode), old) == (recipe != "delayed")


def test_unpadded_rows_do_not_fit_fp8_and_padded_rows_do(build: Build) -> None:
    built = build(*FP8, "--fp8-recipe", "mxfp8")
    assert built.model.pad_multiple == 32
    elbo(built)
    with pytest.raises(ValueError, match="is not a multiple of 32"):
        elbo(replace(built, model=replace(built.model, pad_multiple=1)))


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_cached_windows_fit_fp8_for_any_number_of_rows(
    build: Build, recipe: str, cache: Any
) -> None:
    built = build(*FP8, "--fp8-recipe", recipe)
    for chunk in built.model.chunks:
        chunk.eval()
    config = RolloutConfig(64, 32, 8, 0.0, micro_batch_size=2, cache=cache)
    config.validate(False, built.model.pad_multiple)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]
    found = generate(built.model, prompts, torch.arange(3), config, 1, "test").completions
    assert not (found == built.model.mask_token_id).any()


def test_fp8_elbo_deviates_a_little_and_coarser_recipes_more(build: Build) -> None:
    exact = elbo(build(*TE))
    errors = {}
    for recipe in RECIPES:
        built = build(*FP8, "--fp8-recipe", recipe)
        errors[recipe] = float(((elbo(built) - exact) / LENGTH).abs().mean())
    plain = float(((elbo(build(*TE, "--bf16")) - exact) / LENGTH).abs().mean())
    assert all(plain < error < 0.3 for error in errors.values()), (plain, errors)


def test_flags_that_would_not_work_are_refused_with_a_sentence(tokenizer: str) -> None:
    flags = [*SHAPE, *FP8, "--tokenizer-model", tokenizer, "--espo-train-data", "x"]
    for extra, prepare, reason in (
        (["--fp8-recipe", "delayed"], espo.prepare_arguments, "--fp8-recipe delayed carries"),
        (["--seq-length", "40"], pretrain.prepare_arguments, "--seq-length 40 is not a multiple"),
        (["--ffn-hidden-size", "100"], pretrain.prepare_arguments, "--ffn-hidden-size gives a"),
    ):
        forget()
        with pytest.raises(ValueError, match=reason):
            initialize_arguments([*flags, *extra], prepare)
    with (
        mock.patch.object(te_fp8.FP8GlobalStateManager, "answer", (False, "too old.")),
        pytest.raises(ValueError, match="--fp8-recipe tensorwise does not run on this GPU: too"),
    ):
        initialize_arguments(flags, pretrain.prepare_arguments)
    forget()


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"text": word} for word in ("a", "bb", "ccc", "dddd", "eeeee", "ffffff")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


PHASES = {
    "both": {"rollout", "old_elbo", "ref_elbo", "update"},
    "rollout": {"rollout"},
    "elbo": {"old_elbo", "ref_elbo", "update"},
}


@pytest.mark.parametrize(
    ("phases", "extra"),
    [("both", ""), ("rollout", ""), ("elbo", ""), ("elbo", FULL)],
    ids=["both", "rollout", "elbo", "elbo-recomputed"],
)
def test_espo_trains_with_fp8_in_the_chosen_phases(
    tokenizer: str,
    problems: str,
    build: Build,
    monkeypatch: pytest.MonkeyPatch,
    phases: str,
    extra: str,
) -> None:
    ran: dict[str, set[str | None]] = defaultdict(set)
    scalars: dict[str, list[float]] = defaultdict(list)
    clock = Clock.__call__

    @contextlib.contextmanager
    def phase(self: Any, name: str) -> Iterator[None]:
        start = len(te_fp8.calls)
        with clock(self, name):
            yield
        ran[name] |= {recipe for _, recipe in te_fp8.calls[start:]}

    def write(_: Any, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            scalars[name].append(value)

    monkeypatch.setattr(Clock, "__call__", phase)
    monkeypatch.setattr(dashboard, "write_scalars", write)
    # The process group is there already.
    one_rank = lambda args: mpu.initialize_model_parallel(1, 1)  # noqa: E731
    monkeypatch.setattr(own_loop, "initialize_process_groups", one_rank)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    forget()
    espo.main(
        [
            *SHAPE, *FP8, *extra.split(), "--tokenizer-model", tokenizer,
            "--espo-task", "echo_task", "--espo-train-data", problems,
            "--espo-fp8-phases", phases, "--espo-num-rollouts", "2",
            "--espo-prompts-per-rollout", "2", "--espo-group-size", "2",
            "--espo-updates-per-rollout", "2", "--espo-num-mc", "1", "--espo-kl-coef", "0.01",
            "--espo-clip-eps-low", "0.01", "--espo-clip-eps-high", "0.01",
            "--rollout-completion-length", "8", "--rollout-block-length", "8",
            "--rollout-denoising-steps", "4", "--rollout-temperature", "1.0",
        ]
    )  # fmt: skip
    assert set(ran) - {"reward"} == PHASES["both"]
    for name in PHASES["both"]:
        expected = "Float8CurrentScaling" if name in PHASES[phases] else None
        assert ran[name] == {expected}, name
    assert scalars["policy/ratio_first_update/max_deviation"] == [0.0, 0.0]
    assert len(scalars["policy/ratio/max"]) == 4
    assert all(norm > 0 for norm in scalars["policy/grad_norm"])
