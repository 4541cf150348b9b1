"""Sampling block by block against its rules, written out for one row at a time, without a cache."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_block_diffusion import KINDS, MASK, explicit
from test_passes import build
from test_sampler import kept_tokens, log_probability, number_to_commit
from torch import Tensor

from megatron_espo.config import RolloutConfig
from megatron_espo.errors import UserError
from megatron_espo.generation import block_steps
from megatron_espo.generation.sampler import Generation, generate
from megatron_espo.model.handle import DiffusionModel
from megatron_espo.passes.block_mask import BlockAttention
from megatron_espo.random import stream, uniform
from megatron_espo.startup.setup import diffusion_model

SIZE = 4
# Prompts that end inside a block, at its end, and before the first one does.
PROMPTS = [[5, 7, 11, 3, 99, 21], [3, 1, 4, 1, 5, 9, 2, 6], [100], [42, 42, 17, 250, 0]]
CONFIGS = {
    "greedy": RolloutConfig(12, SIZE, 12, 0.0),
    "low confidence": RolloutConfig(12, SIZE, 6),
    "random": RolloutConfig(12, SIZE, 6, remasking="random"),
    "top-p": RolloutConfig(12, SIZE, 6, top_p=0.6),
    "threshold": RolloutConfig(12, SIZE, threshold=0.4),
    "factor": RolloutConfig(12, SIZE, factor=1.2),
    "editing": RolloutConfig(
        12, SIZE, temperature=0.7, threshold=0.4, editing_threshold=0.2, max_post_steps=3
    ),
    "greedy editing": RolloutConfig(
        12, SIZE, temperature=0.0, threshold=0.3, editing_threshold=0.0
    ),
}


@pytest.fixture(scope="module")
def model(tokenizer: str) -> DiffusionModel:
    chunk = build(tokenizer, "--num-layers", "3", "--qk-layernorm", "--kv-channels", "12").eval()
    return diffusion_model([chunk])


def of_kind(model: DiffusionModel, kind: str, shift: bool = False) -> DiffusionModel:
    return replace(model, blocks=BlockAttention(SIZE, KINDS[kind]), logit_shift=shift)


@torch.no_grad()
def block_logits(
    chunk: Any, x: Tensor, start: int, end: int, kind: str, shift: bool
) -> dict[int, Tensor]:
    """Logits that predict each position of an open block, by passes with an explicit mask."""
    place = torch.arange(end)
    seen = place[:, None] // SIZE >= place // SIZE
    clean = place[:, None] >= place if KINDS[kind] else seen
    opened = torch.where((place >= start)[:, None], place < end, clean)
    logits = explicit(chunk, x[:end], opened, end).double()
    found = {p: logits[p - shift] for p in range(start, end)}
    if shift and start:
        # A block that begins the row has no state before it: its position 0 is the prompt's.
        before = explicit(chunk, x[:start], clean[:start, :start], start).double()
        found[start] = before[start - 1]
    return found


def sample_by_the_rules(
    chunk: Any, prompt: list[int], row: int, config: RolloutConfig, kind: str, shift: bool,
    stop: int = -1,
) -> tuple[list[int], int, float]:  # fmt: skip
    """SDAR's sampler for one row: blocks counted from position 0, the last one cut short.

    With an editing threshold LLaDA2.1's, which goes on in a block once nothing in it is masked.
    Returns the completion, the evaluations and the mean probability of its tokens.
    """
    sure: dict[int, float] = {}
    k, evaluations, editing = SIZE, 0, config.editing_threshold
    x = torch.tensor(prompt + [MASK] * config.completion_length)
    steps = 2 * k + 16 if config.is_parallel else config.steps_per_block
    first = len(prompt) // k
    for block in range(first, -(-len(x) // k)):
        start, end = block * k, min((block + 1) * k, len(x))
        noise = uniform(stream(17, "token/test", block - first), torch.tensor([row]), 2 * steps * k)
        noise = noise.view(steps, 2, k)
        post_steps = 0
        for step in range(steps):
            is_masked = bool((x[start:end] == MASK).any())
            post_steps += not is_masked
            if not is_masked and (editing is None or post_steps > config.max_post_steps):
                break
            predicted = block_logits(chunk, x, start, end, kind, shift)
            evaluations += 1
            candidates, edits = {}, {}
            for place, logits in predicted.items():
                if x[place] != MASK and (editing is None or place < len(prompt)):
                    continue
                allowed = logits[:262].clone()
                allowed[MASK] = -torch.inf
                i = place - start
                if config.temperature == 0:
                    token = int(allowed.argmax())
                else:
                    cdf = kept_tokens(allowed / config.temperature, config).softmax(0).cumsum(0)
                    token = int((cdf <= noise[step, 0, i]).sum())
                random = config.remasking == "random"
                score = float(noise[step, 1, i]) if random else log_probability(logits[:262], token)
                if x[place] == MASK:
                    candidates[place] = (score, token)
                elif token != x[place] and math.exp(score) > editing:
                    edits[place] = (score, token)
            best = sorted(candidates, key=lambda place: -candidates[place][0])
            count = number_to_commit([candidates[p][0] for p in best], step, config, 1)
            for place, (_, token) in ({p: candidates[p] for p in best[:count]} | edits).items():
                x[place] = token
                sure[place] = math.exp(log_probability(predicted[place][:262], token))
            if not is_masked and not edits:
                break
        if config.early_stop and stop in x[max(start, len(prompt)) : end]:
            x[end:] = 261
            break
    return x[len(prompt) :].tolist(), evaluations, sum(sure.values()) / len(sure)


def sampled(model: DiffusionModel, config: RolloutConfig) -> Generation:
    config.validate(model.logit_shift, 1, SIZE)
    return generate(model, PROMPTS, torch.arange(len(PROMPTS)), config, 17, "test")


@pytest.mark.parametrize("cache", ["none", "exact"])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_are_those_of_the_written_rules(
    model: DiffusionModel, name: str, kind: str, shift: bool, cache: Any
) -> None:
    config = replace(CONFIGS[name], cache=cache, micro_batch_size=3)
    result = sampled(of_kind(model, kind, shift), config)
    for row, prompt in enumerate(PROMPTS):
        expected, evaluations, confidence = sample_by_the_rules(
            model.chunks[0], prompt, row, config, kind, shift
        )
        assert result.completions[row].tolist() == expected, row
        assert int(result.num_evaluations[row]) == evaluations
        assert float(result.mean_confidence[row]) == pytest.approx(confidence, rel=1e-4)
    assert MASK not in result.completions
    if config.is_editing:
        unedited = sampled(
            of_kind(model, kind, shift), replace(config, editing_threshold=None, max_post_steps=16)
        )
        assert not torch.equal(result.completions, unedited.completions)


@pytest.mark.parametrize("cache", ["none", "exact"])
def test_a_stop_token_ends_a_completion_with_its_block(model: DiffusionModel, cache: Any) -> None:
    plain = CONFIGS["low confidence"]
    own = of_kind(model, "block-causal")
    stop = int(sampled(own, plain).completions[1, SIZE - 1])
    stopping = replace(own, stop_token_ids=(stop, MASK), eos_token_id=261)
    for size in (1, 2, 4):
        config = replace(plain, early_stop=True, cache=cache, micro_batch_size=size)
        result = sampled(stopping, config)
        for row, prompt in enumerate(PROMPTS):
            expected, evaluations, _ = sample_by_the_rules(
                model.chunks[0], prompt, row, config, "block-causal", False, stop
            )
            assert result.completions[row].tolist() == expected
            assert int(result.num_evaluations[row]) == evaluations
        assert result.completions[1, SIZE:].tolist() == [261] * 8


def test_with_the_cache_only_open_and_finished_blocks_pass(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes, run = [], block_steps.forward_only

    def counted(chunks: Any, batches: Any, *args: Any) -> Any:
        shapes.extend(tuple(batch.tokens.shape) for batch in batches)
        return run(chunks, batches, *args)

    monkeypatch.setattr(block_steps, "forward_only", counted)
    config = replace(CONFIGS["greedy"], cache="exact", micro_batch_size=4)
    result = sampled(of_kind(model, "block-causal"), config)
    # The prompts' whole blocks once, 8 positions of the longest; then blocks.
    assert shapes[0] == (4, 8)
    assert all(width == SIZE for _, width in shapes[1:])
    # 12 steps of a token each, and a pass for each finished block but the last of a row.
    assert len(shapes) == 1 + 12 + 3
    uncached = sampled(of_kind(model, "block-causal"), replace(config, cache="none"))
    assert torch.equal(result.completions, uncached.completions)
    assert result.work[:, 0].sum() < 0.6 * uncached.work[:, 0].sum()


@pytest.mark.parametrize(
    ("settings", "size", "sentence"),
    [
        ({"cache": "exact"}, None, "--rollout-cache exact needs a model whose tokens come"),
        ({"cache": "dual"}, 32, "--rollout-cache dual is for models with full attention; use ex"),
        ({}, 4, "--rollout-block-length 32: the model's blocks have 4 tokens; use 4"),
        ({"guidance_scale": 1.0}, 32, "--rollout-guidance-scale 1.0: no such pass"),
        ({"threshold": 0.7, "editing_threshold": 0.5}, None, "0.5 edits the open block of a model"),
        ({"editing_threshold": 0.5}, 32, "0.5 goes with --rollout-threshold alone"),
        ({"threshold": 0.7, "editing_threshold": 1.0}, 32, "1.0 must be at least 0 and below 1"),
        ({"max_post_steps": 4}, 32, "--rollout-max-post-steps 4 has no effect"),
        (
            {"threshold": 0.7, "editing_threshold": 0.5, "max_post_steps": -1},
            32,
            "--rollout-max-post-steps -1 must be 0",
        ),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(
    settings: dict[str, Any], size: int | None, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        RolloutConfig(**settings).validate(False, 1, size)


@pytest.mark.parametrize("kind", KINDS)
def test_completions_of_a_prompt_take_its_blocks_in_once(
    model: DiffusionModel, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal tokens, of prompts that differ inside the first open block alone, too."""
    model, passes = of_kind(model, kind), []
    forward = block_steps.forward_only

    def noted(chunks: Any, batches: Any, *rest: Any) -> Any:
        passes.append([tuple(batch.tokens.shape) for batch in batches])
        return forward(chunks, batches, *rest)

    monkeypatch.setattr(block_steps, "forward_only", noted)
    prompts = [PROMPTS[0]] * 3 + [[*PROMPTS[0][:4], 8, 9], PROMPTS[2], PROMPTS[2], PROMPTS[1]]
    config, ids = replace(CONFIGS["low confidence"], cache="exact"), torch.arange(len(prompts))
    together = generate(model, prompts, ids, config, 17, "test")
    # The longest prompt's blocks, those of four rows, and nothing before two of them.
    assert passes[0] == [(3, 8)]
    alone = [
        generate(model, [prompt], ids[i : i + 1], config, 17, "test").completions
        for i, prompt in enumerate(prompts)
    ]
    assert torch.equal(together.completions, torch.cat(alone))
    assert together.completions[:3].unique(dim=0).size(0) > 1
