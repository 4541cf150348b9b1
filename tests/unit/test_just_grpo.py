"""Exact likelihoods from left to right, or along a step map: a pass for each token."""

from dataclasses import replace

import pytest
import torch
from megatron.core.utils import get_model_config
from test_block_diffusion import KINDS, MASK, explicit
from test_passes import build
from torch import Tensor

from megatron_espo.config import EspoConfig, RolloutConfig
from megatron_espo.errors import UserError
from megatron_espo.model.handle import DiffusionModel
from megatron_espo.objectives import load_objective, objective_of, views_per_completion
from megatron_espo.objectives.masks import Ask
from megatron_espo.passes.batch import pack_sequences
from megatron_espo.passes.block_mask import BlockAttention
from megatron_espo.random import stream
from megatron_espo.rl.elbo import block_offsets, cut_views
from megatron_espo.rl.terms import Answers, Facts, log_probabilities, mean_log_probability
from megatron_espo.rl.update import accumulate_facts
from megatron_espo.startup.setup import diffusion_model

SIZE, LENGTH = 3, 5
# The completion begins inside a block and at its start.
PROMPTS = [[5, 7, 11, 3, 99], [3, 1, 4, 1, 5, 9]]
COMPLETIONS = torch.tensor([[9, 2, 7, 7, 250], [1, 2, 3, 4, 257]])
ANSWERS = torch.tensor([5, 3])
# Evaluations that committed the tokens; the last one was filled in.
STEPS = torch.tensor([[3, 0, 3, 1, 4], [0, 2, 2, 5, -1]]).int()
# Which pass predicts each token.
IN_ORDER, IN_BLOCKS = [[0, 1, 2, 3, 4]] * 2, [[2, 0, 1, 2, 0], [0, 1, 2, 0, 1]]
CASES = [
    ("just_grpo", (), None, False, IN_ORDER),
    ("just_grpo", (), None, True, IN_ORDER),
    ("block_just_grpo", (), "block-causal", False, IN_BLOCKS),
    ("block_just_grpo", (), "context-causal", True, IN_BLOCKS),
    ("cj_grpo", (), None, False, [[2, 0, 2, 1, 3], [0, 1, 1, 2, None]]),
    ("trace_rl", ("merged=2",), None, True, [[1, 0, 1, 0, 1], [0, 0, 0, 1, None]]),
    ("trace_rl", (), "block-causal", False, [[0, 0, 2, 1, 0], [0, 1, 1, 0, None]]),
    ("trace_rl", ("merged=2",), "context-causal", True, [[0, 0, 1, 0, 0], [0, 0, 0, 0, None]]),
]


@pytest.fixture(scope="module")
def built(tokenizer: str) -> DiffusionModel:
    return diffusion_model([build(tokenizer, "--num-layers", "2").train()])


def of_case(model: DiffusionModel, kind: str | None, shift: bool) -> DiffusionModel:
    blocks = None if kind is None else BlockAttention(SIZE, KINDS[kind])
    return replace(model, blocks=blocks, logit_shift=shift)


def token_by_token(
    model: DiffusionModel, kind: str | None, shift: bool, row: int, order: list[int | None]
) -> Tensor:
    """The log-probability of each token of a completion, with a pass for each: ``[l]``.

    It sees the tokens of earlier passes, of a model with blocks those of its own block among them
    and all blocks before.
    """
    chunk, start = model.chunks[0], len(PROMPTS[row])
    tokens, found = torch.tensor(PROMPTS[row] + COMPLETIONS[row].tolist()), []
    passes = torch.tensor([LENGTH if one is None else one for one in order])
    for position in range(start, start + LENGTH):
        if order[position - start] is None:
            found.append(torch.zeros((), dtype=torch.float64))
            continue
        end, first = start + LENGTH, 0
        if kind is not None:
            first = position // SIZE * SIZE
            end = min(first + SIZE, end)
        place = torch.arange(end)
        later = (passes >= order[position - start]).nonzero()[:, 0] + start
        inputs = tokens[:end].clone()
        inputs[later[(later >= first) & (later < end)]] = MASK
        seen = torch.ones(end, end, dtype=torch.bool)
        if kind is not None:
            clean = place[:, None] // SIZE >= place // SIZE
            clean = place[:, None] >= place if KINDS[kind] else clean
            seen = torch.where((place >= first)[:, None], place < end, clean)
        logits = explicit(chunk, inputs, seen, end)[position - shift]
        if shift and kind is not None and position == first:
            # The clean state before the block predicts its first token.
            logits = explicit(chunk, tokens[:end], clean, end)[position - 1]
        found.append(logits[:262].double().log_softmax(0)[tokens[position]])
    return torch.stack(found)


@pytest.mark.parametrize(("name", "settings", "kind", "shift", "order"), CASES)
def test_likelihood_and_gradient_are_those_of_one_token_at_a_time(
    built: DiffusionModel, name: str, settings: tuple[str, ...], kind: str | None, shift: bool,
    order: list[list[int | None]],
) -> None:  # fmt: skip
    model = of_case(built, kind, shift)
    size = LENGTH if kind is None else SIZE
    rollout = RolloutConfig(LENGTH, size, LENGTH)
    rollout = rollout if kind is None else replace(rollout, threshold=0.9)
    fitted = load_objective(name, settings).fitted(rollout, None if kind is None else SIZE)
    espo = EspoConfig(
        objective=name, objective_args=[*settings, *fitted], group_size=2, prompts_per_rollout=1,
        kl_coef=0.1, kl_estimator="k3", clip_eps_low=0.05,
    )  # fmt: skip
    passes = -(-size // 2) if settings else size
    objective, ids = objective_of(espo), torch.arange(2)
    assert views_per_completion(espo) == passes
    sequences = pack_sequences(PROMPTS, COMPLETIONS, model.pad_token_id, model.shapes)
    offsets = block_offsets(model, sequences)
    key = stream(3, "test")
    ask = Ask(key, ids, ids, 2, LENGTH, 1, ANSWERS, 6, SIZE, offsets, STEPS)
    views = objective.masks(espo).draw(ask)
    expected = torch.stack([token_by_token(model, kind, shift, i, order[i]) for i in range(2)])
    (chunk,) = model.chunks
    get_model_config(chunk).finalize_model_grads_func = None
    parameters = [p for p in chunk.parameters() if p.requires_grad]
    # Some ratios are clipped, and completions have advantages of both signs.
    old = expected.detach() + torch.tensor([[0.1, -0.3, 0.0, 0.2, -0.1], [0.0, 0.2, 0.3, 0.1, 0.4]])
    reference, advantages = expected.detach() - 0.2, torch.tensor([1.0, -0.7])
    loss = written_out(expected, old, reference, advantages, espo, weights_of(name, order))
    wanted = torch.autograd.grad(loss, parameters)
    answers = Answers(torch.arange(LENGTH)[None] < ANSWERS[:, None], float(ANSWERS.float().mean()))
    facts = Facts(
        old[:, None].float(), reference[:, None].float(), advantages, views, LENGTH, espo, answers,
        objective,
    )  # fmt: skip
    for mode, rows in (("joint", passes), ("two_pass", 1)):
        batches = cut_views(model, sequences, views, rows)
        found = log_probabilities(model, batches, views, objective)
        assert found.shape == (2, 1, LENGTH)
        torch.testing.assert_close(found[:, 0].double(), expected.detach(), rtol=1e-5, atol=1e-5)
        total = mean_log_probability(found, views).double()
        torch.testing.assert_close(total, expected.detach().sum(1), rtol=1e-5, atol=1e-5)
        for parameter in parameters:
            parameter.grad = None
        accumulate_facts(model, batches, facts, mode, 2)  # type: ignore[arg-type]
        for parameter, gradient in zip(parameters, wanted, strict=True):
            assert parameter.grad is not None
            assert (parameter.grad - gradient).abs().max() < 1e-4 * gradient.abs().max(), mode


def written_out(
    now: Tensor, old: Tensor, reference: Tensor, advantages: Tensor, espo: EspoConfig,
    weights: list[list[float]],
) -> Tensor:  # fmt: skip
    """The mean over completions of the weighted clipped loss of tokens."""
    losses = []
    for row in range(2):
        terms = []
        for token, weight in enumerate(weights[row]):
            ratio, d = (now[row, token] - part[row, token] for part in (old, reference))
            ratio, advantage = ratio.exp(), advantages[row].double()
            limited = ratio.clamp(1 - espo.clip_eps_low, 1 + espo.clip_eps_high)
            surrogate = torch.minimum(ratio * advantage, limited * advantage)
            loss = -surrogate + espo.kl_coef * ((-d).exp() - 1 + d)
            if espo.objective == "trace_rl":
                d = now[row, token] - old[row, token]
                loss = loss + 0.01 * ((-d).exp() - 1 + d)
            terms.append(weight * loss)
        losses.append(sum(terms))
    return torch.stack(losses).mean()


def weights_of(name: str, order: list[list[int | None]]) -> list[list[float]]:
    """What each token counts in its completion's loss."""
    if name == "just_grpo":
        return [[1 / LENGTH] * LENGTH] * 2
    if name == "cj_grpo":
        steps = [set(row) - {None} for row in order]
        return [
            [0.0 if one is None else 1 / len(seen) / row.count(one) for one in row]
            for row, seen in zip(order, steps, strict=True)
        ]
    mean = float(ANSWERS.double().mean())
    return [[1 / mean] * int(n) + [0.0] * (LENGTH - int(n)) for n in ANSWERS]


def test_passes_follow_from_the_run_and_are_bounded() -> None:
    whole, blocks = load_objective("just_grpo"), load_objective("block_just_grpo")
    rollout = RolloutConfig(256)
    assert whole.fitted(rollout, None) == ("passes=256",)
    assert blocks.fitted(rollout, 16) == ("passes=16",)
    with pytest.raises(UserError, match="--rollout-completion-length 257 exceeds the 256"):
        whole.fitted(RolloutConfig(257), None)
    with pytest.raises(UserError, match="--block-size 65 exceeds 64"):
        blocks.fitted(rollout, 65)
    with pytest.raises(UserError, match="use just_grpo"):
        blocks.fitted(rollout, None)
    with pytest.raises(UserError, match="passes=8: with --espo-objective just_grpo this run takes"):
        load_objective("just_grpo", ("passes=8",)).fitted(RolloutConfig(16), None)
