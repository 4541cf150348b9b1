"""The model and the sampler against an independent pair: transformers' Llama with a full attention
mask, and the published sampling rules written out for one unpadded row at a time."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.training.global_vars import destroy_global_vars
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_espo.arguments import initialize_arguments
from megatron_espo.config import RolloutConfig
from megatron_espo.data.tokenizer import byte_tokenizer, save_tokenizer
from megatron_espo.generation.sampler import generate
from megatron_espo.model.handle import DiffusionModel
from megatron_espo.model.provider import model_provider
from megatron_espo.random import stream, uniform
from megatron_espo.rl.elbo import estimate_elbo
from megatron_espo.training.setup import diffusion_model

VOCAB, MASK = 262, 256
PROMPTS = [[5, 7, 11], [3, 1, 4, 1, 5, 9, 2], [100], [42, 42, 17, 250, 0]]


@pytest.fixture(scope="module")
def model(one_rank: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DiffusionModel]:
    folder = tmp_path_factory.mktemp("model") / "tokenizer"
    save_tokenizer(byte_tokenizer(), folder)
    destroy_global_vars()
    unset_num_microbatches_calculator()
    argv = (
        "--preset tiny --num-layers 2 --group-query-attention --num-query-groups 2 "
        "--make-vocab-size-divisible-by 8 --init-method-std 0.3 --seq-length 64 "
        f"--micro-batch-size 1 --train-iters 1 --tokenizer-model {folder}"
    )
    initialize_arguments(argv.split(), lambda args: None)
    mpu.initialize_model_parallel()
    model_parallel_cuda_manual_seed(3)
    torch.manual_seed(3)
    chunk = model_provider()
    with torch.no_grad():
        for parameter in chunk.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    yield diffusion_model([chunk.eval()])
    mpu.destroy_model_parallel()
    destroy_global_vars()
    unset_num_microbatches_calculator()


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


def sample_by_the_rules(
    llama: LlamaForCausalLM, prompt: list[int], row: int, config: RolloutConfig, seed: int
) -> list[int]:
    """LLaDA's sampler for one row, position by position."""
    length, k = config.completion_length, config.block_length
    steps = config.denoising_steps // (length // k)
    x = torch.tensor(prompt + [MASK] * length)
    for block in range(length // k):
        noise = uniform(stream(seed, "token/test", block), torch.tensor([row]), 2 * steps * k)
        noise = noise.view(steps, 2, k)
        places = [len(prompt) + block * k + i for i in range(k)]
        for step in range(steps):
            logits = full_logits(llama, x)
            if config.guidance_scale:
                hidden = x.clone()
                hidden[: len(prompt)] = MASK
                un = full_logits(llama, hidden)
                logits = un + (config.guidance_scale + 1) * (logits - un)
            candidates = {}
            for i, place in enumerate(places):
                if x[place] != MASK:
                    continue
                allowed = logits[place].clone()
                allowed[MASK] = -math.inf
                if config.temperature == 0:
                    token = int(allowed.argmax())
                else:
                    cdf = (allowed / config.temperature).softmax(0).cumsum(0)
                    token = int((cdf <= noise[step, 0, i]).sum())
                if config.remasking == "random":
                    score = float(noise[step, 1, i])
                else:
                    score = log_probability(logits[place], token)
                candidates[place] = (score, token)
            # n // s per step, the remainder to the early ones.
            count = k // steps + (step < k % steps)
            best = sorted(candidates, key=lambda place: -candidates[place][0])[:count]
            for place in best:
                x[place] = candidates[place][1]
    return x[len(prompt) :].tolist()


CONFIGS = {
    "greedy": RolloutConfig(12, 12, 5, 0.0),
    "blocks": RolloutConfig(12, 4, 6, 1.0),
    "cold": RolloutConfig(12, 6, 12, 0.3),
    "random": RolloutConfig(12, 4, 6, 1.0, "random"),
    "guidance": RolloutConfig(8, 4, 4, 1.0, "low_confidence", 0.7),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_sampler_follows_the_written_rules(
    model: DiffusionModel, llama: LlamaForCausalLM, name: str
) -> None:
    """Batched with right padding, the tokens are those of each row alone under the rules."""
    config = CONFIGS[name]
    result = generate(model, PROMPTS, torch.arange(len(PROMPTS)), config, 17, "test")
    assert result.num_evaluations.tolist() == [config.denoising_steps] * len(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        expected = sample_by_the_rules(llama, prompt, row, config, 17)
        assert result.completions[row].tolist() == expected, row
    assert MASK not in result.completions


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


def test_elbo_of_a_sequence_does_not_depend_on_the_other_lengths_of_its_batch(
    model: DiffusionModel,
) -> None:
    """Reported in the caller's order, although the longest sequences are evaluated first."""
    completions = torch.arange(4 * 6).view(4, 6)
    draws = {
        rows: estimate_elbo(
            model, PROMPTS, completions, num_mc=2, seed=4, rows_per_batch=rows
        ).draws
        for rows in (2, 4, 16)
    }
    # One padded batch of all, in which nothing is sorted out, is the slow way to the same numbers.
    torch.testing.assert_close(draws[2], draws[16], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(draws[4], draws[16], rtol=1e-5, atol=1e-4)
    assert len({round(float(x)) for x in draws[16].flatten()}) > 4


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
