"""Passes that compute less: rows that the last layer leaves out, windows with a key/value cache."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core import mpu
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron_state import new_groups
from torch import Tensor

from megatron_espo import device
from megatron_espo.model.cpu import feed_forward, linear, matmul, rotary
from megatron_espo.model.provider import model_provider
from megatron_espo.passes import pipeline
from megatron_espo.passes.pipeline import RowBatch, run_model
from megatron_espo.passes.state import KeyValueCache, select_positions
from megatron_espo.startup.arguments import initialize_arguments
from megatron_espo.startup.setup import start_anew

FLAGS = (
    "--preset tiny --hidden-size 32 --ffn-hidden-size 48 --group-query-attention "
    "--num-query-groups 2 --make-vocab-size-divisible-by 8 --init-method-std 0.3 --seq-length 64 "
    "--max-position-embeddings 64 --micro-batch-size 1 --train-iters 1"
)
S = 24
LENGTHS = torch.tensor([24, 17, 20])


def build(tokenizer: str, *flags: str) -> torch.nn.Module:
    start_anew()
    argv = [*FLAGS.split(), "--tokenizer-model", tokenizer, *flags]
    initialize_arguments(argv, lambda args: None)
    if not mpu.model_parallel_is_initialized():
        new_groups()
    model_parallel_cuda_manual_seed(3)
    torch.manual_seed(3)
    return model_provider()


@pytest.fixture(scope="module")
def deep(tokenizer: str) -> torch.nn.Module:
    return build(tokenizer, "--num-layers", "3")


@pytest.fixture(scope="module", params=["rope", "learned_absolute"])
def shallow(tokenizer: str, request: pytest.FixtureRequest) -> torch.nn.Module:
    return build(tokenizer, "--num-layers", "1", "--position-embedding-type", request.param).eval()


def random_batch(rows: Sequence[int], positions: Sequence[int]) -> RowBatch:
    tokens = torch.randint(0, 256, (3, S), generator=torch.Generator().manual_seed(1))
    return RowBatch(tokens, LENGTHS, torch.tensor(rows), torch.tensor(positions))


UNEVEN = random_batch([0, 0, 0, 2, 2, 2, 2, 2], [3, 9, 23, 1, 2, 3, 12, 19])


def logits_of(model: torch.nn.Module, batch: RowBatch, shift: bool = False) -> Tensor:
    return run_model(model, batch, lambda logits, _: logits, shift)


def logits_and_gradients(model: torch.nn.Module, shift: bool = False) -> dict[str, Tensor]:
    """Logits and, by the parameters' names, gradients of a function of them."""
    model.zero_grad()
    logits = logits_of(model.train(), UNEVEN, shift)
    (logits.sin() * torch.arange(1.0, 9.0)[:, None]).sum().backward()
    return {"logits": logits.detach(), **{n: p.grad for n, p in model.named_parameters()}}


@pytest.mark.parametrize("shift", [False, True])
def test_leaving_out_rows_changes_neither_logits_nor_gradients(
    deep: torch.nn.Module, shift: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lean = logits_and_gradients(deep, shift)
    monkeypatch.setattr(pipeline, "_select", lambda *_: None)
    full = logits_and_gradients(deep, shift)
    torch.testing.assert_close(lean["logits"], full.pop("logits"), atol=1e-5, rtol=1e-5)
    for name, gradient in full.items():
        scale = gradient.abs().max()
        assert scale > 0, name
        assert (lean[name] - gradient).abs().max() <= 1e-5 * scale, name


def test_rotation_gives_megatrons_logits_and_gradients(
    deep: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, calls = logits_and_gradients(deep), []
    rotate = rotary.rotate
    monkeypatch.setattr(rotary, "rotate", lambda *args: calls.append(1) or rotate(*args))
    again = logits_and_gradients(deep)
    assert torch.equal(again["logits"], ours["logits"]) and len(calls) == 2 * 3
    monkeypatch.setattr(rotary.RotatingSelfAttention, "_is_handled", lambda *_: False)
    for name, expected in logits_and_gradients(deep).items():
        assert (ours[name] - expected).abs().max() <= 1e-5 * expected.abs().max(), name
    assert len(calls) == 2 * 3


def test_feed_forward_and_plain_products_give_megatrons_logits_and_gradients(
    deep: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    gated, plain = [], []
    gate, multiply = feed_forward.swiglu, linear.multiply
    monkeypatch.setattr(feed_forward, "swiglu", lambda *args: gated.append(1) or gate(*args))
    monkeypatch.setattr(
        linear, "multiply", lambda *args, **kw: plain.append(1) or multiply(*args, **kw)
    )
    ours = logits_and_gradients(deep)
    assert (len(gated), len(plain)) == (3, 0)
    monkeypatch.setattr(feed_forward.GatedFeedForward, "_is_handled", lambda *_: False)
    for module in deep.modules():
        if isinstance(module, linear.ColumnParallelLinear | linear.RowParallelLinear):
            monkeypatch.setattr(module, "_is_plain", False)
    for name, expected in logits_and_gradients(deep).items():
        assert torch.equal(ours[name], expected), name
    assert (len(gated), len(plain)) == (3, 3 * 4)


def test_gradients_are_added_to_megatrons_buffers_where_there_are_some(
    deep: torch.nn.Module,
) -> None:
    plain = logits_and_gradients(deep)
    try:
        for parameter in deep.parameters():
            parameter.main_grad = torch.full_like(parameter, 0.5)
            parameter.grad_added_to_main_grad = False
        ours, added = logits_and_gradients(deep), set()
        for name, parameter in deep.named_parameters():
            if parameter.grad_added_to_main_grad:
                added.add(name)
                # What autograd gets takes no memory.
                assert ours[name].data_ptr() == parameter.data_ptr()
                ours[name] = parameter.main_grad - 0.5
        for name, expected in plain.items():
            difference = (ours[name] - expected).abs().max()
            assert difference <= 1e-5 * expected.abs().max(), name
        assert added == {name for name in plain if name.endswith("weight") and "norm" not in name}
    finally:
        for parameter in deep.parameters():
            del parameter.main_grad, parameter.grad_added_to_main_grad


@pytest.mark.parametrize(
    ("setting", "value"), [("glu_linear_offset", 1.0), ("activation_func_clamp_value", 0.01)]
)
def test_other_feed_forward_parts_are_left_to_megatron(
    deep: torch.nn.Module, setting: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = logits_of(deep.eval(), UNEVEN)
    monkeypatch.setattr(deep.config, setting, value)
    monkeypatch.setattr(feed_forward, "swiglu", None)
    assert (logits_of(deep, UNEVEN) - plain).abs().max() > 1e-3


def test_a_bias_is_left_to_megatron(tokenizer: str) -> None:
    model = build(tokenizer, "--num-layers", "1", "--add-qkv-bias").eval()
    plain = logits_of(model, UNEVEN)
    with torch.no_grad():
        model.decoder.layers[0].self_attention.linear_qkv.bias.uniform_(-1, 1)
    assert (logits_of(model, UNEVEN) - plain).abs().max() > 1e-3


def test_weights_are_left_factors_only_where_tokens_are_sampled(
    deep: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere a pass without gradients would round otherwise than one with them."""
    monkeypatch.setattr(matmul, "_has_avx512", lambda: False)
    monkeypatch.setattr(matmul, "_LEFT_WEIGHT", 1)
    strides: list[bool] = []
    hooks = [
        layer.mlp.linear_fc1.register_forward_hook(
            lambda module, args, output: strides.append(output[0].is_contiguous())
        )
        for layer in deep.decoder.layers
    ]
    with torch.no_grad():
        plain = logits_of(deep.eval(), UNEVEN)
        sampling = logits_of(deep, replace(UNEVEN, sampling=True))
    for hook in hooks:
        hook.remove()
    assert strides == [True] * 3 + [False] * 3
    torch.testing.assert_close(sampling, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "flags",
    ["--rotary-percent 0.5", "--rotary-interleaved", "--position-embedding-type none"],
)
def test_other_rotations_are_left_to_megatron(
    tokenizer: str, flags: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rotary, "rotate", None)
    assert logits_of(build(tokenizer, "--num-layers", "1", *flags.split()), UNEVEN).isfinite().all()


def test_layers_run_without_a_look_at_each_call_and_give_the_same(
    deep: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    look = device._CudaOnCpu.__torch_function__

    def counted(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        calls.append(func)
        return look(self, func, types, args, kwargs)

    monkeypatch.setattr(device._CudaOnCpu, "__torch_function__", counted)
    unwatched, few = logits_of(deep.eval(), UNEVEN), len(calls)
    for module in (deep.decoder, deep.output_layer):
        monkeypatch.delitem(module.__dict__, "forward")
    calls.clear()
    assert torch.equal(logits_of(deep, UNEVEN), unwatched)
    assert few < 100 < 300 < len(calls)


def test_last_layer_computes_just_the_rows_that_are_read(deep: torch.nn.Module) -> None:
    seen: list[torch.Size] = []
    hooks = [
        layer.mlp.register_forward_hook(lambda module, args, output: seen.append(args[0].shape))
        for layer in deep.decoder.layers
    ]
    logits_of(deep.eval(), UNEVEN)
    for hook in hooks:
        hook.remove()
    assert [tuple(shape) for shape in seen] == [(S, 3, 32), (S, 3, 32), (8, 1, 32)]


def test_full_recomputation_keeps_all_rows_and_gives_the_same_logits(
    deep: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    lean = logits_of(deep.train(), UNEVEN)
    config: Any = deep.config
    monkeypatch.setattr(config, "recompute_granularity", "full")
    monkeypatch.setattr(config, "recompute_method", "uniform")
    monkeypatch.setattr(config, "recompute_num_layers", 1)
    full = logits_of(deep, UNEVEN)
    torch.testing.assert_close(lean, full, atol=1e-5, rtol=1e-5)
    deep.zero_grad()
    full.sum().backward()
    assert deep.decoder.layers[2].mlp.linear_fc1.weight.grad.abs().sum() > 0


def test_selected_rows_are_filled_up_to_the_multiple() -> None:
    rows, places = torch.tensor([0, 0, 2]), torch.tensor([4, 1, 0])
    selected = select_positions(
        rows, places, num_rows=3, per_row=2, multiple=4, sequence_group=None
    )
    hidden = torch.arange(15.0).view(5, 3, 1)  # [w, b, h]: entry 3 w + b
    assert selected.of_hidden(hidden).flatten().tolist() == [12, 3, 2, 12]
    queries = selected.of_queries(hidden[..., None])
    assert queries[..., 0, 0].tolist() == [[12, 1, 2], [3, 1, 2]]
    assert selected.of_attention(queries.flatten(2)).flatten().tolist() == [12, 3, 2, 12]


def window(batch: RowBatch, offsets: Sequence[int], width: int, cache: KeyValueCache) -> RowBatch:
    """Cut a window out of each row; reads the first and last position of each."""
    starts = torch.tensor(offsets)
    index = starts[:, None] + torch.arange(width)
    positions = torch.stack((starts + 1, starts + width - 1), dim=1)
    return replace(
        batch,
        tokens=batch.tokens.gather(1, index),
        rows=torch.arange(len(offsets)).repeat_interleave(2),
        positions=positions.flatten(),
        cache=cache,
        offsets=starts,
    )


OFFSETS, WIDTH = [16, 3, 11], 7


@torch.no_grad()
@pytest.mark.parametrize("shift", [False, True])
def test_window_of_unchanged_tokens_equals_the_full_pass(
    deep: torch.nn.Module, shift: bool
) -> None:
    cache = KeyValueCache()
    logits_of(deep.eval(), replace(UNEVEN, cache=cache), shift)
    part = window(UNEVEN, OFFSETS, WIDTH, cache)
    full = replace(UNEVEN, rows=part.rows, positions=part.positions)
    torch.testing.assert_close(
        logits_of(deep, part, shift), logits_of(deep, full, shift), atol=1e-5, rtol=1e-5
    )


@torch.no_grad()
def test_window_of_changed_tokens_is_exact_where_one_layer_makes_keys_local(
    shallow: torch.nn.Module,
) -> None:
    cache = KeyValueCache()
    logits_of(shallow, replace(UNEVEN, cache=cache))
    tokens = UNEVEN.tokens.clone()
    for row, start in enumerate(OFFSETS):
        tokens[row, start : start + WIDTH] = torch.arange(40, 40 + WIDTH) + row
    part = window(replace(UNEVEN, tokens=tokens), OFFSETS, WIDTH, cache)
    full = replace(UNEVEN, tokens=tokens, rows=part.rows, positions=part.positions)
    expected = logits_of(shallow, full)
    torch.testing.assert_close(logits_of(shallow, part), expected, atol=1e-5, rtol=1e-5)
    # The window's keys and values stay: another window sees the new tokens.
    other = window(replace(UNEVEN, tokens=tokens), [2, 12, 2], 4, cache)
    full = replace(full, rows=other.rows, positions=other.positions)
    expected = logits_of(shallow, full)
    torch.testing.assert_close(logits_of(shallow, other), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_some_rows_of_a_cache_are_filled_and_used_alone(deep: torch.nn.Module) -> None:
    cache = KeyValueCache()
    deep.eval()
    stale = replace(UNEVEN, tokens=torch.zeros_like(UNEVEN.tokens), cache=cache)
    logits_of(deep, stale)
    some = torch.tensor([2, 0])
    batch = replace(
        random_batch([0, 1], [5, 6]),
        tokens=UNEVEN.tokens[some],
        lengths=LENGTHS[some],
        cache=cache,
        cache_rows=some,
    )
    logits_of(deep, batch)
    part = window(batch, [OFFSETS[i] for i in some.tolist()], WIDTH, cache)
    full = replace(part, tokens=batch.tokens, cache=None, offsets=None, cache_rows=None)
    torch.testing.assert_close(logits_of(deep, part), logits_of(deep, full), atol=1e-5, rtol=1e-5)
