"""Block diffusion: what tokens see, one pass for all blocks, noise by block, and its loss."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import mpu
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from test_lora_peft import fresh
from test_passes import build, logits_of
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from transformers import Qwen3ForCausalLM

from megatron_espo.config import DiffusionConfig
from megatron_espo.conversion import qwen3
from megatron_espo.conversion.families import FAMILIES
from megatron_espo.conversion.random_model import write_random_model
from megatron_espo.data.tokenizer import byte_tokenizer
from megatron_espo.diffusion.block_noise import block_noise, grown_size
from megatron_espo.errors import UserError
from megatron_espo.model import block_attention
from megatron_espo.model.attention import fused_attention
from megatron_espo.model.head import masked_cross_entropy
from megatron_espo.passes import block_mask, pipeline
from megatron_espo.passes.block_batch import block_rows
from megatron_espo.passes.block_mask import BlockAttention
from megatron_espo.passes.pipeline import RowBatch, padding_mask
from megatron_espo.random import stream
from megatron_espo.startup.arguments import initialize_arguments
from megatron_espo.startup.setup import build_model
from megatron_espo.supervised.forward_step import _loss, noise_batch

MASK = 256
SIZE, LENGTH = 4, 14  # the last block is not full
LENGTHS = torch.tensor([14, 9, 11])
STARTS = torch.tensor([0, 3, 6])
KINDS = {"block-causal": False, "context-causal": True}


def sees(query: int, key: int, causal: bool, copies: int) -> bool:
    """Say it anew, place by place, as the paper does: M_BD, M_OBC, and the clean tokens' mask."""
    (q_copy, q), (k_copy, k) = divmod(query, LENGTH), divmod(key, LENGTH)
    q_block, k_block = q // SIZE, k // SIZE
    if k_copy < copies:
        return q_copy == k_copy and q_block == k_block
    if q_copy < copies:
        return k_block < q_block
    return k <= q if causal else k_block <= q_block


@pytest.mark.parametrize("copies", [0, 1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_place_sees_what_the_definition_says(kind: str, copies: int) -> None:
    places = range((copies + 1) * LENGTH)
    attention = BlockAttention(SIZE, KINDS[kind]).with_copies(copies)
    hidden = attention.hidden(padding_mask(LENGTHS, LENGTH))
    for row, length in enumerate(LENGTHS.tolist()):
        expected = [
            [not sees(q, k, KINDS[kind], copies) or k % LENGTH >= length for k in places]
            for q in places
        ]
        assert hidden[row, 0].tolist() == expected
    assert not hidden.all(-1).any(), "a softmax over nothing"
    part = attention.hidden(padding_mask(LENGTHS, LENGTH), 5, 12)
    assert torch.equal(part, hidden[:, :, 5:12])


@pytest.fixture(scope="module")
def model(tokenizer: str) -> Any:
    """A model with norms of queries and keys, and heads of their own size."""
    return build(tokenizer, "--num-layers", "3", "--qk-layernorm", "--kv-channels", "12").train()


def masked_rows(copies: int, shift: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Clean tokens ``[R, L]``, and masks of the copies ``[R, K, c]`` and next tokens ``[R, c]``."""
    draws = torch.Generator().manual_seed(4)
    tokens = torch.randint(0, 256, (3, LENGTH), generator=draws)
    columns = LENGTH - int(STARTS.max())
    mask = torch.rand(3, copies, columns, generator=draws) < 0.6
    inside = STARTS[:, None] + torch.arange(columns)
    following = torch.rand(3, columns, generator=draws) < 0.5
    mask &= ((inside < LENGTHS[:, None]) & (inside >= int(shift)))[:, None]
    return tokens, mask, following & (inside < LENGTHS[:, None]) & (inside > 0)


def explicit(model: Any, tokens: Tensor, sees: Tensor, length: int) -> Tensor:
    """Megatron's own call with a mask: logits ``[s, n]`` of one row."""
    s = tokens.numel()
    hidden = ~sees | (torch.arange(s) >= length)
    logits: Tensor = model(tokens[None], torch.arange(s)[None], hidden[None, None])[0]
    return logits


def one_pass_per_block(
    model: Any, kind: str, tokens: Tensor, mask: Tensor, following: Tensor, shift: bool
) -> Tensor:
    """Logits of all predicted tokens, from passes over the clean tokens before a block and it."""
    found = []
    for row, copy, column in torch.cat((mask, following[:, None]), 1).nonzero().tolist():
        position = int(STARTS[row]) + column
        first = position // SIZE * SIZE
        clean = copy == mask.size(1)
        clean_end = LENGTH if clean or (shift and position == first) else first
        end = LENGTH if clean_end == LENGTH else min(first + SIZE, LENGTH)
        place = torch.arange(end)
        seen = place[:, None] // SIZE >= place // SIZE
        if KINDS[kind]:
            open_block = (place >= clean_end)[:, None]
            seen = torch.where(open_block, place < end, place[:, None] >= place)
        inputs = tokens[row].clone()
        if clean_end < LENGTH:
            masked = STARTS[row] + mask[row, copy].nonzero()[:, 0]
            inputs[masked[masked >= clean_end]] = MASK
        logits = explicit(model, inputs[:end], seen, int(LENGTHS[row]))
        found.append(logits[position - int(shift or clean)])
    return torch.stack(found)


def gradients(model: Any, logits: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(9))
    (logits * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recomputed", [False, True])
def test_one_pass_equals_one_pass_per_block(
    model: Any, kind: str, shift: bool, copies: int, recomputed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    tokens, mask, following = masked_rows(copies, shift)
    if kind == "block-causal":
        following[:] = False
    if recomputed:
        for name, value in (("granularity", "full"), ("method", "uniform"), ("num_layers", 1)):
            monkeypatch.setattr(model.config, f"recompute_{name}", value)
    if copies == 2:  # several segments, of which the last one is not full
        monkeypatch.setattr(block_mask, "_SEGMENT", 5)
        assert BlockAttention(SIZE, False).segments(LENGTH) == [(0, 8), (8, 14)]
    blocks = BlockAttention(SIZE, KINDS[kind])
    batch = block_rows(tokens, LENGTHS, mask, STARTS, MASK, 262, blocks, shift, following)
    assert batch.tokens.shape == (3, (copies + 1) * LENGTH)
    actual = logits_of(model, batch, shift)
    expected = one_pass_per_block(model, kind, tokens, mask, following, shift)
    assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()
    assert expected.abs().max() > 1
    wanted = gradients(model, expected)
    for name, gradient in gradients(model, logits_of(model, batch, shift)).items():
        assert (gradient - wanted[name]).abs().max() < 1e-5 * wanted[name].abs().max(), name
    # The table that the cross entropy goes to.
    assert batch.payload.targets.tolist() == [
        int(tokens[row, STARTS[row] + column])
        for row, _, column in torch.cat((mask, following[:, None]), 1).nonzero().tolist()
    ]
    assert batch.payload.num_rows == 3 * (copies + 1)


def test_rows_that_nothing_reads_are_left_out_under_blocks_too(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, mask, _ = masked_rows(1, False)
    batch = block_rows(tokens, LENGTHS, mask, STARTS, MASK, 262, BlockAttention(4, False), False)
    lean = logits_of(model, batch)
    monkeypatch.setattr(pipeline, "_select", lambda *_: None)
    torch.testing.assert_close(lean, logits_of(model, batch), atol=1e-5, rtol=1e-5)


def test_nothing_masked_gives_gradients_of_zero(model: Any) -> None:
    tokens, mask, _ = masked_rows(1, True)
    batch = block_rows(
        tokens, LENGTHS, mask & False, STARTS, MASK, 262, BlockAttention(4, True), True
    )
    assert batch.payload.is_dummy and logits_of(model, batch, True).shape[0] == 1
    assert not (batch.tokens == MASK).any()


def test_plain_rows_attend_by_blocks(model: Any) -> None:
    """Without noisy copies: a prompt's pass, whose clean states are those beside noisy copies."""
    tokens, mask, _ = masked_rows(1, False)
    rows, positions = torch.arange(3).repeat_interleave(9), torch.arange(9).repeat(3)
    for causal in KINDS.values():
        blocks = BlockAttention(SIZE, causal)
        plain = RowBatch(tokens, LENGTHS, rows, positions, blocks=blocks)
        beside = block_rows(tokens, LENGTHS, mask, STARTS, MASK, 262, blocks, False)
        beside = dataclasses.replace(beside, rows=rows, positions=positions + LENGTH, payload=None)
        expected = logits_of(model, beside)
        torch.testing.assert_close(logits_of(model, plain), expected, atol=1e-5, rtol=1e-5)
        full = dataclasses.replace(plain, blocks=None)
        assert (logits_of(model, full) - expected).abs().max() > 1e-2


# ---- noise


@pytest.mark.parametrize("process", ["bernoulli", "exact_count"])
def test_each_block_is_noised_at_a_level_of_its_own(process: Any) -> None:
    rows = 40_000
    ids = torch.arange(rows)
    maskable = torch.ones(rows, 10, dtype=torch.bool)
    maskable[:, :2] = False  # a prompt that ends inside a block
    noise = block_noise(process, stream(1, "test"), ids, maskable, 4, 0.1)
    assert not noise.mask_indices[:, :2].any()
    counts = [part.sum(1).double() for part in noise.mask_indices.split(4, dim=1)]
    first, second, third = counts
    # Levels are uniform, so that counts are, too (of exact_count from 1 on).
    if process == "exact_count":
        for count, most in ((first, 2), (second, 4), (third, 2)):
            share = torch.bincount(count.long(), minlength=most + 1) / rows
            assert share[0] == 0
            assert (share[1:] - 1 / most).abs().max() < 0.015
            # L / l, the same for all of a block.
        weights = noise.weights[:, 4] * second
        assert torch.equal(weights.round(), torch.full_like(weights, 4.0))

    # Blocks are independent of each other, and tokens of one are not.
    def correlation(a: Tensor, b: Tensor) -> float:
        return float(torch.corrcoef(torch.stack((a, b)))[0, 1])

    assert abs(correlation(second, third)) < 0.03
    masked = noise.mask_indices.double()
    # Of exact counts 1/9, of uniform levels 1/3.
    assert correlation(masked[:, 4], masked[:, 5]) > 0.09
    # A weighted count is unbiased: 1 for each maskable token.
    mean = (noise.mask_indices * noise.weights).double().mean(0)
    assert (mean[2:] - 1).abs().max() < 0.05


def test_noise_of_a_row_does_not_depend_on_its_width() -> None:
    ids, maskable = torch.arange(5), torch.ones(5, 12, dtype=torch.bool)
    key = stream(1, "test")
    for process in ("bernoulli", "exact_count"):
        whole = block_noise(process, key, ids, maskable, 4)
        part = block_noise(process, key, ids[1:3], maskable[1:3, :8], 4)
        assert torch.equal(part.mask_indices, whole.mask_indices[1:3, :8])
        assert torch.equal(part.weights, whole.weights[1:3, :8])


# ---- the loss


TINY = {
    "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 8,
    "num_query_groups": 4, "vocab_size": 300, "max_position_embeddings": 128,
    "mask_token_id": 256, "eos_token_id": 257, "kv_channels": 12,
}  # fmt: skip


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_blocks_of_one_token_with_the_shift_are_the_autoregressive_model(
    tokenizer: str, tmp_path: Path, weight: float
) -> None:
    """transformers' own loss of the next token; its gradient, too, of one weight."""
    shape = dataclasses.replace(qwen3.PUBLISHED, **TINY)
    folder = tmp_path / "qwen3"
    write_random_model(folder, FAMILIES["qwen3"], shape, torch.float32, byte_tokenizer(), std=0.2)
    fresh()
    settings = f"--attention-mask context-causal --block-size 1 --next-token-weight {weight}"
    args = initialize_arguments(
        [
            *(*shape.flags(), *settings.split(), "--tokenizer-model", tokenizer),
            *"--micro-batch-size 1 --train-iters 1 --lr 0 --seq-length 16".split(),
        ],
        lambda args: None,
    )
    mpu.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    ours = build_model()
    theirs = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        copy_weights(theirs, ours)
    tokens = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(3))
    expected = theirs(input_ids=tokens, labels=tokens).loss

    config = DiffusionConfig(
        logit_shift=args.logit_shift, attention_mask="context-causal", block_size=1,
        forward_process="exact_count", random_length_probability=0.0, next_token_weight=weight,
    )  # fmt: skip
    config.validate()
    data = {"tokens": tokens, "sample_id": torch.arange(2)}
    batch, noise, maskable = noise_batch(data, config, stream(1, "test"), MASK, 300)
    head = masked_cross_entropy(mpu.get_tensor_model_parallel_group())
    table = pipeline.run_model(ours, batch, head, config.logit_shift)
    loss, report = _loss(
        table, noise=noise, lengths=maskable.sum(1), cp_size=1, next_tokens=weight > 0
    )
    assert abs(loss / (1 + weight) - expected) < 1e-6 * expected
    terms = {name: float(summed / rows) for name, (summed, rows) in report.items()}
    named = {"lm loss": (1 + weight) * float(expected)}
    if weight:
        named |= {name: float(expected) for name in ("diffusion loss", "next-token loss")}
    assert terms == pytest.approx(named, rel=1e-6)
    loss.backward()
    expected.backward()
    gradient = ours.decoder.layers[0].self_attention.q_layernorm.weight.grad / (1 + weight)
    wanted = theirs.model.layers[0].self_attn.q_norm.weight.grad
    assert (gradient - wanted).abs().max() < 1e-5 * wanted.abs().max()


def copy_weights(theirs: torch.nn.Module, ours: Any) -> None:
    """Give Megatron's model the folder's weights, by names and packing written here anew."""
    source = dict(theirs.named_parameters())
    names = {
        "input_layernorm": "input_layernorm", "pre_mlp_layernorm": "post_attention_layernorm",
        "self_attention.q_layernorm": "self_attn.q_norm",
        "self_attention.k_layernorm": "self_attn.k_norm",
        "self_attention.linear_proj": "self_attn.o_proj", "mlp.linear_fc2": "mlp.down_proj",
    }  # fmt: skip
    for name, weight in ours.named_parameters():
        if not name.startswith("decoder.layers."):
            key = {"embedding": "model.embed_tokens", "decoder": "model.norm"}.get(
                name.split(".")[0], "lm_head"
            )
            found = source[f"{key}.weight"]
            weight[: found.size(0)].copy_(found)
            continue
        _, _, layer, rest = name.split(".", 3)
        prefix, part = f"model.layers.{layer}.", rest.removesuffix(".weight")
        if part == "self_attention.linear_qkv":
            parts = [source[f"{prefix}self_attn.{p}_proj.weight"] for p in "qkv"]
            groups = [p.unflatten(0, (TINY["num_query_groups"], -1)) for p in parts]
            weight.copy_(torch.cat(groups, dim=1).flatten(0, 1))
        elif part == "mlp.linear_fc1":
            both = [source[f"{prefix}mlp.{p}_proj.weight"] for p in ("gate", "up")]
            weight.copy_(torch.cat(both))
        else:
            weight.copy_(source[f"{prefix}{names[part]}.weight"])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"attention_mask": "block-causal"}, "--attention-mask block-causal needs --block-size"),
        ({"attention_mask": "block-causal", "block_size": 0}, "--block-size 0 must be at least 1"),
        ({"block_size": 4}, "--block-size 4 has no effect without --attention-mask"),
        ({"attention_mask": "full", "block_size": 4}, "--block-size 4 has no effect"),
        ({"next_token_weight": 0.5}, "--next-token-weight 0.5 has no effect without"),
        ({"next_token_weight": -1.0}, "--next-token-weight -1.0 must not be negative"),
        ({"attention_mask": "block-causal", "block_size": 4, "next_token_weight": 0.5},
         "has no effect without --attention-mask context-causal"),
    ],
)  # fmt: skip
def test_settings_without_sense_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        DiffusionConfig(**settings).validate()
    DiffusionConfig(attention_mask="context-causal", block_size=8, next_token_weight=0.5).validate()


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_for_blocks_give_masked_attention(
    kind: str, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Segments of PyTorch's kernel, and flex_attention (here without its compiler)."""
    monkeypatch.setattr(block_mask, "_SEGMENT", 5)
    draws, s = torch.Generator().manual_seed(2), (copies + 1) * LENGTH
    query = torch.randn(s, 3, 4, 8, generator=draws)
    key, value = torch.randn(2, 3, 2, s, 8, generator=draws)
    blocks = BlockAttention(SIZE, KINDS[kind]).with_copies(copies)
    hidden = blocks.hidden(padding_mask(LENGTHS, LENGTH))
    expected = fused_attention(query, key, value, hidden)
    rows = (query, key, value, hidden, blocks, None)
    for output in (
        block_attention.attend_in_parts(*rows, 0.0),
        block_attention.attend_sparsely(*rows, flex_attention),
    ):
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    # What is counted is what the segments compute: no more than all, no less than is seen.
    assert (~hidden[0]).sum() <= blocks.pairs(LENGTH) < s * s


def test_blocks_grow_by_the_published_schedule() -> None:
    for first, largest, factor, interval, start in ((1, 32, 2, 500, 0), (2, 20, 3, 7, 11)):
        for step in range(0, 4000, 3):
            grown = first * factor ** math.floor(max(0, step - start) / interval)
            expected = min(largest, grown)
            assert grown_size(first, largest, factor, interval, start, step) == expected
    assert grown_size(1, 32, 2, 1, 0, 10**9) == 32


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"block_growth_interval": 5}, "have no effect without --block-growth-to"),
        ({"block_growth_to": 2, "block_growth_interval": 5}, "--block-growth-to 2 is below"),
        ({"block_growth_to": 32}, "--block-growth-to 32 needs --block-growth-interval"),
        ({"block_growth_to": 32, "block_growth_interval": 5, "block_growth_factor": 1},
         "--block-growth-factor 1 must be at least 2"),
        ({"attention_mask": "full", "block_size": None, "block_growth_to": 32},
         "--block-growth-to 32 has no effect without --attention-mask"),
    ],
)  # fmt: skip
def test_growth_without_sense_is_refused(settings: dict[str, Any], sentence: str) -> None:
    given = {"attention_mask": "context-causal", "block_size": 4, **settings}
    with pytest.raises(UserError, match=sentence):
        DiffusionConfig(**given).validate()
