"""The block ELBO: all masks of a tiny model, shared and separate passes, its gradient."""

import itertools
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from megatron.core.utils import get_model_config
from test_block_diffusion import KINDS, MASK, explicit
from test_passes import build
from torch import Tensor

from megatron_espo.config import EspoConfig
from megatron_espo.diffusion.block_noise import block_elbo_views
from megatron_espo.diffusion.noise import ElboEstimator
from megatron_espo.model.handle import DiffusionModel
from megatron_espo.passes.batch import pack_sequences
from megatron_espo.passes.block_mask import BlockAttention
from megatron_espo.random import stream
from megatron_espo.rl.elbo import cut_views, draw_views, elbo_of_views, estimate_elbo
from megatron_espo.rl.update import accumulate_gradient
from megatron_espo.startup.setup import diffusion_model

SIZE, LENGTH = 3, 5
# The completion begins inside a block, at its start, and inside the first one.
PROMPTS = [[5, 7, 11, 3, 99], [3, 1, 4, 1, 5, 9], [100, 3]]
COMPLETIONS = torch.tensor([[9, 2, 7, 7, 250], [1, 2, 3, 4, 5], [42, 17, 0, 257, 257]])
ESTIMATORS: tuple[ElboEstimator, ...] = ("coupled", "exact_count", "bernoulli")


@pytest.fixture(scope="module")
def built(tokenizer: str) -> DiffusionModel:
    chunk = build(tokenizer, "--num-layers", "2", "--qk-layernorm", "--kv-channels", "12").train()
    return diffusion_model([chunk])


def of_kind(model: DiffusionModel, kind: str, shift: bool = False) -> DiffusionModel:
    return replace(model, blocks=BlockAttention(SIZE, KINDS[kind]), logit_shift=shift)


def blocks_of(row: int) -> list[list[int]]:
    """Positions of the completion by block."""
    start = len(PROMPTS[row])
    positions = range(start, start + LENGTH)
    return [list(part) for _, part in itertools.groupby(positions, lambda p: p // SIZE)]


@torch.no_grad()
def losses_of_all_masks(
    model: DiffusionModel, kind: str, row: int, shift: bool
) -> dict[frozenset[int], dict[int, float]]:
    """The cross entropy of each masked token under every mask of its block, by explicit passes."""
    tokens = torch.tensor(PROMPTS[row] + COMPLETIONS[row].tolist())
    found = {}
    for block in blocks_of(row):
        first, end = block[0] // SIZE * SIZE, block[-1] + 1
        place = torch.arange(end)
        clean = place[:, None] // SIZE >= place // SIZE
        if KINDS[kind]:
            clean = place[:, None] >= place
        seen = torch.where((place >= first)[:, None], place < end, clean)
        for size in range(1, len(block) + 1):
            for masked in itertools.combinations(block, size):
                inputs = tokens[:end].clone()
                inputs[list(masked)] = MASK
                logits = explicit(model.chunks[0], inputs, seen, end)
                by_position = {p: logits[p - shift] for p in masked}
                if shift and first in masked:  # the clean state before the block predicts it
                    before = explicit(model.chunks[0], tokens[:end], clean, end)
                    by_position[first] = before[first - 1]
                found[frozenset(masked)] = {
                    p: -float(logit[:262].log_softmax(0)[tokens[p]])
                    for p, logit in by_position.items()
                }
    return found


def exact_elbo(found: dict[frozenset[int], dict[int, float]], row: int) -> float:
    """Sum over blocks of - sum_c 1/c E_{|S| = c} of the cross entropy of S (BD3-LM's bound)."""
    total = 0.0
    for block in blocks_of(row):
        for size in range(1, len(block) + 1):
            sums = [
                sum(found[frozenset(masked)].values())
                for masked in itertools.combinations(block, size)
            ]
            total -= sum(sums) / len(sums) / size
    return total


def by_table(found: dict[frozenset[int], dict[int, float]], row: int, views: Any) -> Tensor:
    """ELBO draws ``[b, m]`` of views of one completion, from the table of all masks."""
    start, length = len(PROMPTS[row]), LENGTH
    table = torch.zeros(2**length, length)
    for code in range(2**length):
        masked = {start + i for i in range(length) if code >> i & 1}
        for block in blocks_of(row):
            if inside := masked & set(block):
                for position, loss in found[frozenset(inside)].items():
                    table[code, position - start] = loss
    codes = (views.mask_indices * 2 ** torch.arange(length)).sum(-1)
    weights = torch.where(views.mask_indices, views.token_weights, 0.0)
    return -(table[codes] * weights).sum(-1).sum(-1)


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_estimate_is_unbiased(
    built: DiffusionModel, estimator: ElboEstimator, row: int
) -> None:
    model = of_kind(built, "block-causal")
    found = losses_of_all_masks(model, "block-causal", row, False)
    ids, offset = torch.arange(30_000), len(PROMPTS[row]) % SIZE
    views = block_elbo_views(
        estimator, stream(3, "test"), ids, torch.full_like(ids, offset), LENGTH, 2, SIZE
    )
    draws = by_table(found, row, views).double()
    expected = exact_elbo(found, row)
    assert expected < -10
    if estimator == "bernoulli":  # 1 / p has no variance
        views = views._replace(token_weights=views.token_weights.clamp(max=1e4))
        assert abs(by_table(found, row, views).mean() / expected - 1) < 0.05
        return
    for part in (draws[:, 0], draws[:, 1], draws.mean(1)):
        assert abs(part.mean() - expected) < 4 * part.std() / len(ids) ** 0.5
    # Levels that are spread over the draws leave less noise than independent ones.
    free = block_elbo_views(
        estimator, stream(3, "test"), ids, torch.full_like(ids, offset), LENGTH, 2, SIZE,
        independent_draws=True,
    )  # fmt: skip
    apart = by_table(found, row, free).double()
    assert abs(torch.corrcoef(apart.t())[0, 1]) < 0.03
    most = 0.8 if estimator == "coupled" else 1.0
    assert draws.mean(1).var() < most * apart.mean(1).var()


def test_levels_on_one_lattice_leave_the_estimate_unbiased(built: DiffusionModel) -> None:
    model = of_kind(built, "block-causal")
    found, ids = losses_of_all_masks(model, "block-causal", 0, False), torch.arange(30_000)
    views = block_elbo_views(
        "exact_count", stream(3, "test"), ids, torch.full_like(ids, len(PROMPTS[0]) % SIZE),
        LENGTH, 2, SIZE, over_blocks=True,
    )  # fmt: skip
    draws, expected = by_table(found, 0, views).double(), exact_elbo(found, 0)
    for part in (draws[:, 0], draws[:, 1], draws.mean(1)):
        assert abs(part.mean() - expected) < 4 * part.std() / len(ids) ** 0.5


def test_levels_lie_evenly_over_draws_and_blocks() -> None:
    """Of a completion of three blocks of 100 and a fourth that ends early, two draws each."""
    ids, lengths = torch.arange(5), torch.tensor([400, 400, 350, 350, 300])
    views = block_elbo_views(
        "exact_count", stream(1, "test"), ids, ids * 0, 400, 2, 100, lengths=lengths,
        over_blocks=True,
    )  # fmt: skip
    counts = views.mask_indices[:, :, 0].unflatten(2, (4, 100)).sum(3)
    for row, length in enumerate(lengths.tolist()):
        sizes = torch.tensor([100, 100, 100, length - 300])
        number = int((sizes > 0).sum())
        levels = ((counts[row] - 0.5) / sizes.clamp(min=1))[:, :number].flatten()
        gaps = levels.sort().values.diff()
        # A level is known to half a token of its block.
        assert (gaps - 1 / (2 * number)).abs().max() < 1 / 50
        inside = torch.arange(400) < length
        assert not views.mask_indices[row, :, :, ~inside].any()


def test_a_coupled_pair_masks_each_token_once_at_a_level_of_its_block() -> None:
    ids = torch.arange(20_000)
    views = block_elbo_views("coupled", stream(1, "test"), ids, ids * 0 + 2, 7, 1, 4)
    masks = views.mask_indices[:, 0]
    assert (masks.sum(1) == 1).all()
    counts = [part.sum(2) for part in masks.split([2, 4, 1], dim=2)]  # offset 2: 2, 4 and 1 tokens
    for count, most in zip(counts, (2, 4, 1), strict=True):
        share = torch.bincount(count[:, 0], minlength=most + 1) / len(ids)
        assert (share - 1 / (most + 1)).abs().max() < 0.015
    assert (
        abs(torch.corrcoef(torch.stack((counts[0][:, 0], counts[1][:, 0])).double())[0, 1]) < 0.03
    )
    again = block_elbo_views("coupled", stream(1, "test"), ids[5:7], ids[5:7] * 0 + 2, 7, 1, 4)
    assert torch.equal(again.mask_indices, views.mask_indices[5:7])


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_passes_over_all_blocks_give_the_sum_of_the_blocks(
    built: DiffusionModel, kind: str, shift: bool
) -> None:
    model, ids = of_kind(built, kind, shift), torch.arange(3)
    sequences = pack_sequences(PROMPTS, COMPLETIONS, model.pad_token_id, model.shapes)
    views = draw_views(model, sequences, "coupled", stream(0, "elbo"), ids, ids, 3, 2)
    expected = torch.cat(
        [
            by_table(
                losses_of_all_masks(model, kind, row, shift),
                row,
                type(views)(*(None if part is None else part[row : row + 1] for part in views)),
            )
            for row in range(3)
        ]
    )
    for rows_per_batch in (1, 2, 4, 12):
        found = estimate_elbo(model, PROMPTS, COMPLETIONS, rows_per_batch=rows_per_batch)
        assert (found.draws - expected).abs().max() < 1e-4
    assert expected.std() > 1


def test_views_of_a_sequence_share_its_clean_half(built: DiffusionModel) -> None:
    model, ids = of_kind(built, "block-causal"), torch.arange(3)
    sequences = pack_sequences(PROMPTS, COMPLETIONS, model.pad_token_id, model.shapes)
    views = draw_views(model, sequences, "coupled", stream(0, "elbo"), ids, ids, 3, 2)
    shared = cut_views(model, sequences, views, 4)
    assert [tuple(batch.batch.tokens.shape) for batch in shared] == [(1, 5 * 11), (1, 50), (1, 35)]
    apart = cut_views(model, sequences, views, 1)
    assert all(batch.batch.tokens.size(1) in (22, 20, 14) for batch in apart)
    found = elbo_of_views(model, shared, views)
    torch.testing.assert_close(found, elbo_of_views(model, apart, views), rtol=1e-6, atol=1e-5)
    chosen = cut_views(model, sequences, views, 4, torch.tensor([2]))
    assert chosen[0].view_index.tolist() == [8, 9, 10, 11]


@pytest.mark.parametrize("penalty", [True, False])
@pytest.mark.parametrize("mode", ["joint", "two_pass"])
def test_gradients_are_those_of_the_block_elbo(
    built: DiffusionModel, mode: Any, penalty: bool
) -> None:
    """Both modes, sequences left out, against autograd through the objective written out."""
    model, ids = of_kind(built, "block-causal"), torch.arange(3)
    config = EspoConfig(gradient=mode, num_mc=2, prompts_per_rollout=1, group_size=3, kl_coef=0.1)
    sequences = pack_sequences(PROMPTS, COMPLETIONS, model.pad_token_id, model.shapes)
    views = draw_views(model, sequences, "coupled", stream(0, "elbo"), ids, ids, 3, 2)
    advantages = torch.tensor([1.0, -0.7, 0.4 if penalty else 0.0])
    rows = 4 if mode == "joint" else 2
    cut = partial(cut_views, model, sequences, views, rows)
    (chunk,) = model.chunks
    get_model_config(chunk).finalize_model_grads_func = None
    base = elbo_of_views(model, cut(), views)
    old, ref = base + 0.1, base - 0.4 if penalty else None
    parameters = [p for p in chunk.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = None
    found = accumulate_gradient(model, cut(), views, old, ref, advantages, LENGTH, config, 3, cut)
    torch.testing.assert_close(found.draws, base, rtol=1e-5, atol=1e-4)
    assert found.left_out == (not penalty)
    actual = [p.grad.clone() for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    loss = written_out(model, views, old, ref, advantages, config)
    loss.backward()
    for gradient, parameter in zip(actual, parameters, strict=True):
        largest = parameter.grad.abs().max()
        assert (gradient - parameter.grad).abs().max() < 1e-4 * largest
    assert loss.abs() > 0.01


def written_out(
    model: DiffusionModel, views: Any, old: Tensor, ref: Tensor | None, advantages: Tensor,
    config: EspoConfig,
) -> Tensor:  # fmt: skip
    """ESPO's loss with one explicit pass for each block of each view."""
    losses = []
    for row in range(3):
        start = len(PROMPTS[row])
        tokens = torch.tensor(PROMPTS[row] + COMPLETIONS[row].tolist())
        elbos = []
        for draw in range(2):
            elbo = torch.zeros(())
            for view, block in itertools.product(range(2), blocks_of(row)):
                end = block[-1] + 1
                place = torch.arange(end)
                seen = place[:, None] // SIZE >= place // SIZE
                masked = [p for p in block if views.mask_indices[row, draw, view, p - start]]
                inputs = tokens[:end].clone()
                inputs[masked] = MASK
                logits = explicit(model.chunks[0], inputs, seen, end)[:, :262].log_softmax(1)
                for p in masked:
                    weight = views.token_weights[row, draw, view, p - start]
                    elbo = elbo + weight * logits[p, tokens[p]]
            elbos.append(elbo)
        elbo = torch.stack(elbos)
        ratio = ((elbo.mean() - old[row].mean()) / LENGTH).exp()
        loss = -torch.minimum(ratio * advantages[row], ratio.clamp(0.8, 1.2) * advantages[row])
        if ref is not None:
            distance = elbo.mean() - ref[row].mean()
            loss = loss + config.kl_coef * distance**2 / 2 / LENGTH
        losses.append(loss)
    return torch.stack(losses).mean()
