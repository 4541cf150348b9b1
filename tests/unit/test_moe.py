"""Mixtures of experts on one rank: what is refused, counted, logged, and how passes agree."""

import math
from argparse import Namespace
from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from test_passes import OFFSETS, UNEVEN, WIDTH, build, logits_of, random_batch, window
from torch import Tensor

from megatron_espo.adapters.attach import attach_adapters, is_adapter
from megatron_espo.config import LoraConfig
from megatron_espo.conversion import llada2, llada_moe
from megatron_espo.conversion.mapping import model_blocks
from megatron_espo.errors import UserError
from megatron_espo.model import experts
from megatron_espo.model.shape import ModelShape
from megatron_espo.monitor.flops import ModelDimensions, forward_flops
from megatron_espo.passes.state import KeyValueCache, RoutingLog
from megatron_espo.rl.reference import ReferencePolicy
from megatron_espo.simulate.experts import balance_experts

LLADA2 = (
    "--num-layers 3 --qk-layernorm --kv-channels 16 --rotary-percent 0.5 --num-experts 8 "
    "--moe-layer-freq [0]+[1]*2 --moe-ffn-hidden-size 24 --moe-shared-expert-intermediate-size 24 "
    "--moe-router-topk 4 --moe-router-score-function sigmoid --moe-router-enable-expert-bias "
    "--moe-router-num-groups 4 --moe-router-group-topk 2 --moe-router-topk-scaling-factor 2.5"
).split()
AUXILIARY = "--moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 0.1".split()


@pytest.fixture(scope="module")
def model(tokenizer: str) -> torch.nn.Module:
    made = build(tokenizer, *LLADA2)
    with torch.no_grad():
        for router in routers(made):
            router.expert_bias.copy_(0.3 * torch.randn(8))
    return made


def routers(model: torch.nn.Module) -> list[Any]:
    return [layer.mlp.router for layer in model.decoder.layers if hasattr(layer.mlp, "router")]


def settings(**changed: Any) -> Namespace:
    """LLaDA2.0-mini's settings of experts, as parsed."""
    return Namespace(
        **{
            "num_experts": 256, "num_layers": 4, "moe_layer_freq": [0, 1, 1, 1],
            "moe_router_topk": 8, "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True, "moe_router_num_groups": 8,
            "moe_router_group_topk": 4, "moe_grouped_gemm": False, "transformer_impl": "local",
            "add_bias_linear": False, "expert_model_parallel_size": 1,
            "expert_tensor_parallel_size": None, "tensor_model_parallel_size": 1,
            "pipeline_model_parallel_size": 1, "context_parallel_size": 1, "world_size": 8,
            "sequence_parallel": False, "num_layers_per_virtual_pipeline_stage": None,
            "moe_ffn_hidden_size": 512, "ffn_hidden_size": 5120,
            "moe_shared_expert_intermediate_size": 512, "lora_rank": None,
            "moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0,
            "moe_token_dispatcher_type": "alltoall", "moe_router_bias_update_rate": 1e-3,
            **changed,
        }
    )  # fmt: skip


REFUSED = {
    "the best 2 scores": {"moe_router_group_topk": 2},
    "pass both or none": {"moe_router_group_topk": None},
    "another order": {"moe_router_group_topk": None, "moe_router_num_groups": None},
    "cannot be split into --moe-router-num-groups 7": {"moe_router_num_groups": 7},
    "exceeds --num-experts": {"moe_router_topk": 300},
    "must hold 0 or 1 for each of --num-layers 4": {"moe_layer_freq": [0, 1]},
    "is added to sigmoids": {"moe_router_score_function": "softmax"},
    "needs --transformer-impl transformer_engine": {"moe_grouped_gemm": True},
    "not divisible by --expert-model-parallel-size 3": {"expert_model_parallel_size": 3},
    "add --sequence-parallel": {"tensor_model_parallel_size": 2},
    "cannot be split into --expert-model-parallel-size 16": {"expert_model_parallel_size": 16},
    "pass --disable-bias-linear": {"add_bias_linear": True},
    "the model has no experts": {"num_experts": None, "expert_model_parallel_size": 2},
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_settings_that_do_not_fit_are_refused_in_a_sentence(sentence: str) -> None:
    experts.settle_experts(settings())
    with pytest.raises(UserError) as refusal:
        experts.settle_experts(settings(**REFUSED[sentence]))
    assert sentence in str(refusal.value).replace("best 2 scores", "the best 2 scores")


def test_a_policys_routers_stay_and_have_no_loss_of_their_own() -> None:
    args = settings()
    experts.settle_policy(args)
    assert args.moe_router_bias_update_rate == 0.0
    balanced = {"moe_router_load_balancing_type": ["aux_loss"], "moe_aux_loss_coeff": [0.1]}
    with pytest.raises(UserError, match="--moe-aux-loss-coeff is a loss of pre-training"):
        experts.settle_policy(settings(**balanced))
    gathered = {"moe_token_dispatcher_type": "allgather", "expert_model_parallel_size": 2}
    with pytest.raises(UserError, match="ESPO has rows of different lengths: use alltoall"):
        experts.settle_policy(settings(**gathered))


def test_cached_windows_and_left_out_rows_agree_with_whole_passes(model: torch.nn.Module) -> None:
    model.eval()
    cache = KeyValueCache()
    with torch.no_grad():
        whole = logits_of(model, UNEVEN)
        every = random_batch(*zip(*[(r, p) for r in range(3) for p in range(24)], strict=True))
        full = logits_of(model, every).view(3, 24, -1)
        logits_of(model, replace(UNEVEN, cache=cache))
        inside = window(UNEVEN, OFFSETS, WIDTH, cache)
        again = logits_of(model, inside)
    torch.testing.assert_close(whole, full[UNEVEN.rows, UNEVEN.positions], atol=1e-5, rtol=1e-5)
    places = inside.rows, inside.positions
    torch.testing.assert_close(again, full[places], atol=1e-5, rtol=1e-5)


def test_every_token_but_padding_is_counted_once_in_every_layer(model: torch.nn.Module) -> None:
    for recompute in (None, "full"):
        model.config.recompute_granularity = recompute
        model.config.recompute_method, model.config.recompute_num_layers = "uniform", 1
        for router in routers(model):
            router.local_tokens_per_expert.zero_()
        logits_of(model.train(), UNEVEN).sum().backward()
        with torch.no_grad():
            logits_of(model, UNEVEN)
        for router in routers(model):
            assert router.local_tokens_per_expert.sum() == 4 * UNEVEN.lengths.sum()
    model.config.recompute_granularity = None


def test_the_auxiliary_loss_of_a_row_does_not_depend_on_those_beside_it(tokenizer: str) -> None:
    """The gradient of three rows is the mean of that of each, and that of the written-out loss."""
    model = build(tokenizer, *LLADA2, *AUXILIARY)

    def gradient(*rows: int) -> Tensor:
        model.zero_grad()
        chosen, most = torch.tensor(rows), int(UNEVEN.lengths[list(rows)].max())
        batch = replace(
            UNEVEN, tokens=UNEVEN.tokens[chosen, :most], lengths=UNEVEN.lengths[chosen],
            rows=torch.zeros(1).long(), positions=torch.ones(1).long(),
        )  # fmt: skip
        (0.0 * logits_of(model.train(), batch)).sum().backward()
        found: Tensor = routers(model)[0].weight.grad
        return found

    alone = torch.stack([gradient(row) for row in range(3)]).mean(0)
    together = gradient(0, 1, 2)
    assert together.abs().max() > 1e-3
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-4)


def test_the_balance_of_a_row_is_that_of_the_paper(model: torch.nn.Module) -> None:
    router, (s, b, e, k) = routers(model)[0], (5, 2, 8, 4)
    scores = torch.rand(s, b, e, dtype=torch.float64).requires_grad_()
    lengths = torch.tensor([5, 3])
    valid = (torch.arange(s)[:, None] < lengths)[..., None]
    chosen = torch.zeros(s, b, e).scatter(2, torch.rand(s, b, e).topk(k, dim=2).indices, 1) * valid
    seen = []
    router.routing_type, router.config.moe_aux_loss_coeff = "seq_aux_loss", 0.3
    router.attach_and_log_load_balancing_loss = lambda *args, **_: seen.append(args[2])
    try:
        router._apply_seq_aux_loss(scores, (scores * valid).flatten(0, 1),
                                   chosen.flatten(0, 1), s, b)  # fmt: skip
    finally:
        router.routing_type, router.config.moe_aux_loss_coeff = "none", 0.0
        del router.attach_and_log_load_balancing_loss
    expected = 0.0
    for row, length in enumerate(lengths.tolist()):
        for expert in range(e):
            share = chosen[:length, row, expert].sum() * e / (k * length)
            expected += 0.3 / b * share * scores[:length, row, expert].mean()
    torch.testing.assert_close(seen[0], expected)


def test_the_reference_takes_the_biases_along(model: torch.nn.Module) -> None:
    reference = ReferencePolicy([model])
    before = [router.expert_bias.clone() for router in routers(model)]
    with torch.no_grad():
        for router in routers(model):
            router.expert_bias.add_(1.0)
    with reference.in_model():
        for router, bias in zip(routers(model), before, strict=True):
            assert torch.equal(router.expert_bias, bias)
    for router, bias in zip(routers(model), before, strict=True):
        assert torch.equal(router.expert_bias, bias + 1.0)
        router.expert_bias.copy_(bias)


def test_routers_note_what_they_choose_for_each_policy(model: torch.nn.Module) -> None:
    log = RoutingLog()
    batch = replace(UNEVEN, routing=log)
    for policy in ("old", "current"):
        log.policy = policy
        with torch.no_grad():
            logits_of(model.eval(), batch)
            if policy == "old":
                routers(model)[1].expert_bias[0] += 10.0  # every token takes it from now on
    log.policy = None
    changed, total = log.changed("old", "current")
    selected = UNEVEN.rows.numel()  # of the last layer the others are left out
    assert total == 3 * 24 + selected and 0 < changed <= selected
    assert log.changed("old", "old") == (0, total) and log.changed("old", "other") == (0, 0)
    routers(model)[1].expert_bias[0] -= 10.0


@pytest.mark.parametrize("module", [llada2, llada_moe], ids=["llada2", "llada_moe"])
def test_operations_are_those_of_the_weights_that_a_token_passes(module: Any) -> None:
    shape: ModelShape = module.PUBLISHED
    parts = shape.experts
    assert parts is not None
    dimensions = ModelDimensions(
        shape.num_layers, shape.hidden_size, shape.ffn_hidden_size, shape.num_attention_heads,
        shape.num_query_groups, shape.head_dim, shape.vocab_size, mixtures=parts.layers,
        active_size=parts.topk * parts.hidden_size + (parts.shared_size or 0),
        num_experts=parts.num_experts,
    )  # fmt: skip
    active = 0.0
    for block in model_blocks(shape, module.NAMES):
        for name, size in block.sources.items():
            share = parts.topk / parts.num_experts if ".experts." in name else 1.0
            active += share * math.prod(size) * (len(size) == 2 and "embed" not in name)
    # The published models have 1.4 billion; with LLaDA2.0's the embedding is counted.
    assert 1.1e9 < active < 1.4e9
    assert forward_flops(dimensions, 1, 1, 1, keys=0) / 2 == pytest.approx(active, rel=1e-9)


def test_adapters_are_on_attention_dense_parts_and_shared_experts(tokenizer: str) -> None:
    model = build(tokenizer, *LLADA2)
    before = logits_of(model.train(), UNEVEN)
    attach_adapters(model, LoraConfig(rank=4), seed=1)
    adapted = {
        name.split(".adapter.")[0] for name, _ in model.named_parameters() if is_adapter(name)
    }
    linear = ("self_attention.linear_qkv", "self_attention.linear_proj")
    parts = ("mlp", "mlp.shared_experts", "mlp.shared_experts")
    assert adapted == {
        f"decoder.layers.{layer}.{name}"
        for layer, part in enumerate(parts)
        for name in (*linear, f"{part}.linear_fc1", f"{part}.linear_fc2")
    }
    after = logits_of(model, UNEVEN)
    torch.testing.assert_close(after, before)
    after.sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == is_adapter(name), name


def test_a_simulated_rank_sends_and_gets_as_many_tokens_of_each_expert(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(MoEAlltoAllTokenDispatcher, "preprocess", lambda self, routing_map: None)
    balance_experts()
    second = Namespace(
        config=Namespace(moe_router_topk=3), num_experts=4, local_expert_indices=[2, 3],
        num_local_experts=2, ep_size=2, tp_size=1,
    )  # fmt: skip
    counts = MoEAlltoAllTokenDispatcher.preprocess(second, torch.zeros(5, 4))
    # Of 15 tokens 4, 4, 4 and 3; both ranks send as many to the experts of this one.
    assert counts.tolist() == [8, 6]
    assert second.input_splits.tolist() == [8, 7] and second.output_splits.tolist() == [7, 7]
    assert second.num_global_tokens_per_local_expert.tolist() == [[4, 3], [4, 3]]
