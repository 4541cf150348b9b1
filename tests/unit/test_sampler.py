"""The model and the sampler against an independent pair: transformers' Llama with a full attention
mask, and the published sampling rules written out for one unpadded row at a time."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core import mpu
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron_state import new_groups
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from megatron_espo.config import RolloutConfig
from megatron_espo.data.tokenizer import byte_tokenizer, save_tokenizer
from megatron_espo.diffusion.noise import elbo_views
from megatron_espo.generation import cut, sampler
from megatron_espo.generation.sampler import generate
from megatron_espo.model.cpu import matmul
from megatron_espo.model.handle import DiffusionModel
from megatron_espo.model.provider import model_provider
from megatron_espo.passes.batch import ViewBatch, mask_rows, pack_sequences, view_batches
from megatron_espo.passes.shapes import Shapes
from megatron_espo.random import stream, uniform
from megatron_espo.rl.elbo import elbo_of_views, estimate_elbo
from megatron_espo.startup.arguments import initialize_arguments
from megatron_espo.startup.setup import diffusion_model, start_anew

VOCAB, MASK = 262, 256
PROMPTS = [[5, 7, 11], [3, 1, 4, 1, 5, 9, 2], [100], [42, 42, 17, 250, 0]]


@pytest.fixture(scope="module")
def model(one_rank: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DiffusionModel]:
    folder = tmp_path_factory.mktemp("model") / "tokenizer"
    save_tokenizer(byte_tokenizer(), folder)
    start_anew()
    argv = (
        "--preset tiny --num-layers 2 --group-query-attention --num-query-groups 2 "
        "--make-vocab-size-divisible-by 8 --init-method-std 0.3 --seq-length 64 "
        f"--micro-batch-size 1 --train-iters 1 --tokenizer-model {folder}"
    )
    initialize_arguments(argv.split(), lambda args: None)
    new_groups()
    model_parallel_cuda_manual_seed(3)
    torch.manual_seed(3)
    chunk = model_provider()
    with torch.no_grad():
        for parameter in chunk.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    yield diffusion_model([chunk.eval()])
    mpu.destroy_model_parallel()
    start_anew()


@pytest.fixture(scope="module")
def llama(model: DiffusionModel) -> LlamaForCausalLM:
    """The same weights under Llama's names; q, k, v come out of Megatron's packing by group."""
    ours = dict(model.chunks[0].named_parameters())
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        rms_norm_eps=1e-5, rope_theta=10000.0, attention_bias=False, tie_word_embeddings=False,
        attn_implementation="eager",
    )  # fmt: skip
    weights = {
        "model.embed_tokens.weight": ours["embedding.word_embeddings.weight"][:VOCAB],
        "model.norm.weight": ours["decoder.final_layernorm.weight"],
        "lm_head.weight": ours["output_layer.weight"][:VOCAB],
    }
    for i in range(2):
        layer, their = f"decoder.layers.{i}.", f"model.layers.{i}."
        packed = ours[layer + "self_attention.linear_qkv.weight"].view(2, 4, 16, 64)
        gate, up = ours[layer + "mlp.linear_fc1.weight"].chunk(2)
        weights |= {
            their + "input_layernorm.weight": ours[layer + "input_layernorm.weight"],
            their + "post_attention_layernorm.weight": ours[layer + "pre_mlp_layernorm.weight"],
            their + "self_attn.q_proj.weight": packed[:, :2].reshape(64, 64),
            their + "self_attn.k_proj.weight": packed[:, 2].reshape(32, 64),
            their + "self_attn.v_proj.weight": packed[:, 3].reshape(32, 64),
            their + "self_attn.o_proj.weight": ours[layer + "self_attention.linear_proj.weight"],
            their + "mlp.gate_proj.weight": gate,
            their + "mlp.up_proj.weight": up,
            their + "mlp.down_proj.weight": ours[layer + "mlp.linear_fc2.weight"],
        }
    llama = LlamaForCausalLM(config).eval()
    llama.load_state_dict({name: value.detach().clone() for name, value in weights.items()})
    return llama


@torch.no_grad()
def full_logits(llama: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    """Logits of one row, float64 ``[s, vocab]``, every position seeing every other."""
    s = tokens.numel()
    mask = torch.zeros(1, 1, s, s)
    return llama(input_ids=tokens[None], attention_mask=mask).logits[0].double()


def log_probability(logits: Tensor, token: int) -> float:
    return float(logits[token] - logits.logsumexp(0))


@torch.no_grad()
def window_logits(llama: LlamaForCausalLM, x: Tensor, past: Any, window: range) -> Tensor:
    """Logits of a window's positions; the others' keys and values are those of an older pass."""
    others = [i for i in range(len(x)) if i not in window]
    cache = DynamicCache()
    for number, layer in enumerate(past.layers):
        cache.update(layer.keys[:, :, others], layer.values[:, :, others], number)
    places = torch.tensor(window)
    return llama(
        input_ids=x[None, places],
        position_ids=places[None],
        past_key_values=cache,
        attention_mask=torch.zeros(1, 1, len(window), len(x)),
    ).logits[0].double()  # fmt: skip


def block_logits(
    llama: LlamaForCausalLM, x: Tensor, start: int, end: int, past: Any,
    config: RolloutConfig, shift: int,
) -> tuple[dict[int, Tensor], Any]:  # fmt: skip
    """Logits that predict each position of a block, and the keys and values to go on with.

    A whole pass without ``past``, a window of it otherwise.
    """
    if past is None:
        with torch.no_grad():
            mask = torch.zeros(1, 1, len(x), len(x))
            output = llama(input_ids=x[None], attention_mask=mask, use_cache=True)
        first, logits, past = 0, output.logits[0].double(), output.past_key_values
    else:
        first = start - shift
        window = range(first, end if config.cache == "dual" else len(x))
        logits = window_logits(llama, x, past, window)
    return {place: logits[place - shift - first] for place in range(start, end)}, past


def number_to_commit(scores: list[float], step: int, config: RolloutConfig, least: int) -> int:
    """How many of the candidates with these descending log-probabilities a step commits."""
    confidences = [math.exp(score) for score in scores]
    if config.threshold is not None:
        return max(least, sum(confidence >= config.threshold for confidence in confidences))
    if config.factor is not None:
        fits = [n for n, c in enumerate(confidences, 1) if (n + 1) * (1 - c) < config.factor]
        return max(fits, default=least)
    # n // s per step, the remainder to the early ones.
    return config.block_length // config.steps_per_block + (
        step < config.block_length % config.steps_per_block
    )


def kept_tokens(logits: Tensor, config: RolloutConfig) -> Tensor:
    """Leave out what top-p and top-k do not draw from: the most likely token, then the next one,
    as long as those before it have less than top-p and are fewer than top-k."""
    kept, total = torch.full_like(logits, -math.inf), 0.0
    for number, token in enumerate(logits.argsort(descending=True).tolist()):
        if total >= config.top_p or (config.top_k and number >= config.top_k):
            break
        kept[token] = logits[token]
        total += float((logits[token] - logits.logsumexp(0)).exp())
    return kept


def sample_by_the_rules(
    llama: LlamaForCausalLM, prompt: list[int], row: int, config: RolloutConfig, seed: int,
    shift: int = 0, stop: int = -1, end_of_sequence: int = -1,
) -> tuple[list[int], int]:  # fmt: skip
    """LLaDA's sampler and Fast-dLLM's for one row, position by position.

    Returns:
        The completion and the model evaluations.
    """
    length, k = config.completion_length, config.block_length
    refresh, evaluations = config.cache_refresh_steps, 0
    # Where windows may leave a token to the next pass, a block takes up to two steps for each.
    steps = 2 * k if config.is_parallel else config.steps_per_block
    x = torch.tensor(prompt + [MASK] * length)
    for block in range(length // k):
        noise = uniform(stream(seed, "token/test", block), torch.tensor([row]), 2 * steps * k)
        noise = noise.view(steps, 2, k)
        start, past = len(prompt) + block * k, None
        for step in range(steps):
            if config.cache == "none" or (refresh and step % refresh == 0):
                past = None
            is_window = past is not None
            predicted, past = block_logits(llama, x, start, start + k, past, config, shift)
            candidates = {}
            if config.guidance_scale:
                hidden = x.clone()
                hidden[: len(prompt)] = MASK
                un = full_logits(llama, hidden)
                predicted = {
                    place: un[place] + (config.guidance_scale + 1) * (logits - un[place])
                    for place, logits in predicted.items()
                }
            for i, (place, logits) in enumerate(predicted.items()):
                if x[place] != MASK:
                    continue
                allowed = logits.clone()
                allowed[MASK] = -math.inf
                if config.temperature == 0:
                    token = int(allowed.argmax())
                else:
                    cdf = kept_tokens(allowed / config.temperature, config).softmax(0).cumsum(0)
                    token = int((cdf <= noise[step, 0, i]).sum())
                if config.remasking == "random":
                    score = float(noise[step, 1, i])
                else:
                    score = log_probability(logits, token)
                candidates[place] = (score, token)
            if not candidates:
                break
            evaluations += 1
            best = sorted(candidates, key=lambda place: -candidates[place][0])
            least = 0 if is_window and config.cache_unsure == "refresh" else 1
            scores = [candidates[place][0] for place in best]
            count = number_to_commit(scores, step, config, least)
            if count == 0:
                past = None
            for place in best[:count]:
                x[place] = candidates[place][1]
        if config.early_stop and stop in x[start : start + k]:
            x[start + k :] = end_of_sequence
            break
    return x[len(prompt) :].tolist(), evaluations


CONFIGS = {
    "greedy": RolloutConfig(12, 12, 5, 0.0),
    "blocks": RolloutConfig(12, 4, 6, 1.0),
    "cold": RolloutConfig(12, 6, 12, 0.3),
    "random": RolloutConfig(12, 4, 6, 1.0, "random"),
    "guidance": RolloutConfig(8, 4, 4, 1.0, "low_confidence", 0.7),
    "top-p": RolloutConfig(12, 4, 6, 1.0, top_p=0.6),
    "top-k": RolloutConfig(12, 4, 12, 1.5, top_k=3),
    "top-p and top-k, random": RolloutConfig(12, 4, 6, 0.8, "random", top_p=0.9, top_k=40),
    "guidance, top-p": RolloutConfig(8, 4, 4, 1.0, "low_confidence", 0.7, top_p=0.7),
    "dual, top-p": RolloutConfig(12, 4, 12, cache="dual", top_p=0.8),
    "prefix, factor, top-k": RolloutConfig(12, 6, factor=1.2, cache="prefix", top_k=5),
    "threshold": RolloutConfig(12, 6, threshold=0.5),
    "factor": RolloutConfig(12, 6, temperature=0.5, factor=1.2),
    "guided threshold": RolloutConfig(8, 4, guidance_scale=0.7, threshold=0.6),
    "prefix": RolloutConfig(12, 4, 12, cache="prefix"),
    "dual": RolloutConfig(12, 4, 12, 0.0, cache="dual"),
    "dual, refreshed": RolloutConfig(12, 6, 12, cache="dual", cache_refresh_steps=2),
    "dual, random": RolloutConfig(12, 4, 6, remasking="random", cache="dual"),
    "prefix, factor": RolloutConfig(12, 6, factor=1.2, cache="prefix"),
    "prefix, factor, unsure": RolloutConfig(
        12, 6, factor=1.2, cache="prefix", cache_unsure="commit"
    ),
    "dual, threshold": RolloutConfig(12, 6, threshold=0.5, cache="dual"),
    "dual, threshold, unsure": RolloutConfig(
        12, 6, threshold=0.5, cache="dual", cache_unsure="commit"
    ),
    "dual, threshold, refreshed": RolloutConfig(
        12, 6, 12, 0.0, threshold=0.5, cache="dual", cache_refresh_steps=3
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_sampler_follows_the_written_rules(
    model: DiffusionModel, llama: LlamaForCausalLM, name: str
) -> None:
    """Batched with right padding, the tokens are those of each row alone under the rules."""
    config = replace(CONFIGS[name], micro_batch_size=3)
    config.validate()
    result = generate(model, PROMPTS, torch.arange(len(PROMPTS)), config, 17, "test")
    for row, prompt in enumerate(PROMPTS):
        expected, evaluations = sample_by_the_rules(llama, prompt, row, config, 17)
        assert result.completions[row].tolist() == expected, row
        assert int(result.num_evaluations[row]) == evaluations
    if not config.is_parallel:
        assert set(result.num_evaluations.tolist()) == {config.denoising_steps}
    assert MASK not in result.completions


@pytest.mark.parametrize(
    "name", ["blocks", "top-p", "dual, top-p", "threshold", "prefix", "dual, threshold"]
)
def test_shifted_logits_read_the_state_before_the_block(
    model: DiffusionModel, llama: LlamaForCausalLM, name: str
) -> None:
    config = CONFIGS[name]
    shifted = replace(model, logit_shift=True)
    result = generate(shifted, PROMPTS, torch.arange(4), config, 17, "test")
    for row, prompt in enumerate(PROMPTS):
        expected, _ = sample_by_the_rules(llama, prompt, row, config, 17, shift=1)
        assert result.completions[row].tolist() == expected, row


@pytest.mark.parametrize("name", ["blocks", "threshold", "prefix", "dual, threshold"])
@pytest.mark.parametrize("micro_batch_size", [2, 3])
def test_a_block_with_a_stop_token_ends_the_completion(
    model: DiffusionModel, llama: LlamaForCausalLM, name: str, micro_batch_size: int
) -> None:
    """Rows that are left over take the places of those that stop; their tokens do not change."""
    plain = CONFIGS[name]
    config = replace(plain, early_stop=True, micro_batch_size=micro_batch_size)
    k, length = config.block_length, config.completion_length
    whole = generate(model, PROMPTS, torch.arange(4), plain, 17, "test")
    # Token of the first block of the longest row, which is sampled first.
    stop = int(whole.completions[1, k - 1])
    stopping = replace(model, stop_token_ids=(stop, MASK), eos_token_id=261)
    reports: list[int] = []
    result = generate(
        stopping, PROMPTS, torch.arange(4), config, 17, "test",
        on_finished=lambda rows, _: reports.extend(rows.tolist()),
    )  # fmt: skip
    for row, prompt in enumerate(PROMPTS):
        expected, evaluations = sample_by_the_rules(
            llama, prompt, row, config, 17, stop=stop, end_of_sequence=261
        )
        assert result.completions[row].tolist() == expected, row
        assert int(result.num_evaluations[row]) == evaluations
        assert int(result.num_committed[row]) == length - expected.count(261)
    assert sorted(reports) == [0, 1, 2, 3]
    # Up to the block with the stop token, what was sampled after it included, nothing changes.
    assert torch.equal(result.completions[1, :k], whole.completions[1, :k])
    assert result.completions[1, k:].tolist() == [261] * (length - k)
    assert result.num_evaluations[1] < whole.num_evaluations[1]


def test_threshold_above_one_decodes_one_token_per_step(model: DiffusionModel) -> None:
    slow = RolloutConfig(12, 4, 12, threshold=1.01)
    steps = RolloutConfig(12, 4, 12)
    ids = torch.arange(4)
    ours, theirs = (generate(model, PROMPTS, ids, c, 17, "test") for c in (slow, steps))
    assert torch.equal(ours.completions, theirs.completions)
    assert ours.num_evaluations.tolist() == [12] * 4
    assert ours.tokens_per_step.tolist() == [1.0] * 4


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize(
    "plain",
    [RolloutConfig(12, 12, 6), RolloutConfig(12, 4, 12, 0.0), RolloutConfig(12, 6, factor=1.2)],
)
def test_a_cache_refreshed_at_every_step_changes_nothing(
    model: DiffusionModel, cache: str, plain: RolloutConfig
) -> None:
    cached = replace(plain, cache=cache, cache_refresh_steps=1)  # type: ignore[arg-type]
    ids = torch.arange(4)
    ours, theirs = (generate(model, PROMPTS, ids, c, 17, "test") for c in (cached, plain))
    assert torch.equal(ours.completions, theirs.completions)
    assert torch.equal(ours.num_evaluations, theirs.num_evaluations)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("block", [4, 12])
def test_blocks_of_one_step_never_use_the_cache(
    model: DiffusionModel, cache: str, block: int
) -> None:
    plain = RolloutConfig(12, block, 12 // block)
    cached = replace(plain, cache=cache)  # type: ignore[arg-type]
    ids = torch.arange(4)
    ours, theirs = (generate(model, PROMPTS, ids, c, 17, "test") for c in (cached, plain))
    assert torch.equal(ours.completions, theirs.completions)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_unsure_windows_leave_every_decision_to_whole_passes(
    model: DiffusionModel, cache: str
) -> None:
    """With a threshold that nothing reaches: the tokens are those without a cache, and between two
    of a block lies a window that decides nothing."""
    plain = RolloutConfig(12, 4, threshold=1.01, temperature=0.0, micro_batch_size=3)
    cached = replace(plain, cache=cache)  # type: ignore[arg-type]
    committing = replace(cached, cache_unsure="commit")
    ids = torch.arange(4)
    ours, theirs, others = (
        generate(model, PROMPTS, ids, c, 17, "test") for c in (cached, plain, committing)
    )
    assert torch.equal(ours.completions, theirs.completions)
    assert not torch.equal(others.completions, theirs.completions)
    assert theirs.num_evaluations.tolist() == others.num_evaluations.tolist() == [12] * 4
    assert ours.num_evaluations.tolist() == [12 + 3 * 3] * 4


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_unsure_rows_do_not_change_the_ones_beside_them(
    model: DiffusionModel, micro_batch_size: int
) -> None:
    """Rows want whole passes at different steps, and wait for each other."""
    config = replace(CONFIGS["dual, threshold"], micro_batch_size=micro_batch_size)
    passed: list[int] = []
    result = generate(
        model, PROMPTS * 2, torch.arange(8), config, 17, "test",
        lambda completions: passed.append(int((completions == MASK).sum())),
    )  # fmt: skip
    alone = [
        generate(model, [prompt], torch.tensor([i]), config, 17, "test")
        for i, prompt in enumerate(PROMPTS * 2)
    ]
    for i, one in enumerate(alone):
        assert torch.equal(result.completions[i], one.completions[0])
        assert result.num_evaluations[i] == one.num_evaluations[0]
    # Steps at which nothing was committed, and rows that wanted different numbers of them.
    assert any(before == after for before, after in itertools.pairwise(passed))
    assert len(set(result.num_evaluations.tolist())) > 1


def test_caches_are_approximate(model: DiffusionModel) -> None:
    """Otherwise the tests of caches would show nothing."""
    plain = RolloutConfig(12, 6, 12)
    configs = [plain, replace(plain, cache="prefix"), replace(plain, cache="dual")]
    tokens = [generate(model, PROMPTS, torch.arange(4), c, 17, "test").completions for c in configs]
    assert len({str(t.tolist()) for t in tokens}) == 3


@pytest.mark.parametrize("name", ["blocks", "dual, threshold"])
def test_sampler_may_take_weights_as_left_factors_and_elbos_may_not(
    model: DiffusionModel, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    multiply = matmul.linear

    def counted(hidden: Tensor, weight: Tensor, by_features: bool = False) -> Tensor:
        asked.append(by_features)
        return multiply(hidden, weight, by_features)

    config = replace(CONFIGS[name], micro_batch_size=4)
    expected = generate(model, PROMPTS, torch.arange(4), config, 17, "test").completions
    monkeypatch.setattr(matmul, "linear", counted)
    monkeypatch.setattr(matmul, "_has_avx512", lambda: False)
    monkeypatch.setattr(matmul, "_LEFT_WEIGHT", 1)
    result = generate(model, PROMPTS, torch.arange(4), config, 17, "test")
    assert torch.equal(result.completions, expected)
    # One of the four products of every layer, in every pass.
    assert sum(asked) >= 2 * int(result.num_evaluations.max())
    assert 4 * sum(asked) <= len(asked) <= 5 * sum(asked)
    asked.clear()
    ids = torch.arange(4)
    views = elbo_views("coupled", stream(4, "test"), ids, ids, 4, 6, 2)
    packed = pack_sequences(PROMPTS, torch.arange(24).view(4, 6), 0, Shapes())
    elbo_of_views(model, view_batches(packed, views, MASK, VOCAB, 4, same_width=False), views)
    assert asked and not any(asked)


@pytest.mark.parametrize("name", ["blocks", "guidance", "threshold", "dual, threshold"])
@pytest.mark.parametrize(("micro_batch_size", "cost"), [(3, 384), (8, 384), (8, 4)])
def test_few_shapes_change_neither_tokens_nor_elbos(
    model: DiffusionModel, name: str, micro_batch_size: int, cost: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """As on a GPU: wider rows, copies that fill a pass up, and several passes that cost little."""
    monkeypatch.setattr(cut, "PASS", cost)
    few, shapes, most = replace(model, widths=(14, 17, 22, 30)), [], 0
    run = sampler.forward_only

    def counted(chunks: Any, batches: Any, *args: Any, **named: Any) -> Any:
        nonlocal most
        most = max(most, len(batches))
        shapes.extend(tuple(batch.tokens.shape) for batch in batches)
        return run(chunks, batches, *args, **named)

    monkeypatch.setattr(sampler, "forward_only", counted)
    ids = torch.arange(4)
    plain = generate(model, PROMPTS, ids, CONFIGS["blocks"], 17, "test")
    stop = int(plain.completions[2, 5])
    config = replace(CONFIGS[name], early_stop=True, micro_batch_size=micro_batch_size)
    results, seen = [], []
    for one in (model, few):
        shapes.clear()
        stopping = replace(one, stop_token_ids=(stop, MASK))
        results.append(generate(stopping, PROMPTS, ids, config, 17, "test"))
        seen.append(set(shapes))
    exact, padded = results
    assert torch.equal(padded.completions, exact.completions)
    assert torch.equal(padded.num_evaluations, exact.num_evaluations)
    torch.testing.assert_close(padded.mean_confidence, exact.mean_confidence)
    if config.cache == "none":
        assert {width for _, width in seen[1]} <= set(few.widths)
        assert seen[1] != seen[0]
        if cost == 4:  # short rows do not pass beside long ones; guided ones are all of one width
            assert (most > 1) == (name != "guidance")
        else:
            assert (padded.work[:, 0] > exact.work[:, 0]).all()
    else:  # whose attention keeps no graphs
        assert seen[1] == seen[0]
    ours, theirs = (
        estimate_elbo(one, PROMPTS, exact.completions, rows_per_batch=2) for one in (few, model)
    )
    torch.testing.assert_close(ours.draws, theirs.draws, rtol=1e-5, atol=1e-4)


def test_sample_does_not_depend_on_its_batch(model: DiffusionModel) -> None:
    config = CONFIGS["blocks"]
    whole = generate(model, PROMPTS, torch.arange(4), config, 17, "test").completions
    alone = generate(model, PROMPTS[2:3], torch.tensor([2]), config, 17, "test").completions
    assert torch.equal(whole[2:3], alone)


@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
def test_every_row_is_reported_once_when_it_is_final(
    model: DiffusionModel, micro_batch_size: int
) -> None:
    """Rows of a micro-batch are final together, the longest prompts first."""
    config = replace(CONFIGS["blocks"], micro_batch_size=micro_batch_size)
    reports: list[tuple[list[int], list[list[int]]]] = []
    unfinished: list[list[bool]] = []

    def look(completions: Tensor) -> None:
        unfinished.append((completions == MASK).any(1).tolist())

    def report(indices: Tensor, completions: Tensor) -> None:
        assert not any(unfinished[-1][i] for i in indices.tolist())
        reports.append((indices.tolist(), completions.tolist()))

    result = generate(model, PROMPTS, torch.arange(4), config, 17, "test", look, report)
    by_length = [1, 3, 0, 2]
    size = micro_batch_size
    assert [rows for rows, _ in reports] == [by_length[i : i + size] for i in range(0, 4, size)]
    for rows, completions in reports:
        assert completions == result.completions[rows].tolist()
    plain = generate(model, PROMPTS, torch.arange(4), CONFIGS["blocks"], 17, "test")
    assert torch.equal(result.completions, plain.completions)


@pytest.mark.parametrize("name", ["greedy", "blocks", "random"])
def test_confidence_is_the_mean_probability_of_tokens_when_they_are_committed(
    model: DiffusionModel, llama: LlamaForCausalLM, name: str
) -> None:
    """Told from the states after each step: every state predicts what the next one holds."""
    config, prompt = CONFIGS[name], PROMPTS[1]
    states = [torch.full((config.completion_length,), MASK)]
    result = generate(
        model, [prompt], torch.tensor([1]), config, 17, "test",
        lambda completions: states.append(completions[0].clone()),
    )  # fmt: skip
    probabilities = []
    for before, after in itertools.pairwise(states):
        probability = full_logits(llama, torch.cat((torch.tensor(prompt), before))).softmax(1)
        for i in (before != after).nonzero()[:, 0].tolist():
            probabilities.append(float(probability[len(prompt) + i, after[i]]))
    assert len(probabilities) == config.completion_length == int(result.num_committed[0])
    mean = sum(probabilities) / len(probabilities)
    assert float(result.mean_confidence[0]) == pytest.approx(mean, rel=1e-4)
    assert len(states) - 1 == int(result.num_evaluations[0]) == config.denoising_steps
    assert float(result.tokens_per_step[0]) == pytest.approx(
        config.completion_length / config.denoising_steps
    )


@pytest.mark.parametrize("rows_per_batch", [2, 4, 16])
def test_elbos_are_those_of_each_view_alone_in_the_order_of_the_sequences(
    model: DiffusionModel, rows_per_batch: int
) -> None:
    """Although the longest sequences are evaluated first, padded to the longest beside them."""
    ids, length = torch.arange(4), 6
    views = elbo_views("coupled", stream(4, "test"), ids, ids, 4, length, 2)
    packed = pack_sequences(PROMPTS, torch.arange(4 * length).view(4, length), 0, Shapes())
    masks, weights = views.mask_indices.flatten(0, 2), views.weights.flatten()
    alone = []
    for index in torch.arange(len(weights)).split(1):
        row = index // (len(weights) // 4)
        start = packed.prompt_lengths[row]
        batch = mask_rows(packed.tokens[row], start + length, masks[index], start, MASK, VOCAB)
        alone.append(ViewBatch(batch, index, weights[index]))
    batches = view_batches(packed, views, MASK, VOCAB, rows_per_batch, same_width=False)
    expected = elbo_of_views(model, alone, views)
    torch.testing.assert_close(elbo_of_views(model, batches, views), expected, rtol=1e-5, atol=1e-4)
    assert expected.mean(1).sort().values.diff().min() > 0.1


@pytest.mark.parametrize("estimator", ["coupled", "exact_count", "bernoulli"])
def test_elbo_estimate_converges_to_the_enumeration_of_all_masks(
    model: DiffusionModel, llama: LlamaForCausalLM, estimator: str
) -> None:
    """sum_l (1/l) E_{|S|=l} over all 15 masks of a completion of four tokens."""
    prompt, completion = PROMPTS[1], [8, 200, 31, 77]
    exact = 0.0
    for subset in range(1, 16):
        places = [i for i in range(4) if subset >> i & 1]
        x = torch.tensor(prompt + completion)
        for i in places:
            x[len(prompt) + i] = MASK
        logits = full_logits(llama, x)
        log_p = sum(log_probability(logits[len(prompt) + i], completion[i]) for i in places)
        exact += log_p / (len(places) * math.comb(4, len(places)))
    n, m = 16, 32
    draws = estimate_elbo(
        model, [prompt] * n, torch.tensor([completion] * n), estimator=estimator, num_mc=m,
        seed=2, rows_per_batch=256,
    ).draws.double()  # fmt: skip
    rows = draws.mean(1)
    error = float(draws.std() / math.sqrt(n * m))
    assert abs(float(rows.mean()) - exact) < 5 * error, (float(rows.mean()), exact, error)
    assert error < abs(exact) / 10
