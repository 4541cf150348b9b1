"""Mixtures of experts: gradients, their norm, clipped steps, biases and tokens in every layout."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from conftest import SHAPE, Built, build_layout
from layouts import MOE_CASES, MoeCase, record
from megatron.core.utils import unwrap_model
from megatron.training.checkpointing import save_checkpoint
from test_blocks import block_loss, norm_of, shake_norms
from test_layouts import (
    SAMPLERS,
    assert_close,
    dashes,
    elbo_of,
    espo_gradient,
    gradients_of,
    mostly_without_gradient,
    own_rows,
    shared_by_ranks,
    tokens_of,
)
from torch import Tensor

from megatron_espo.config import RolloutConfig

# LLaDA2's layers: the first one is dense, experts in groups, a shared one, half of each head turns.
LLADA2 = (
    *(flag for flag in SHAPE if flag != "--add-qkv-bias"),
    *(
        "--qk-layernorm --rotary-percent 0.5 --num-experts 8 --moe-layer-freq [0]+[1]*3 "
        "--moe-ffn-hidden-size 32 --moe-shared-expert-intermediate-size 48 --moe-router-topk 4 "
        "--moe-router-score-function sigmoid --moe-router-enable-expert-bias "
        "--moe-router-num-groups 4 --moe-router-group-topk 2 "
        "--moe-router-topk-scaling-factor 2.5 --moe-router-load-balancing-type seq_aux_loss "
        "--moe-aux-loss-coeff 0.05 --moe-router-bias-update-rate 0.01 --optimizer sgd "
        "--sgd-momentum 0 --clip-grad 0.05 --weight-decay 0"
    ).split(),
)
KINDS = {"full": (), "block-causal": ("--attention-mask", "block-causal", "--block-size", "8")}
SAMPLED = {
    "full": {
        "low confidence": SAMPLERS["low_confidence"],
        # Copies of the model finish at different times.
        "early stop": replace(SAMPLERS["threshold"], micro_batch_size=1),
        "prefix": SAMPLERS["prefix"],
    },
    "block-causal": {
        "threshold": RolloutConfig(
            16, 8, threshold=0.5, early_stop=True, cache="exact", micro_batch_size=2
        ),
    },
}


@dataclass(frozen=True)
class Expected:
    """What one rank computes."""

    loss: float
    gradients: dict[str, Tensor]
    norm: float
    biases: dict[str, Tensor]
    elbo: Tensor | None
    espo: dict[str, Tensor]
    tokens: dict[str, Tensor]


def routers(built: Built) -> Iterator[tuple[str, Any]]:
    """The routers of this rank's stage, by the number of their layer."""
    for chunk in unwrap_model(list(built.model.chunks)):
        for layer in chunk.decoder.layers:
            if hasattr(layer.mlp, "router"):
                yield str(layer.layer_number), layer.mlp.router


def biases_of(built: Built) -> dict[str, Tensor]:
    return {name: router.expert_bias.clone() for name, router in routers(built)}


def weights_of(built: Built) -> dict[str, Tensor]:
    return {
        name: parameter.detach().clone()
        for chunk in unwrap_model(list(built.model.chunks))
        for name, parameter in chunk.named_parameters()
    }


@pytest.fixture(scope="module")
def weights(shared_folder: str, tokenizer_folder: str) -> str:
    """Random weights, with norms that are not all 1 and biases that are not all 0."""
    folder = os.path.join(shared_folder, "experts")
    built = build_layout(tokenizer_folder, 1, 1, ("--save", folder), shape=LLADA2)
    generator = torch.Generator().manual_seed(7)
    shake_norms(built, generator)
    with torch.no_grad():
        for _, router in routers(built):
            router.expert_bias.copy_(0.2 * torch.randn(8, generator=generator))
    built.optimizer.reload_model_params()
    save_checkpoint(1, list(built.model.chunks), built.optimizer, built.scheduler, 0)
    return folder


def build_case(tokenizer: str, weights: str, case: MoeCase, solo: bool = False) -> Built:
    flags = [
        *("--pretrained-checkpoint", weights, *KINDS[case.kind], *case.flags),
        *("--expert-model-parallel-size", str(case.ep), "--context-parallel-size", str(case.cp)),
        *("--expert-tensor-parallel-size", str(case.etp)),
        # Megatron's distributed optimizer knows no other.
        *(("--optimizer", "adam") if "--use-distributed-optimizer" in case.flags else ()),
    ]
    return build_layout(tokenizer, case.tp, case.pp, tuple(flags), solo=solo, shape=LLADA2)


def freeze(built: Built) -> None:
    """Let routers be as RL has them: biases stay, and there is no auxiliary loss."""
    for chunk in unwrap_model(list(built.model.chunks)):
        chunk.counts_tokens = False
        chunk.config.moe_aux_loss_coeff = 0.0
    for _, router in routers(built):
        router.frozen_expert_bias = True


def sampled(built: Built, kind: str, cache: Any, name: str) -> Tensor:
    config = SAMPLED[kind][name]
    return tokens_of(built, replace(config, cache=cache or config.cache))


@pytest.fixture(scope="module")
def references(tokenizer_folder: str, weights: str) -> dict[str, Expected]:
    """What one rank computes, by kind."""
    found = {}
    for kind in KINDS:
        solo = build_case(tokenizer_folder, weights, MoeCase(1, 1, 1, kind=kind), solo=True)
        before = biases_of(solo)
        loss = block_loss(solo, 4, False)
        gradients, norm, biases = gradients_of(solo), norm_of(solo), biases_of(solo)
        for name, router in routers(solo):
            router.expert_bias.copy_(before[name])
        freeze(solo)
        elbo, espo = None, dict[str, Tensor]()
        if kind == "full":
            elbo = elbo_of(solo)
            espo, *_ = espo_gradient(solo, "two_pass", 8, mostly_without_gradient)
        cache = "none" if kind == "block-causal" else None
        tokens = shared_by_ranks(SAMPLED[kind], partial(sampled, solo, kind, cache))
        found[kind] = Expected(loss, gradients, norm, biases, elbo, espo, tokens)
    return found


@pytest.fixture(scope="module", params=MOE_CASES, ids=dashes)
def name(request: Any) -> str:
    return request.param


@pytest.fixture(scope="module")
def built(name: str, tokenizer_folder: str, weights: str, references: dict[str, Expected]) -> Built:
    return build_case(tokenizer_folder, weights, MOE_CASES[name])


def test_gradients_norm_step_and_biases_do_not_depend_on_layout(
    name: str, built: Built, references: dict[str, Expected]
) -> None:
    case, expected, args = MOE_CASES[name], references[MOE_CASES[name].kind], built.args
    before, weights = biases_of(built), weights_of(built)
    assert_close(name, "loss", block_loss(built, case.micro, False), expected.loss)
    # Padding is counted nowhere, and every layer sees every token once.
    for layer, bias in biases_of(built).items():
        assert torch.equal(bias, expected.biases[layer]) and not bias.equal(before[layer])
    actual = gradients_of(built)
    assert actual and actual.keys() <= expected.gradients.keys()
    for key, gradient in actual.items():
        assert_close(name, "gradient", gradient[:262], expected.gradients[key][:262], key)
    norm = norm_of(built)
    assert_close(name, "norm", norm, expected.norm)
    assert norm > 2 * args.clip_grad
    if not args.use_distributed_optimizer:
        own = {
            key: parameter.main_grad.clone()
            for chunk in unwrap_model(list(built.model.chunks))
            for key, parameter in chunk.named_parameters()
        }
        built.optimizer.step()
        rate = built.optimizer.param_groups[0]["lr"]
        factor = rate * args.clip_grad / (expected.norm + 1e-6)
        assert rate > 0
        for key, after in weights_of(built).items():
            moved = weights[key] - after
            assert (moved - factor * own[key]).abs().max() <= 1e-6 * weights[key].abs().max(), key
    restore(built, weights, before)


def restore(built: Built, weights: dict[str, Tensor], biases: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for chunk in unwrap_model(list(built.model.chunks)):
            for key, parameter in chunk.named_parameters():
                parameter.copy_(weights[key])
    for layer, router in routers(built):
        router.expert_bias.copy_(biases[layer])
    built.optimizer.reload_model_params()
    freeze(built)


# Of the other layouts with full attention the sampler with the most to go wrong says enough.
EVERY_SAMPLER = ("experts: ep 2, dp 4", "experts: ep 2, pp 2, dp 2")

# The all-gather dispatcher wants as many tokens on every rank: pre-training and fine-tuning alone.
SAMPLING = [name for name, case in MOE_CASES.items() if "allgather" not in " ".join(case.flags)]


@pytest.mark.parametrize("name", SAMPLING, ids=dashes, indirect=True, scope="module")
def test_tokens_do_not_depend_on_layout(
    name: str, built: Built, references: dict[str, Expected]
) -> None:
    case = MOE_CASES[name]
    freeze(built)
    expected, rows = references[case.kind], own_rows(built)
    for sampler in SAMPLED[case.kind]:
        if case.kind == "full" and name not in EVERY_SAMPLER and sampler != "early stop":
            continue
        same = sampled(built, case.kind, None, sampler) == expected.tokens[sampler][rows]
        record(name, "tokens", same.double().mean().item())
        assert same.all(), sampler


LEARNING = [name for name in SAMPLING if MOE_CASES[name].kind == "full"]


@pytest.mark.parametrize("name", LEARNING, ids=dashes, indirect=True, scope="module")
def test_elbos_and_gradients_of_rl_do_not_depend_on_layout(
    name: str, built: Built, references: dict[str, Expected]
) -> None:
    expected, rows = references["full"], own_rows(built)
    freeze(built)
    assert expected.elbo is not None
    assert_close(name, "elbo", elbo_of(built), expected.elbo[rows])
    for mode in ("auto", "two_pass"):
        # Ranks whose sequences need no gradient pass as many as those that share their experts.
        actual, *_ = espo_gradient(built, mode, 4, mostly_without_gradient, True)
        for key, gradient in actual.items():
            assert_close(name, "gradient", gradient[:262], expected.espo[key][:262], key)
