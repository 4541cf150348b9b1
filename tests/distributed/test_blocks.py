"""Block diffusion, and norms of queries and keys, in every layout as on one rank."""

import os
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import SHAPE, Built, build_layout
from layouts import BLOCK_CASES, BlockCase, record
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.training.checkpointing import save_checkpoint
from test_layouts import (
    SAMPLERS,
    N,
    assert_close,
    dashes,
    elbo_of,
    espo_gradient,
    gradients_of,
    own_rows,
    shared_by_ranks,
    tokens_of,
)
from torch import Tensor

from megatron_espo.config import RolloutConfig
from megatron_espo.random import stream, uniform
from megatron_espo.supervised.forward_step import forward_step

# Heads of their own size, and norms of queries and keys.
QWEN = (*SHAPE, "--qk-layernorm", "--kv-channels", "12")
S = 40
KINDS = {
    "full": (),
    # 40 positions are 5 whole blocks, or 6 of which the last is cut short.
    "block-causal": ("--attention-mask", "block-causal", "--block-size", "8"),
    "context-causal": (
        *("--attention-mask", "context-causal", "--block-size", "7", "--logit-shift"),
        *("--next-token-weight", "0.5"),
    ),
}
SAMPLED = ("low_confidence", "prefix")
# Prompts of 5 to 12 tokens end inside the first block or the second; rows leave one by one.
BY_BLOCKS = {
    "low confidence": RolloutConfig(16, 8, 8, 1.0, cache="exact", micro_batch_size=3),
    "threshold": RolloutConfig(
        16, 8, threshold=0.5, early_stop=True, cache="exact", micro_batch_size=2
    ),
    "editing": RolloutConfig(
        16,
        8,
        threshold=0.5,
        editing_threshold=0.2,
        max_post_steps=4,
        cache="exact",
        micro_batch_size=3,
    ),
}


@dataclass(frozen=True)
class Expected:
    """What one rank computes."""

    losses: dict[bool, float]
    gradients: dict[bool, dict[str, Tensor]]
    norms: dict[bool, float]
    elbo: Tensor
    espo: dict[str, Tensor]
    espo_norm: float
    tokens: dict[str, Tensor]


def shake_norms(built: Built, generator: torch.Generator) -> None:
    """Make norms that are not all 1."""
    with torch.no_grad():
        for chunk in built.model.chunks:
            for _, parameter in sorted(chunk.named_parameters(), key=lambda pair: pair[0]):
                if parameter.dim() == 1:
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="module")
def weights(shared_folder: str, tokenizer_folder: str) -> str:
    """Random weights, with norms that are not all 1."""
    folder = os.path.join(shared_folder, "qwen")
    built = build_layout(tokenizer_folder, 1, 1, ("--save", folder), shape=QWEN)
    generator = torch.Generator().manual_seed(7)
    shake_norms(built, generator)
    built.optimizer.reload_model_params()
    save_checkpoint(1, list(built.model.chunks), built.optimizer, built.scheduler, 0)
    return folder


def flags_of(kind: str, weights: str) -> tuple[str, ...]:
    """Flags of a kind; the weights are the same, whatever their logits are taken for."""
    own = [flag for flag in KINDS[kind] if flag != "--logit-shift"]
    return ("--pretrained-checkpoint", weights, *own)


def build_kind(tokenizer: str, weights: str, case: BlockCase, solo: bool = False) -> Built:
    flags = (*flags_of(case.kind, weights), *case.flags)
    flags = (*flags, "--context-parallel-size", str(case.cp))
    built = build_layout(tokenizer, case.tp, case.pp, flags, solo=solo, shape=QWEN)
    if "--logit-shift" in KINDS[case.kind]:
        built.args.logit_shift = True
    return built


@pytest.fixture(scope="module")
def references(tokenizer_folder: str, weights: str) -> dict[str, Expected]:
    """What one rank computes, by kind."""
    found = {}
    for kind in KINDS:
        solo = build_kind(tokenizer_folder, weights, BlockCase(kind, 1, 1), solo=True)
        losses, gradients, norms = {}, {}, {}
        for sft in (False, True):
            losses[sft] = block_loss(solo, 4, sft)
            gradients[sft], norms[sft] = gradients_of(solo), norm_of(solo)
        elbo, tokens = elbo_of(solo), {}
        espo, espo_norm, _ = espo_gradient(solo, "joint", 8)
        if kind == "full":
            tokens = shared_by_ranks(SAMPLED, partial(sampled, solo))
        if kind == "block-causal":
            tokens = shared_by_ranks(BY_BLOCKS, partial(sampled_by_blocks, solo, "none"))
        found[kind] = Expected(losses, gradients, norms, elbo, espo, espo_norm, tokens)
    return found


def sampled(built: Built, name: str) -> Tensor:
    return tokens_of(built, SAMPLERS[name])


def sampled_by_blocks(built: Built, cache: Any, name: str) -> Tensor:
    return tokens_of(built, replace(BY_BLOCKS[name], cache=cache))


@pytest.fixture(scope="module", params=BLOCK_CASES, ids=dashes)
def name(request: Any) -> str:
    return request.param


@pytest.fixture(scope="module")
def built(name: str, tokenizer_folder: str, weights: str, references: dict[str, Expected]) -> Built:
    return build_kind(tokenizer_folder, weights, BLOCK_CASES[name])


def block_loss(built: Built, micro: int, sft: bool) -> float:
    """The reported loss over eight rows, through Megatron's schedule."""
    data = {"tokens": (uniform(stream(4, "rows"), torch.arange(N), S) * 250).long()}
    data["sample_id"] = torch.arange(N)
    if sft:
        data |= {"prompt_length": torch.arange(N), "completion_length": torch.full((N,), 20)}
    data = {key: value[own_rows(built)] for key, value in data.items()}
    share = N // built.model.layout.dp_size
    batches = [
        {key: value[i : i + micro] for key, value in data.items()} for i in range(0, share, micro)
    ]
    chunks = list(built.model.chunks)
    for chunk in chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    built.optimizer.zero_grad()
    built.args.random_length_probability = 0.3
    iterators = [iter(batches) for _ in chunks]
    in_blocks = built.args.attention_mask is not None
    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(batches),
        seq_length=S * (1 + in_blocks),
        micro_batch_size=micro,
        forward_only=False,
    )
    sums = torch.zeros(2, dtype=torch.float64)
    if built.model.layout.is_last_stage:
        sums = torch.stack([report["lm loss"].double() for report in reports]).sum(0)
    for size, group in (
        (built.model.layout.dp_size, built.model.layout.dp),
        (built.model.layout.pp_size, built.model.layout.pp),
    ):
        if size > 1:
            dist.all_reduce(sums, group=group)
    return float(sums[0] / sums[1])


def norm_of(built: Built) -> float:
    """The gradients' norm, which a norm of queries that every rank holds enters once."""
    built.optimizer.prepare_grads()
    return float(built.optimizer.get_grad_norm())


@pytest.mark.parametrize("sft", [False, True], ids=["pretrain", "sft"])
def test_loss_and_gradients_do_not_depend_on_layout(
    name: str, built: Built, references: dict[str, Expected], sft: bool
) -> None:
    case, expected = BLOCK_CASES[name], references[BLOCK_CASES[name].kind]
    assert_close(name, "loss", block_loss(built, case.micro, sft), expected.losses[sft])
    actual = gradients_of(built)
    assert any("q_layernorm" in key for key in actual)
    assert actual.keys() <= expected.gradients[sft].keys()
    for key, gradient in actual.items():
        assert_close(name, "gradient", gradient[:262], expected.gradients[sft][key][:262], key)
    assert_close(name, "norm", norm_of(built), expected.norms[sft])


def test_kinds_differ(references: dict[str, Expected]) -> None:
    losses = [loss for expected in references.values() for loss in expected.losses.values()]
    assert len({round(loss, 3) for loss in losses}) == len(losses)


FULL = [name for name, case in BLOCK_CASES.items() if case.kind == "full"]


@pytest.mark.parametrize("name", FULL, ids=dashes, indirect=True, scope="module")
def test_elbos_and_tokens_of_normed_queries_do_not_depend_on_layout(
    name: str, built: Built, references: dict[str, Expected]
) -> None:
    expected, rows = references["full"], own_rows(built)
    assert_close(name, "elbo", elbo_of(built), expected.elbo[rows])
    for sampler in SAMPLED:
        if BLOCK_CASES[name].cp > 1 and SAMPLERS[sampler].cache != "none":
            continue  # refused: a cache holds all positions of its rows
        assert torch.equal(sampled(built, sampler), expected.tokens[sampler][rows])


NOISY = [name for name, case in BLOCK_CASES.items() if case.kind != "full"]


@pytest.mark.parametrize("name", NOISY, ids=dashes, indirect=True, scope="module")
def test_elbos_and_updates_of_blocks_do_not_depend_on_layout(
    name: str, built: Built, references: dict[str, Expected]
) -> None:
    """Four views beside one clean half, or two by two."""
    case = BLOCK_CASES[name]
    expected = references[case.kind]
    assert_close(name, "elbo", elbo_of(built), expected.elbo[own_rows(built)])
    mode, rows = ("joint", 4) if case.kind == "block-causal" else ("two_pass", 2)
    actual, norm, _ = espo_gradient(built, mode, rows)
    assert expected.espo_norm > 0.01
    assert_close(name, "norm", norm, expected.espo_norm)
    for key, gradient in actual.items():
        assert_close(name, "gradient", gradient[:262], expected.espo[key][:262], key)


IN_BLOCKS = [name for name, case in BLOCK_CASES.items() if case.kind == "block-causal"]


@pytest.mark.parametrize("name", IN_BLOCKS, ids=dashes, indirect=True, scope="module")
def test_tokens_of_blocks_depend_neither_on_layout_nor_on_the_cache(
    name: str, built: Built, references: dict[str, Expected]
) -> None:
    expected, rows = references["block-causal"].tokens, own_rows(built)
    # With context parallelism refused: a cache holds all positions of its rows.
    cache = "none" if BLOCK_CASES[name].cp > 1 else "exact"
    for sampler in BY_BLOCKS:
        same = sampled_by_blocks(built, cache, sampler) == expected[sampler][rows]
        record(name, "tokens", same.double().mean().item())
        assert same.all(), sampler
