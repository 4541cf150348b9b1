"""Preference pairs: their file, their masks, the loss and its gradient on all masks."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.utils import get_model_config
from test_block_diffusion import MASK, explicit
from test_elbo_estimators import exact_elbo, look_up, random_table
from test_passes import build
from torch import Tensor

from megatron_espo.config import EspoConfig
from megatron_espo.data.pairs import PairRows, read_pairs
from megatron_espo.data.tokenizer import byte_tokenizer, special_ids
from megatron_espo.diffusion.block_noise import own_length_views
from megatron_espo.diffusion.estimators import elbo_draws
from megatron_espo.diffusion.noise import ElboEstimator, ElboViews
from megatron_espo.errors import UserError
from megatron_espo.model.handle import DiffusionModel
from megatron_espo.objectives import Given
from megatron_espo.objectives.dpo import Dpo
from megatron_espo.passes.batch import pack_sequences
from megatron_espo.passes.block_mask import BlockAttention
from megatron_espo.preference.rows import pairs_at
from megatron_espo.random import stream
from megatron_espo.rl.elbo import cut_views, elbo_of_views
from megatron_espo.rl.terms import Facts
from megatron_espo.rl.update import accumulate_facts
from megatron_espo.startup.setup import diffusion_model

# Chosen and rejected of two pairs, of three lengths; the prompts of a pair are the same.
PROMPTS = [[5, 7, 11, 3], [5, 7, 11, 3], [100], [100]]
COMPLETIONS = [torch.tensor(part) for part in ([9, 2, 257], [8, 257], [42, 17], [1, 4, 257])]
BETA = 0.7


@pytest.fixture(scope="module")
def model(tokenizer: str) -> DiffusionModel:
    return diffusion_model([build(tokenizer, "--num-layers", "2").train()])


def written_loss(now: list[list[float]], reference: list[list[float]]) -> float:
    """The mean over pairs in Python floats; lists of draws, chosen and rejected in turn."""
    elbo = [sum(n) / len(n) - sum(r) / len(r) for n, r in zip(now, reference, strict=True)]
    margins = [BETA * (c - r) for c, r in zip(elbo[::2], elbo[1::2], strict=True)]
    return sum(-math.log(1 / (1 + math.exp(-m))) for m in margins) / len(margins)


def given(reference: Tensor) -> Given:
    nothing = torch.zeros(len(reference), dtype=reference.dtype)
    answer = torch.ones(len(reference), 3, dtype=torch.bool)
    weights = torch.ones(*reference.shape, 1)
    espo = EspoConfig(group_size=2)
    return Given(reference, reference, nothing, None, answer, 3.0, None, weights, 3, espo)


def test_the_loss_and_its_slopes_are_those_of_the_written_out_one() -> None:
    generator = torch.Generator().manual_seed(4)
    now, reference = 3 * torch.randn(2, 6, 2, generator=generator, dtype=torch.float64)
    leaf = now.clone().requires_grad_()
    found = Dpo(BETA).loss(leaf, given(reference))
    expected = written_loss(now.tolist(), reference.tolist())
    assert found.loss.mean().item() == pytest.approx(expected, rel=1e-12)
    assert torch.equal(found.loss[::2], found.loss[1::2])
    (gradient,) = torch.autograd.grad(found.loss.mean(), leaf)
    for place in itertools.product(range(6), range(2)):
        losses = []
        for step in (1e-6, -1e-6):
            moved = now.clone()
            moved[place] += step
            losses.append(written_loss(moved.tolist(), reference.tolist()))
        slope = (losses[0] - losses[1]) / 2e-6
        assert gradient[place].item() == pytest.approx(slope, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("estimator", ["coupled", "exact_count", "bernoulli"])
def test_differences_to_the_reference_are_unbiased_and_share_their_noise(
    estimator: ElboEstimator,
) -> None:
    """Policy and reference as tables of all masks; the reference is near the policy."""
    ids = torch.arange(40_000)
    for length in (2, 4):
        policy = random_table(length)
        reference = policy + 0.1 * random_table(length, seed=1)
        views = own_length_views(estimator, stream(3, "test"), ids, ids * 0 + length, 2)
        # 1 / p has no variance.
        weights = views.weights.double().clamp(max=50 if estimator == "bernoulli" else math.inf)
        draws = [elbo_draws(look_up(t, views.mask_indices), weights) for t in (policy, reference)]
        shared = draws[0] - draws[1]
        expected = exact_elbo(policy) - exact_elbo(reference)
        for part in (shared[:, 0], shared[:, 1], shared.mean(1)):
            # Clamping costs 1/p beyond 50 of the mass below p = 1/50.
            bias = 0.03 * abs(expected) if estimator == "bernoulli" else 0.0
            assert abs(part.mean() - expected) < 4 * part.std() / len(ids) ** 0.5 + bias
        others = own_length_views(estimator, stream(4, "test"), ids, ids * 0 + length, 2)
        apart = draws[0] - elbo_draws(
            look_up(reference, others.mask_indices), others.weights.double().clamp(max=50)
        )
        assert shared.mean(1).var() < 0.1 * apart.mean(1).var()


def test_masks_of_a_completion_do_not_depend_on_the_others() -> None:
    lengths = torch.tensor([3, 9, 1, 5])
    whole = own_length_views("coupled", stream(3, "test"), torch.arange(4), lengths, 3)
    assert whole.mask_indices.shape == (4, 3, 2, 9)
    for i, length in enumerate(lengths.tolist()):
        alone = own_length_views("coupled", stream(3, "test"), lengths[:1] * 0 + i, lengths[[i]], 3)
        assert torch.equal(alone.mask_indices[0], whole.mask_indices[i, ..., :length])
        assert torch.equal(alone.weights[0], whole.weights[i])
        assert not whole.mask_indices[i, ..., length:].any()


def all_masks() -> ElboViews:
    """Every mask of each completion as a draw, weighted so that the mean over draws is exact."""
    draws = 2**3 - 1
    masks = torch.zeros(len(COMPLETIONS), draws, 1, 3, dtype=torch.bool)
    weights = torch.zeros(len(COMPLETIONS), draws, 1)
    for i, completion in enumerate(COMPLETIONS):
        length = len(completion)
        places = itertools.product([False, True], repeat=length)
        for draw, mask in enumerate(itertools.islice(places, 1, None)):
            masks[i, draw, 0, :length] = torch.tensor(mask)
            weights[i, draw] = draws / (sum(mask) * math.comb(length, sum(mask)))
    # A model with blocks takes the weights of tokens.
    tokens = weights[..., None].expand(*masks.shape).clone()
    return ElboViews(masks, weights, tokens)


def written_elbos(model: DiffusionModel, views: ElboViews) -> list[Tensor]:
    """ELBOs with an explicit pass for each mask, which carry the gradient."""
    (chunk,), elbos = model.chunks, []
    for i, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        tokens = torch.tensor([*prompt, *completion.tolist()])
        elbo = torch.zeros((), dtype=torch.float64)
        for mask, weight in zip(views.mask_indices[i, :, 0], views.weights[i, :, 0], strict=True):
            masked = len(prompt) + mask.nonzero()[:, 0]
            if len(masked):
                inputs = tokens.clone()
                inputs[masked] = MASK
                sees = torch.ones(len(tokens), len(tokens), dtype=torch.bool)
                logits = explicit(chunk, inputs, sees, len(tokens))[masked, :262]
                right = logits.double().log_softmax(1).gather(1, tokens[masked, None])
                elbo = elbo + weight * right.sum() / views.weights.size(1)
        elbos.append(elbo)
    return elbos


@pytest.mark.parametrize("blocks", [False, True])
def test_gradients_are_those_of_the_written_out_loss_on_all_masks(
    model: DiffusionModel, blocks: bool
) -> None:
    """With blocks, completions and prompts lie in one block: the same passes in other rows."""
    views, number = all_masks(), len(COMPLETIONS)
    per_sequence = views.weights[0].numel()
    if blocks:
        model = replace(model, blocks=BlockAttention(8, False))
        views = views._replace(weights=torch.ones_like(views.weights))
    sequences = pack_sequences(PROMPTS, COMPLETIONS, model.pad_token_id, model.shapes, together=2)
    (chunk,) = model.chunks
    get_model_config(chunk).finalize_model_grads_func = None
    parameters = [p for p in chunk.parameters() if p.requires_grad]
    expected = written_elbos(model, all_masks())
    values = torch.stack(expected)
    away = torch.tensor([0.3, -0.8, -0.2, 0.9], dtype=torch.float64)
    margin = BETA * (values - values.detach() + away).view(-1, 2)
    loss = -(margin[:, 0] - margin[:, 1]).sigmoid().log().mean()
    wanted = torch.autograd.grad(loss, parameters)
    for mode, rows in (("joint", 2 * per_sequence), ("two_pass", per_sequence)):
        batches = cut_views(model, sequences, views, rows)
        draws = elbo_of_views(model, batches, views)
        torch.testing.assert_close(draws.mean(1).double(), values.detach(), rtol=1e-5, atol=1e-4)
        reference = draws - away[:, None].float()
        objective, settings = Dpo(BETA), EspoConfig(group_size=2)
        facts = Facts(None, reference, torch.zeros(number), views, 3, settings, None, objective)
        for parameter in parameters:
            parameter.grad = None
        mode_: Any = mode
        accumulate_facts(model, batches, facts, mode_, number)
        for parameter, gradient in zip(parameters, wanted, strict=True):
            assert parameter.grad is not None
            largest = gradient.abs().max()
            assert (parameter.grad - gradient).abs().max() < 1e-4 * largest, mode


def read(folder: Path, *lines: object, **settings: Any) -> PairRows:
    path, tokenizer = folder / "pairs.jsonl", byte_tokenizer()
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_pairs(path, tokenizer, special_ids(tokenizer), **{"seq_length": 40, **settings})


def test_pairs_are_read_as_texts_and_as_messages(tmp_path: Path) -> None:
    user = [{"role": "user", "content": "q"}]
    good, bad = ({"role": "assistant", "content": text} for text in ("yes", "no"))
    rows = read(
        tmp_path,
        {"prompt": "q:", "chosen": "yes", "rejected": "no"},
        {"prompt": user, "chosen": "yes", "rejected": "no"},
        {"prompt": user, "chosen": [good], "rejected": [bad]},
        {"chosen": [*user, good], "rejected": [*user, bad]},
    )
    decode = byte_tokenizer().decode
    assert [decode(part.tolist()) for part in rows.pair(0)] == [
        "q:", "yes<|endoftext|>", "no<|endoftext|>"
    ]  # fmt: skip
    prompt, chosen, _ = rows.pair(1)
    assert decode(prompt.tolist()).endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")
    assert decode(chosen.tolist()) == "yes<|eot_id|><|endoftext|>"
    for other in (2, 3):
        for ours, theirs in zip(rows.pair(other), rows.pair(1), strict=True):
            assert ours.tolist() == theirs.tolist()
    assert rows.completion_lengths().tolist() == [[4, 3], *[[5, 4]] * 3]
    filled = read(tmp_path, {"prompt": "q", "chosen": "yes", "rejected": "n"}, completion_length=3)
    assert [decode(part.tolist()) for part in filled.pair(0)[1:]] == [
        "yes", "n" + 2 * "<|endoftext|>"
    ]  # fmt: skip


def test_what_is_no_pair_is_refused_by_its_line(tmp_path: Path) -> None:
    good = {"prompt": "q", "chosen": "a", "rejected": "b"}
    user = [{"role": "user", "content": "q"}]
    for line, part in (
        ({"prompt": "q", "chosen": "a"}, '"rejected" or its prompt is neither'),
        ({"chosen": "a", "rejected": "b"}, '"chosen" or its prompt is neither'),
        ({"prompt": ["q"], "chosen": "a", "rejected": "b"}, "is neither"),
        ({"prompt": "q", "chosen": "a", "rejected": ""}, '"rejected": the completion is empty'),
        ({"prompt": user, "chosen": "", "rejected": "b"}, '"chosen" is empty'),
        ({"prompt": user, "chosen": [], "rejected": "b"}, '"chosen" is empty'),
        ({"prompt": user, "chosen": [*user, *user], "rejected": "b"}, "one assistant message"),
        ({"prompt": user, "chosen": user, "rejected": "b"}, "assistant"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "are the same"),
        ({"prompt": "q", "chosen": "<|mask|>", "rejected": "a"}, "spells the mask token"),
        ({"prompt": "q" * 39, "chosen": "a", "rejected": "b"}, "--seq-length 40; raise it or pass"),
    ):
        with pytest.raises(UserError, match=part) as caught:
            read(tmp_path, good, line)
        assert ":2: " in str(caught.value)
    with pytest.raises(UserError, match="--dpo-completion-length 2; raise it"):
        read(tmp_path, {**good, "chosen": "abc"}, completion_length=2)
    with pytest.raises(UserError, match="the prompt is empty, and with --logit-shift"):
        read(tmp_path, {**good, "prompt": ""}, shortest_prompt=1)
    long = {**good, "prompt": "q" * 39}
    assert read(tmp_path, long, good, skip_long=True).num_skipped == 1
    with pytest.raises(UserError, match="none of the 1 pairs fits"):
        read(tmp_path, long, skip_long=True)


def test_an_epoch_shows_each_pair_once() -> None:
    places = torch.arange(14).numpy()
    found = pairs_at(places, 7, seed=3)
    assert sorted(found[:7]) == sorted(found[7:]) == list(range(7))
    assert found[:7].tolist() != found[7:].tolist()
    assert pairs_at(places[3:9], 7, seed=3).tolist() == found[3:9].tolist()
