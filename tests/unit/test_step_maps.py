"""The sampler's step map: replayed, it makes every state of the sampling again."""

from dataclasses import replace

import pytest
import torch
from test_block_diffusion import KINDS, MASK, explicit
from test_block_sampling import block_logits
from test_passes import build
from torch import Tensor

from megatron_espo.config import EspoConfig, RolloutConfig
from megatron_espo.errors import UserError
from megatron_espo.generation.remasking import commit_counts, dream_commit_counts
from megatron_espo.generation.sampler import Generation, generate
from megatron_espo.model.handle import DiffusionModel
from megatron_espo.objectives import load_objective
from megatron_espo.objectives.masks import Ask
from megatron_espo.objectives.step_views import StepViews, number_steps
from megatron_espo.passes.block_mask import BlockAttention
from megatron_espo.random import stream
from megatron_espo.simulate.stand_ins import step_map
from megatron_espo.startup.setup import diffusion_model

SIZE = 4
PROMPTS = [[5, 7, 11, 3, 99, 21], [3, 1, 4, 1, 5, 9, 2, 6], [100], [42, 42, 17, 250, 0]]
# Greedy, so that the tokens of a step are known from its state.
WHOLE = {
    "even": RolloutConfig(12, 12, 5, 0.0),
    "blocks": RolloutConfig(12, 6, 8, 0.0),
    "random": RolloutConfig(12, 4, 6, 0.0, "random"),
    "dream": RolloutConfig(12, 12, 10, 0.0, "entropy"),
    "origin": RolloutConfig(12, 6, 12, 0.0, "origin"),
    "threshold": RolloutConfig(12, 6, temperature=0.0, threshold=0.09),
    "cache": RolloutConfig(12, 6, 8, 0.0, cache="dual", cache_refresh_steps=1),
}
BLOCKS = {
    "even": RolloutConfig(12, SIZE, 6, 0.0),
    "threshold": RolloutConfig(12, SIZE, temperature=0.0, threshold=0.09),
    "cache": RolloutConfig(12, SIZE, 6, 0.0, cache="exact"),
}


@pytest.fixture(scope="module")
def model(tokenizer: str) -> DiffusionModel:
    return diffusion_model([build(tokenizer, "--num-layers", "2").eval()])


def sampled(model: DiffusionModel, config: RolloutConfig, record: bool = True) -> Generation:
    config = replace(config, micro_batch_size=3)
    config.validate(model.logit_shift, 1, None if model.blocks is None else SIZE)
    ids = torch.arange(len(PROMPTS))
    return generate(model, PROMPTS, ids, config, 17, "test", record_steps=record)


@torch.no_grad()
def greedy_tokens(model: DiffusionModel, x: Tensor, kind: str | None, start: int) -> Tensor:
    """The likeliest token of every position of a state, or of the block from ``start`` on."""
    chunk, end = model.chunks[0], len(x)
    if kind is None:
        logits = explicit(chunk, x, torch.ones(end, end, dtype=torch.bool), end)
    else:
        end = min(start + SIZE, end)
        found = block_logits(chunk, x, start, end, kind, False)
        logits = torch.zeros(end, 264).double()
        logits[start:] = torch.stack([found[p] for p in range(start, end)])
    logits = logits[:, :262].clone()
    logits[:, MASK] = -torch.inf
    return logits.argmax(1)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(None, name) for name in WHOLE] + [(kind, name) for kind in KINDS for name in BLOCKS],
)
def test_the_state_before_a_step_predicts_what_the_step_committed(
    model: DiffusionModel, kind: str | None, name: str
) -> None:
    config = WHOLE[name] if kind is None else BLOCKS[name]
    size = config.block_length
    if kind is not None:
        model = replace(model, blocks=BlockAttention(SIZE, KINDS[kind]))
    result = sampled(model, config)
    assert result.commit_steps.shape == (4, 12) and result.commit_steps.dtype == torch.int32
    plain = sampled(model, config, record=False)
    assert torch.equal(plain.completions, result.completions)
    assert plain.commit_steps.shape == (4, 0)
    for row, prompt in enumerate(PROMPTS):
        steps = result.commit_steps[row].tolist()
        first = 0 if kind is None else len(prompt) % size
        blocks = [(first + k) // size for k in range(12)]
        assert sorted(set(steps)) == list(range(int(result.num_evaluations[row])))
        # A later block's steps come after those of the ones before.
        assert all(
            steps[i] < steps[j] for i in range(12) for j in range(12) if blocks[i] < blocks[j]
        )
        for block in set(blocks):
            own = [s for s, b in zip(steps, blocks, strict=True) if b == block]
            numbers = [own.count(s) for s in sorted(set(own))]
            if len(own) == size and name not in ("threshold", "origin"):
                counts = dream_commit_counts if name == "dream" else commit_counts
                assert numbers == [n for n in counts(size, config.steps_per_block) if n]
        tokens = torch.tensor(prompt + result.completions[row].tolist())
        committed = torch.tensor([-1] * len(prompt) + steps)
        for step in sorted(set(steps)):
            now = committed == step
            state = tokens.masked_fill(committed >= step, MASK)
            start = int(now.nonzero()[0]) // size * size
            greedy = greedy_tokens(model, state, kind, start)
            assert torch.equal(greedy[now[: len(greedy)]], tokens[now]), (row, step)


def test_some_steps_of_parallel_decoding_commit_several_tokens(model: DiffusionModel) -> None:
    """Else the cases above would not tell a step from a token."""
    steps = sampled(model, WHOLE["threshold"]).commit_steps
    assert len(set(steps[0].tolist())) < 12 and len(set(steps.max(dim=1).values.tolist())) > 1


def test_tokens_that_are_filled_in_have_no_step(model: DiffusionModel) -> None:
    plain = WHOLE["blocks"]
    whole = sampled(model, plain)
    stop = int(whole.completions[1, 3])
    stopping = replace(model, stop_token_ids=(stop,), eos_token_id=261)
    result = sampled(stopping, replace(plain, early_stop=True))
    filled = result.completions == 261
    assert filled[1, 6:].all() and torch.equal(result.commit_steps < 0, filled)
    assert torch.equal(result.commit_steps[~filled], whole.commit_steps[~filled])


def test_a_sample_of_nothing_has_an_empty_map(model: DiffusionModel) -> None:
    none = torch.empty(0, dtype=torch.int64)
    for record, width in ((True, 12), (False, 0)):
        found = generate(model, [], none, WHOLE["even"], 17, "test", record_steps=record)
        assert found.commit_steps.shape == (0, width)


def test_steps_are_numbered_by_those_that_committed_something_in_each_block() -> None:
    steps = torch.tensor([[9, 4, 9, 12, 20, 20, -1], [0, 1, 2, -1, -1, -1, -1]])
    one = torch.zeros_like(steps)
    assert number_steps(steps, one).tolist() == [[1, 0, 1, 2, 3, 3, -1], [0, 1, 2, -1, -1, -1, -1]]
    blocks = torch.tensor([[0, 1, 1, 1, 2, 2, 2], [0, 0, 0, 1, 1, 1, 2]])
    numbers = [[0, 0, 1, 2, 0, 0, -1], [0, 1, 2, -1, -1, -1, -1]]
    assert number_steps(steps, blocks).tolist() == numbers


def test_views_are_the_states_before_merged_steps() -> None:
    """A completion of S steps takes ceil(S / s) passes, each the state before the first of s."""
    steps = torch.tensor([[3, 0, 3, 1, 4], [0, 2, 2, 5, -1]]).int()
    ids = torch.arange(2)
    answers = torch.tensor([5, 4])
    ask = Ask(stream(3, "test"), ids, ids, 2, 5, 1, answers, 6, 5, commit_steps=steps)
    views = StepViews(passes=3, merged=2).draw(ask)
    assert views.predicted is not None and views.weights.shape == (2, 1, 3)
    masks, predicted = views.mask_indices[:, 0].int(), views.predicted[:, 0].int()
    assert masks.tolist() == [
        [[1, 1, 1, 1, 1], [1, 0, 1, 0, 1], [0, 0, 0, 0, 0]],
        [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1]],
    ]
    assert predicted.tolist() == [
        [[0, 1, 0, 1, 0], [1, 0, 1, 0, 1], [0, 0, 0, 0, 0]],
        [[1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]],
    ]


def test_passes_follow_from_the_steps_of_a_run() -> None:
    cj, trace = load_objective("cj_grpo"), load_objective("trace_rl", ("merged=8",))
    even, parallel = RolloutConfig(512, 32, 512), RolloutConfig(512, 32, threshold=0.9)
    assert cj.fitted(RolloutConfig(128, 64, 32), None) == ("passes=32",)
    assert trace.fitted(even, None) == trace.fitted(parallel, None) == ("passes=64",)
    assert load_objective("trace_rl").fitted(replace(even, denoising_steps=64), 32) == ("passes=4",)
    assert load_objective("trace_rl").fitted(parallel, 32) == ("passes=32",)
    with pytest.raises(UserError, match="512 steps make 512 passes, and 256 are the most"):
        cj.fitted(even, None)
    edited = replace(parallel, editing_threshold=0.5)
    with pytest.raises(UserError, match=r"--rollout-editing-threshold 0.5 replaces tokens after"):
        trace.fitted(edited, 32)
    with pytest.raises(UserError, match="passes=3: with --espo-objective cj_grpo this run takes 5"):
        load_objective("cj_grpo", ("passes=3",)).fitted(WHOLE["even"], None)


@pytest.mark.parametrize("by_block", [False, True])
@pytest.mark.parametrize("steps", [6, 12, 24])
def test_made_up_step_maps_have_as_many_passes_as_a_run_at_most(steps: int, by_block: bool) -> None:
    config = RolloutConfig(24, 4, steps, 0.0)
    known = step_map(config, by_block).int().expand(3, -1)
    fitted = load_objective("trace_rl").fitted(config, 4 if by_block else None)
    masks = load_objective("trace_rl", fitted).masks(EspoConfig())
    ids = torch.arange(3)
    offsets = torch.tensor([0, 1, 3]) if by_block else None
    ask = Ask(stream(3, "test"), ids, ids, 3, 24, 1, ids + 24, 6, 4, offsets, known)
    views = masks.draw(ask)
    assert views.predicted is not None
    assert (views.predicted.sum(dim=2) == 1).all() and views.predicted.any(-1).all()
