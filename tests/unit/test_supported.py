"""What a masked-diffusion pass was written for: all passes agree in it, and the rest is refused."""

import argparse
import ast
import dataclasses
import inspect
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import argument_utils
from megatron.training.arguments import parse_args
from test_passes import OFFSETS, UNEVEN, WIDTH, build, logits_of, window

from megatron_espo.conversion.mapping import Block
from megatron_espo.conversion.torch_dist import write_checkpoint
from megatron_espo.model import provider, supported
from megatron_espo.model.layer_specs import RMSNorm
from megatron_espo.model.shape import _FIXED, ModelShape
from megatron_espo.passes import pipeline
from megatron_espo.passes.state import KeyValueCache
from megatron_espo.startup.arguments import add_arguments, initialize_arguments, plan_arguments
from megatron_espo.startup.setup import start_anew
from megatron_espo.startup.stored import stored_arguments
from megatron_espo.training import espo, pretrain

SHAPE = (
    "--num-layers 3 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4 "
    "--normalization RMSNorm --attention-dropout 0 --hidden-dropout 0 --seq-length 64 "
    "--max-position-embeddings 64 --make-vocab-size-divisible-by 8 --init-method-std 0.3 "
    "--micro-batch-size 1 --train-iters 1 --lr 1e-3 "
)
ROPE = "--position-embedding-type rope --disable-bias-linear "
LLAMA = f"{ROPE} --swiglu --untie-embeddings-and-output-weights "

EXPERTS = (
    f"{LLAMA} --num-experts 8 --moe-layer-freq [0,1,1] --moe-ffn-hidden-size 24 "
    "--moe-router-topk 4 --init-method-std 0.4 "
)
GROUPS = "--moe-router-num-groups 4 --moe-router-group-topk 2 "
SIGMOID = f"{EXPERTS} --moe-router-score-function sigmoid {GROUPS}"

# What is tried: flags of a model, and what is changed in it. Every known setting is among them.
KNOWN = {
    "gpt": ("", ""),
    "llama": (LLAMA, ""),
    "tied": (f"{ROPE} --swiglu", ""),
    "biases": ("--position-embedding-type rope --swiglu", ""),
    "squared relu": (ROPE, "--squared-relu"),
    "quick gelu": (ROPE, "--quick-geglu"),
    "clamped": (f"{ROPE} --quick-geglu", "--activation-func-clamp-value 0.05"),
    "offset": (LLAMA, "--glu-linear-offset 1.0"),
    "grouped queries": (LLAMA, "--group-query-attention --num-query-groups 2"),
    "wide heads": (LLAMA, "--kv-channels 12"),
    "qkv bias": (LLAMA, "--add-qkv-bias"),
    "qk norm": (LLAMA, "--qk-layernorm"),
    "epsilon": (LLAMA, "--norm-epsilon 1e-2"),
    "no positions": (LLAMA, "--position-embedding-type none"),
    "base": (LLAMA, "--rotary-base 100"),
    "part of a head": (LLAMA, "--rotary-percent 0.5"),
    "interleaved": (LLAMA, "--rotary-interleaved"),
    "interpolated": (LLAMA, "--rotary-seq-len-interpolation-factor 2"),
    "scaled": (f"{LLAMA} --rotary-base 500000", "--use-rope-scaling"),
    "experts": (LLAMA, EXPERTS.removeprefix(LLAMA)),
    "weights of a softmax": (EXPERTS, "--moe-router-pre-softmax"),
    "experts in groups": (EXPERTS, GROUPS),
    "sigmoids": (EXPERTS, f"--moe-router-score-function sigmoid {GROUPS}"),
    "biases of experts": (SIGMOID, "--moe-router-enable-expert-bias"),
    "scaled experts": (SIGMOID, "--moe-router-topk-scaling-factor 2.5"),
    "shared expert": (SIGMOID, "--moe-shared-expert-intermediate-size 24"),
    "scaled less": (
        f"{LLAMA} --rotary-base 500000 --use-rope-scaling",
        "--rope-scaling-factor 2",
    ),
}

# Flags that are refused, and a part of the sentence.
REFUSED = {
    "--no-rope-freq 3": "all layers rotate alike",
    "--position-embedding-type yarn": "yarn: windows of a cache",
    "--position-embedding-type mrope": "mrope: windows of a cache",
    "--rope-type yarn": "--rope-type yarn: ",
    "--window-size 3,3": "--window-size 3 3: every position attends",
    "--window-attn-skip-freq 2": "every position attends",
    "--softmax-type off-by-one": "plain softmax",
    "--softmax-type learnable": "plain softmax",
    "--attention-output-gate": "fewer rows than a gate has",
    "--mtp-num-layers 1": "no further tokens",
    "--qk-l2-norm": "--qk-layernorm is known",
    "--multi-latent-attention": "holds keys and values",
    "--experimental-attention-variant dsa": "every position attends",
    "--linear-attention-freq 2": "every position attends",
    "--normalization LayerNorm": "pass --normalization RMSNorm",
    "--apply-layernorm-1p": "--apply-layernorm-1p: the norms",
    "--fp32-residual-connection": "one type throughout",
    "--apply-query-key-layer-scaling": "not scaled by layer",
    "--hybrid-layer-pattern M*M": "--hybrid-layer-pattern M\\*M",
    "--cuda-graph-impl local": "a captured layer",
    "--external-cuda-graph": "a captured layer",
    "--tp-comm-overlap": "passes here have many",
    "--calculate-per-token-loss": "averages over sequences",
    "--fp8-output-proj": "higher precision",
    "--moe-token-dispatcher-type flex": "use alltoall",
    "--moe-router-score-function sqrtsoftplus": "use sigmoid or softmax",
    "--moe-router-load-balancing-type sinkhorn": "aux_loss or seq_aux_loss",
    "--moe-input-jitter-eps 0.1": "no mixture of experts was tried with it",
    "--moe-enable-routing-replay": "choose their experts anew",
    "--moe-shared-expert-overlap": "no mixture of experts was tried with it",
    "--expert-model-parallel-size 2": "the model has no experts",
    "--cp-comm-type a2a": "gather keys and values",
    "--hierarchical-context-parallel-sizes 2 1": "one group",
    "--reset-attention-mask": "not cut into documents",
    "--no-position-embedding": "--no-position-embedding: .*use --position-embedding-type none",
    "--disable-mamba-mem-eff-path": "--disable-mamba-mem-eff-path: ",
    "--no-dsa-indexer-scoring-relu": "--no-dsa-indexer-scoring-relu: ",
    "--openai-gelu": "--openai-gelu: no masked-diffusion pass",
    "--transformer-impl inference_optimized": "use transformer_engine or local",
    "--dist-ckpt-strictness return_all": "use log_all",
    "--dist-ckpt-strictness return_unexpected": "use log_all",
    "--yaml-cfg some.yaml": "--recipe",
}


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    found: list[argparse.ArgumentParser] = []

    def keep(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        found.append(add_arguments(parser))
        return parser

    program, sys.argv = sys.argv, ["test"]
    parse_args(keep)
    sys.argv = program
    return found[0]


def default(parser: argparse.ArgumentParser, name: str) -> Any:
    return parser.get_default(name)


# ---- classes


def test_every_field_of_megatrons_config_is_in_one_class() -> None:
    """A version of Megatron with a new setting asks for a decision here."""
    known = {**supported.MODEL, **supported.OF_RUN}
    for field in dataclasses.fields(TransformerConfig):
        name = field.name
        classes = [name in known, name in supported.FREE, name in supported.DERIVED]
        refused = not any(classes)
        assert sum(classes) <= 1, name
        assert not refused or supported.reason_of(name) is not None, name


def read_from_args(function: Callable[..., Any]) -> set[str]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "args"
    }


def test_every_argument_that_megatron_makes_a_config_of_is_in_a_class() -> None:
    read = read_from_args(argument_utils.core_transformer_config_from_args)
    read |= read_from_args(argument_utils._apply_yarn_config_from_args)
    read |= read_from_args(provider.model_provider)
    decided = {*supported.FREE, *supported.MODEL, *supported.OF_RUN, *supported.requirements()}
    # The type of the weights is made from --bf16 and --fp16; the others are sizes of tables.
    made = {"params_dtype", "padded_vocab_size", "max_position_embeddings"}
    assert read - decided == made


def test_every_parameter_of_megatrons_model_is_passed_or_refused() -> None:
    tree = ast.parse(inspect.getsource(provider.model_provider))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    call = next(c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "GPTModel")
    passed = {keyword.arg for keyword in call.keywords}
    left = set(inspect.signature(GPTModel.__init__).parameters) - passed - {"self"}
    # Two are arguments that are refused; a model without embeddings of its own would want another.
    # From 0.20 on there is a type of logits: here they are float32, see model/float_logits.py.
    assert left - {"logit_dtype"} == {
        "fp16_lm_cross_entropy",
        "mtp_block_spec",
        "scatter_embedding_sequence_parallel",
    }


def test_names_are_those_of_megatrons_arguments(parser: argparse.ArgumentParser) -> None:
    fields = {field.name for field in dataclasses.fields(TransformerConfig)}
    arguments = {action.dest for action in parser._actions}
    assert fields | arguments >= supported.FREE
    assert fields - arguments >= supported.DERIVED
    kitchen = {"kitchen_config_file", "kitchen_recipe_number"}  # only where that is installed
    assert {*supported.MODEL, *supported.OF_RUN, *supported.ARGUMENTS} <= arguments | kitchen
    for start in supported.REASONS:
        assert any(name.startswith(start) for name in supported.requirements()), start


def test_a_refusal_names_a_flag_that_exists(parser: argparse.ArgumentParser) -> None:
    flags: dict[str, set[str]] = {}
    for action in parser._actions:
        flags.setdefault(action.dest, set()).update(action.option_strings)
    for name in supported.requirements():
        if name in flags:
            before = default(parser, name)
            other = (not before) if isinstance(before, bool) else 7
            assert supported.flag_of(name, other).split()[0] in flags[name], name
    for name in supported.MODEL:
        assert supported.flag_of(name) in flags[name]


def test_megatrons_defaults_are_allowed_but_for_the_norm(parser: argparse.ArgumentParser) -> None:
    defaults = parser.parse_args([])
    assert [sentence.split(":")[0] for sentence in supported.refusals(defaults)] == [
        "--normalization LayerNorm"
    ]


def test_a_setting_of_a_later_version_must_be_at_its_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @dataclasses.dataclass
    class Later:
        sparse_heads: int = 3

    monkeypatch.setattr(supported, "TransformerConfig", Later)
    assert list(supported.refusals(argparse.Namespace(sparse_heads=3))) == []
    (sentence,) = supported.refusals(argparse.Namespace(sparse_heads=4))
    assert sentence.startswith("--sparse-heads 4: ")


# ---- what is refused


@pytest.mark.parametrize("flags", REFUSED)
def test_other_settings_are_refused_by_name_before_anything_is_built(flags: str) -> None:
    argv = f"--preset tiny --vocab-size 262 --seq-length 48 --lr 1e-3 {flags}".split()
    with pytest.raises(ValueError, match=REFUSED[flags]) as caught:
        plan_arguments(argv, espo.prepare_arguments, 2)
    first = str(caught.value).split(":")[0].split()[0]
    assert first == flags.split()[0] and "\n" not in str(caught.value)
    # Rank by rank, with no checkpoint, tokenizer or process group in sight.
    with pytest.raises(ValueError, match=REFUSED[flags]):
        initialize_arguments(argv, pretrain.prepare_arguments)


def test_nothing_reads_megatrons_command_line_around_the_check() -> None:
    root = Path(supported.__file__).parents[2]
    folders = [root / name for name in ("megatron_espo", "tools", "benchmarks", "examples")]
    files = [path for folder in folders for path in folder.rglob("*.py")]
    readers = {p.name for p in files if "megatron.training.arguments" in p.read_text("utf-8")}
    assert len(files) > 100 and readers == {"arguments.py"}


# ---- what is known


def test_every_known_setting_is_tried(parser: argparse.ArgumentParser) -> None:
    tried: dict[str, set[Any]] = {name: set() for name in supported.MODEL}
    for base, change in KNOWN.values():
        args = parser.parse_args(f"{SHAPE} {base} {change}".split())
        for name in tried:
            value = getattr(args, name)
            tried[name].add(tuple(value) if isinstance(value, list) else value)
    sizes = {"num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"}
    for name, allowed in supported.MODEL.items():
        if name in sizes:
            continue
        if allowed == supported.ANY:
            assert tried[name] - {default(parser, name)}, name
        else:
            assert tried[name] == set(allowed), name


def megatrons_spec(config: Any, te: bool, vp_stage: Any, is_last: bool) -> Any:
    block = get_gpt_decoder_block_spec(config, te, config.normalization, vp_stage=vp_stage)
    for layer in block.layer_specs:
        layer.submodules.self_attention.params["attn_mask_type"] = AttnMaskType.padding
    return block


def disturb(model: torch.nn.Module) -> None:
    """Biases begin at zero and norms at one, which would hide what is done with them."""
    draws = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.add_(0.3 * torch.randn(weight.shape, generator=draws))
        for name, buffer in model.named_buffers():
            if name.endswith("expert_bias"):
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=draws))


@torch.no_grad()
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("case", KNOWN)
def test_all_passes_agree_in_what_is_known(
    tokenizer: str, case: str, shift: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows left out, kept keys and values, and Megatron's own layers give the same logits."""
    monkeypatch.setattr("test_passes.FLAGS", SHAPE)
    flags = " ".join(KNOWN[case]).split()
    model = build(tokenizer, *flags).eval()
    disturb(model)
    cache = KeyValueCache()
    part = window(UNEVEN, OFFSETS, WIDTH, cache)
    rows = replace(UNEVEN, rows=part.rows, positions=part.positions)

    lean = logits_of(model, rows, shift)
    logits_of(model, replace(UNEVEN, cache=cache), shift)
    windows = logits_of(model, part, shift)
    monkeypatch.setattr(pipeline, "_select", lambda *_: None)
    whole = logits_of(model, rows, shift)
    monkeypatch.setattr(provider, "bidirectional_block_spec", megatrons_spec)
    theirs = build(tokenizer, *flags).eval()
    theirs.load_state_dict(model.state_dict())
    expected = logits_of(theirs, rows, shift)

    # Three layers of sums over at most 48 terms, of logits of some five: a few 1e-6 are seen.
    for other in (lean, windows, expected):
        torch.testing.assert_close(other, whole, atol=5e-5, rtol=0)
    assert whole.abs().max() > 1


@torch.no_grad()
@pytest.mark.parametrize("case", [name for name, (_, change) in KNOWN.items() if change])
def test_no_known_setting_is_left_out_in_silence(
    tokenizer: str, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("test_passes.FLAGS", SHAPE)
    base, change = KNOWN[case]
    with_it, without = (build(tokenizer, *f"{base} {more}".split()) for more in (change, ""))
    disturb(with_it)
    disturb(without)
    difference = logits_of(with_it.eval(), UNEVEN) - logits_of(without.eval(), UNEVEN)
    assert difference.abs().max() > 1e-3


# ---- what a checkpoint says


CHANGED = (
    f"{ROPE} --quick-geglu --qk-layernorm --glu-linear-offset 1.0 --rotary-interleaved "
    "--activation-func-clamp-value 0.5 --use-rope-scaling --rope-scaling-factor 2 --rotary-base 77 "
    "--rotary-percent 0.5 --rotary-seq-len-interpolation-factor 3 --norm-epsilon 1e-3 "
    "--group-query-attention --num-query-groups 2 --kv-channels 12"
)


@pytest.fixture
def checkpoint(tokenizer: str, tmp_path: Path) -> str:
    """The arguments of a model that uses what it can, as a checkpoint holds them."""
    fresh()
    flags = f"{SHAPE} {CHANGED} --tokenizer-model {tokenizer}".split()
    args = initialize_arguments(flags, pretrain.prepare_arguments)
    folder = tmp_path / "release"
    folder.mkdir()
    table = Block("table", (2, 2), (0, 0), False, {"table": (2, 2)})
    common = {"args": args, "iteration": 0, "checkpoint_version": 3.0}
    write_checkpoint(folder, [table], torch.float32, lambda _: torch.zeros(2, 2), {}, common)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    fresh()
    return str(tmp_path)


def fresh() -> None:
    start_anew()


def test_a_checkpoint_decides_every_setting_of_the_model(tokenizer: str, checkpoint: str) -> None:
    stored = stored_arguments(f"{checkpoint}/release")
    run = f"--use-checkpoint-args --load {checkpoint} --tokenizer-model {tokenizer} --seq-length 64"
    flags = f"{run} --micro-batch-size 1 --train-iters 1 --lr 1e-3 --glu-linear-offset 9".split()
    args = initialize_arguments(flags, pretrain.prepare_arguments)
    for name in supported.MODEL:
        assert getattr(args, name) == getattr(stored, name), name


@pytest.mark.parametrize(
    ("without", "instead"),
    [
        ("--use-rope-scaling", ""),
        ("--quick-geglu", "--squared-relu"),
        ("--qk-layernorm", ""),
        ("--activation-func-clamp-value 0.5", ""),
        ("--rotary-seq-len-interpolation-factor 3", "--rotary-seq-len-interpolation-factor 4"),
    ],
)
def test_another_model_than_the_checkpoints_is_named(
    tokenizer: str, checkpoint: str, without: str, instead: str
) -> None:
    flags = f"{SHAPE} {CHANGED.replace(without, instead)} --tokenizer-model {tokenizer}"
    named = (instead or without).split()[0]
    with pytest.raises(ValueError, match=f"holds another model: {named} is "):
        initialize_arguments([*flags.split(), "--load", checkpoint], pretrain.prepare_arguments)


def test_what_the_checkpoints_model_does_not_have_is_named_too(
    tokenizer: str, checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = stored_arguments(f"{checkpoint}/release")
    stored.activation_func_clamp_value = None
    monkeypatch.setattr("megatron_espo.startup.arguments.checkpoint_arguments", lambda path: stored)
    flags = f"{SHAPE} {CHANGED} --tokenizer-model {tokenizer} --load {checkpoint}".split()
    with pytest.raises(ValueError, match=r"--activation-func-clamp-value is None there and 0\.5"):
        initialize_arguments(flags, pretrain.prepare_arguments)


def test_what_validation_fills_in_is_no_refusal(checkpoint: str) -> None:
    stored = stored_arguments(f"{checkpoint}/release")
    assert list(supported.refusals(stored, validated=True)) == []
    assert list(supported.refusals(stored)) != []


def test_a_published_form_says_or_excludes_every_setting() -> None:
    said = {
        "num_layers": "num_layers", "hidden_size": "hidden_size", "rotary_base": "rotary_base",
        "ffn_hidden_size": "ffn_hidden_size", "num_attention_heads": "num_attention_heads",
        "num_query_groups": "num_query_groups", "layernorm_epsilon": "norm_epsilon",
        "add_qkv_bias": "qkv_bias", "kv_channels": "head_dim",
        "untie_embeddings_and_output_weights": "tied_embeddings", "qk_layernorm": "qk_norm",
        "use_rope_scaling": "rope_scaling_factor", "rope_scaling_factor": "rope_scaling_factor",
        "rotary_percent": "rotary_percent",
    }  # fmt: skip
    experts = (name for name in supported.MODEL if name.startswith("moe_") or name == "num_experts")
    said |= dict.fromkeys(experts, "experts")
    assert all(hasattr(ModelShape, n) or n in ModelShape.__annotations__ for n in said.values())
    assert supported.MODEL.keys() == said.keys() | _FIXED.keys()


def test_norms_of_queries_and_keys_take_part_in_sequence_parallelism(
    tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Megatron's wrapper of PyTorch's norm refuses it."""
    monkeypatch.setattr("test_passes.FLAGS", SHAPE)
    model: Any = build(tokenizer, *f"{LLAMA} --qk-layernorm".split())
    attention = model.decoder.layers[0].self_attention
    assert isinstance(attention.q_layernorm, RMSNorm) and isinstance(attention.k_layernorm, RMSNorm)
