"""The maps between Hugging Face's tensors and Megatron's, and what config.json must say."""

import dataclasses
import json
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.training.arguments import add_megatron_arguments
from transformers import LlamaForCausalLM

from megatron_espo.conversion import (
    dream,
    illada,
    llada,
    llada2,
    llada_moe,
    llama3,
    qwen2,
    qwen3,
    sdar,
)
from megatron_espo.conversion.families import FAMILIES, family_of
from megatron_espo.conversion.hf_oracle import _MODELS, _llada_config, _llada_name, _llama_config
from megatron_espo.conversion.mapping import Block, model_blocks, tied_copies
from megatron_espo.model.presets import expand_preset
from megatron_espo.model.published_config import Config
from megatron_espo.model.shape import ModelShape
from megatron_espo.startup.arguments import add_arguments

# What GSAI-ML/LLaDA-8B-Instruct and Dream-org/Dream-v0-Instruct-7B publish, as far as it matters.
LLADA_CONFIG = {
    "activation_type": "silu", "alibi": False, "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"], "attention_dropout": 0.0, "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True, "bias_for_layer_norm": False,
    "block_group_size": 1, "block_type": "llama", "d_model": 4096, "embedding_dropout": 0.0,
    "embedding_size": 126464, "eos_token_id": 126081, "flash_attention": True,
    "include_bias": False, "include_qkv_bias": False, "input_emb_norm": False,
    "layer_norm_type": "rms", "layer_norm_with_affine": True, "mask_token_id": 126336,
    "max_sequence_length": 4096, "mlp_hidden_size": 12288, "mlp_ratio": 4, "model_type": "llada",
    "multi_query_attention": None, "n_heads": 32, "n_kv_heads": 32, "n_layers": 32,
    "pad_token_id": 126081, "residual_dropout": 0.0, "rms_norm_eps": 1e-05, "rope": True,
    "rope_full_precision": True, "rope_theta": 500000.0, "scale_logits": False,
    "vocab_size": 126464, "weight_tying": False,
}  # fmt: skip
DREAM_CONFIG = {
    "architectures": ["DreamModel"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 3584,
    "intermediate_size": 18944, "mask_token_id": 151666, "max_position_embeddings": 131072,
    "max_window_layers": 28, "model_type": "Dream", "num_attention_heads": 28,
    "num_hidden_layers": 28, "num_key_value_heads": 4, "pad_token_id": 151643,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0,
    "sliding_window": None, "tie_word_embeddings": False, "use_mrope": False,
    "use_sliding_window": False, "vocab_size": 152064,
}  # fmt: skip
# As GSAI-ML/iLLaDA-8B-Base's model card and code have it; the config has no mask token, and leaves
# out that embeddings are tied.
ILLADA_CONFIG = {
    "architectures": ["ILLaDAForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
    "layer_norm_eps": None, "max_position_embeddings": 8192, "mlp_bias": False,
    "model_type": "illada", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_scaling": None,
    "rope_theta": 500000.0, "vocab_size": 155136,
}  # fmt: skip
# What JetLM/SDAR-1.7B-Chat publishes (as far as it matters), with SDAR-8B's sizes.
SDAR_CONFIG = {
    "architectures": ["SDARForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "block_size": 4, "bos_token_id": 151643, "eos_token_id": 151643, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 12288,
    "mask_token_id": 151669, "max_position_embeddings": 32768, "max_window_layers": 28,
    "model_type": "sdar", "num_attention_heads": 32, "num_hidden_layers": 36,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
    "sliding_window": None, "tie_word_embeddings": False, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
# Qwen/Qwen3-8B, as transformers 5 writes it, with the mask token that a conversion gives it.
QWEN3_CONFIG = {
    **{n: v for n, v in SDAR_CONFIG.items() if n not in ("block_size", "rope_scaling")},
    "architectures": ["Qwen3ForCausalLM"], "eos_token_id": 151645,
    "layer_types": ["full_attention"] * 36, "max_position_embeddings": 40960, "model_type": "qwen3",
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000},
}  # fmt: skip
del QWEN3_CONFIG["rope_theta"]
# Qwen/Qwen2.5-7B, likewise.
QWEN2_CONFIG = {
    **{n: v for n, v in DREAM_CONFIG.items() if n != "use_mrope"},
    "architectures": ["Qwen2ForCausalLM"], "mask_token_id": 151665, "model_type": "qwen2",
    "sliding_window": 131072,
}  # fmt: skip
# meta-llama/Llama-3.1-8B-Instruct, likewise.
LLAMA_CONFIG = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 14336, "mask_token_id": 128002,
    "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    },
    "tie_word_embeddings": False, "vocab_size": 128256,
}  # fmt: skip
# inclusionAI/LLaDA2.0-mini; it names neither its mask token nor the size of its blocks.
LLADA2_CONFIG = {
    "architectures": ["LLaDA2MoeModelLM"], "attention_dropout": 0.0, "dtype": "bfloat16",
    "embedding_dropout": 0.0, "first_k_dense_replace": 1, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 2048, "intermediate_size": 5120, "max_position_embeddings": 32768,
    "max_window_layers": 28, "model_type": "llada2_moe", "moe_intermediate_size": 512,
    "moe_router_enable_expert_bias": True, "n_group": 8, "norm_head": False,
    "norm_softmax": False, "norm_topk_prob": True, "num_attention_heads": 16, "num_experts": 256,
    "num_experts_per_tok": 8, "num_hidden_layers": 20, "num_key_value_heads": 4,
    "num_shared_experts": 1, "output_dropout": 0.0, "output_router_logits": False,
    "pad_token_id": 156892, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 600000, "rotary_dim": 64, "routed_scaling_factor": 2.5,
    "router_dtype": "fp32", "score_function": "sigmoid", "sliding_window": 4096,
    "tie_word_embeddings": False, "topk_group": 4, "use_bias": False, "use_cache": False,
    "use_qk_norm": True, "use_qkv_bias": False, "use_rmsnorm": True, "use_sliding_window": False,
    "using_split_qkv_in_self_attention": False, "vocab_size": 157184,
}  # fmt: skip
# The fields of inclusionAI/LLaDA-MoE-7B-A1B-Base that its published code reads.
LLADA_MOE_CONFIG = {
    "architectures": ["LLaDAMoEModelLM"], "attention_bias": False, "attention_dropout": 0.0,
    "clip_qkv": None, "dense_intermediate_size": 8192, "eos_token_id": 156892,
    "expert_intermediate_size": 1024, "hidden_act": "silu", "hidden_size": 2048,
    "max_position_embeddings": 8192, "model_type": "llada", "moe_layer_freq": [1] * 16,
    "moe_router_enable_expert_bias": False, "moe_router_score_function": "softmax",
    "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8,
    "num_hidden_layers": 16, "num_key_value_heads": 16, "partial_rotary_factor": 1,
    "qk_layernorm": True, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 50000,
    "shared_expert_intermediate_size": None, "tie_word_embeddings": False, "vocab_size": 157184,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "llada": LLADA_CONFIG,
    "dream": DREAM_CONFIG,
    "illada": ILLADA_CONFIG,
    "sdar": SDAR_CONFIG,
    "llada2": LLADA2_CONFIG,
    "llada_moe": LLADA_MOE_CONFIG,
    "qwen3": QWEN3_CONFIG,
    "qwen2": QWEN2_CONFIG,
    "llama": LLAMA_CONFIG,
}
PUBLISHED = {
    "llada": (llada.PUBLISHED, 291, 8_015_581_184),
    "dream": (dream.PUBLISHED, 339, 7_615_616_512),
    # 291 tensors lie in the folder: one is a copy.
    "illada": (illada.PUBLISHED, 290, 7_615_025_152),
    "sdar": (sdar.PUBLISHED, 399, 8_190_735_360),
    # The published index has as many tensors, and as many bytes as this and bfloat16 make.
    "llada2": (llada2.PUBLISHED, 14_813, 16_255_643_392),
    "llada_moe": (llada_moe.PUBLISHED, 3_219, 7_356_880_896),
    "qwen3": (qwen3.PUBLISHED, 399, 8_190_735_360),
    "qwen2": (qwen2.PUBLISHED, 339, 7_615_616_512),
    "llama": (llama3.PUBLISHED, 291, 8_030_261_248),
}


def read(family: str, **changed: Any) -> ModelShape:
    fields = {**CONFIGS[family], **changed}
    return family_of(fields, "config.json").read_config(Config(fields, "config.json"))


@pytest.mark.parametrize("family", FAMILIES)
def test_published_config_gives_the_published_tensors_and_parameters(family: str) -> None:
    shape, tensors, parameters = PUBLISHED[family]
    assert read(family) == shape
    sources = [
        (name, size)
        for block in model_blocks(shape, FAMILIES[family].names)
        for name, size in block.sources.items()
    ]
    assert len(sources) == len(dict(sources)) == tensors
    assert sum(torch.Size(size).numel() for _, size in sources) == parameters

    if shape.experts is not None:
        return  # transformers has no such model
    # transformers' own model, built without memory, has the same tensors under its names.
    with torch.device("meta"):
        if family == "llada":
            theirs = LlamaForCausalLM(_llada_config(LLADA_CONFIG))
            sources = [(_llada_name(name), size) for name, size in sources]
        else:
            config = _llama_config(CONFIGS[family])
            theirs = _MODELS[type(config)](config)
    copies = tied_copies(shape, FAMILIES[family].names)
    sources += [(copy, dict(sources)[name]) for copy, name in copies.items()]
    assert {name: tuple(p.shape) for name, p in theirs.named_parameters()} == dict(sources)


def published_llada2(layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of LLaDA2.0-mini's tensors, as its index and config.json have them."""

    def gated(path: str, inner: int) -> dict[str, tuple[int, ...]]:
        sizes = {"gate_proj": (inner, 2048), "up_proj": (inner, 2048), "down_proj": (2048, inner)}
        return {f"{path}.{name}.weight": size for name, size in sizes.items()}

    found: dict[str, tuple[int, ...]] = {
        "model.word_embeddings.weight": (157184, 2048), "lm_head.weight": (157184, 2048),
        "model.norm.weight": (2048,),
    }  # fmt: skip
    for layer in range(layers):
        path = f"model.layers.{layer}"
        found |= {
            f"{path}.{name}_layernorm.weight": (2048,) for name in ("input", "post_attention")
        }
        found[f"{path}.attention.query_key_value.weight"] = ((16 + 4 + 4) * 128, 2048)
        found[f"{path}.attention.dense.weight"] = (2048, 16 * 128)
        found |= {f"{path}.attention.{name}_layernorm.weight": (128,) for name in ("query", "key")}
        if layer == 0:
            found |= gated(f"{path}.mlp", 5120)
            continue
        found |= {f"{path}.mlp.gate.weight": (256, 2048), f"{path}.mlp.gate.expert_bias": (256,)}
        for expert in range(256):
            found |= gated(f"{path}.mlp.experts.{expert}", 512)
        found |= gated(f"{path}.mlp.shared_experts", 512)
    return found


def test_all_layers_of_llada2_map_both_ways() -> None:
    """On the meta device: names and shapes alone."""
    published, back = published_llada2(20), {}
    for block in model_blocks(llada2.PUBLISHED, llada2.NAMES):
        tensors = [torch.empty(published[name], device="meta") for name in block.sources]
        packed = block.pack(tensors)
        assert tuple(packed.shape) == block.shape
        back |= {name: tuple(tensor.shape) for name, tensor in block.unpack(packed).items()}
    assert back == published


def test_heads_of_their_own_size_have_the_published_parameters() -> None:
    """Qwen3-0.6B: 16 heads of 128 channels on a hidden size of 1,024, tied."""
    small = {
        "hidden_size": 1024, "num_hidden_layers": 28, "intermediate_size": 3072,
        "num_attention_heads": 16, "tie_word_embeddings": True, "layer_types": None,
    }  # fmt: skip
    shape = read("qwen3", **small)
    assert shape.kv_channels == shape.head_dim == 128
    blocks = model_blocks(shape, FAMILIES["qwen3"].names)
    sizes = [torch.Size(size).numel() for block in blocks for size in block.sources.values()]
    assert sum(sizes) == 596_049_920


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_tile_megatrons_tensors_without_gap_or_overlap(family: str) -> None:
    blocks = model_blocks(PUBLISHED[family][0], FAMILIES[family].names)
    for key in {block.key for block in blocks}:
        parts = [block for block in blocks if block.key == key]
        (whole,) = {block.global_shape for block in parts}
        assert sum(torch.Size(block.shape).numel() for block in parts) == torch.Size(whole).numel()
        assert len({block.offset for block in parts}) == len(parts)
        for block in parts:
            ends = [o + n for o, n in zip(block.offset, block.shape, strict=True)]
            assert all(end <= size for end, size in zip(ends, whole, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_written_config_reads_as_the_same_shape(family: str) -> None:
    for tied in (False, True):
        shape = dataclasses.replace(
            PUBLISHED[family][0], num_layers=3, num_query_groups=2, tied_embeddings=tied
        )
        if shape.experts is not None:
            experts = dataclasses.replace(shape.experts, layers=(0, 1, 1))
            shape = dataclasses.replace(shape, experts=experts)
        if family in ("sdar", "qwen3", "qwen2", "llama"):
            shape = dataclasses.replace(shape, kv_channels=64)
        if FAMILIES[family].autoregressive:
            shape = dataclasses.replace(shape, logit_shift=tied)
        fields = json.loads(json.dumps(FAMILIES[family].write_config(shape)))
        assert family_of(fields, "").read_config(Config(fields, "")) == shape


@pytest.mark.parametrize(
    ("family", "preset"),
    [
        ("llada", "llada_8b"),
        ("dream", "dream_7b"),
        ("sdar", "sdar_8b"),
        ("sdar", "trado_8b"),
        ("llada2", "llada2_mini"),
        ("llada_moe", "llada_moe_7b"),
        ("qwen3", "qwen3_8b"),
        ("qwen2", "qwen2_7b"),
        ("llama", "llama3_8b"),
    ],
)
def test_flags_of_a_published_shape_are_those_of_the_preset(family: str, preset: str) -> None:
    parser = add_arguments(add_megatron_arguments(ArgumentParser(allow_abbrev=False)))
    ours = parser.parse_args(PUBLISHED[family][0].flags())
    theirs = parser.parse_args(expand_preset(["--preset", preset]))
    ours.preset, theirs.stop_token_ids = preset, None
    assert ours == theirs


@settings(max_examples=60, deadline=None)
@given(
    groups=st.integers(1, 4), per_group=st.integers(1, 4), dim=st.integers(1, 3), bias=st.booleans()
)
def test_qkv_is_packed_by_group_and_unpacked(
    groups: int, per_group: int, dim: int, bias: bool
) -> None:
    rows = {"q": groups * per_group * dim, "k": groups * dim, "v": groups * dim}
    inner = () if bias else (5,)
    tensors = {name: torch.randn(n, *inner) for name, n in rows.items()}
    total = sum(rows.values())
    block = Block(
        "qkv", (7, total, *inner), (2, 0, *(0 for _ in inner)), True,
        {name: tuple(tensor.shape) for name, tensor in tensors.items()}, groups,
    )  # fmt: skip
    packed = block.pack(list(tensors.values()))
    assert packed.shape == block.shape == (1, total, *inner)
    # Group after group: its queries, its key, its value.
    expected = []
    for group in range(groups):
        heads = [("q", group * per_group + head) for head in range(per_group)]
        for name, head in [*heads, ("k", group), ("v", group)]:
            expected += [tensors[name][head * dim + i] for i in range(dim)]
    assert torch.equal(packed[0], torch.stack(expected))
    unpacked = block.unpack(packed)
    assert all(torch.equal(unpacked[name], tensor) for name, tensor in tensors.items())
    assert all(tensor.is_contiguous() for tensor in unpacked.values())


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("llada", "block_type", "sequential"),
        ("llada", "block_group_size", 2),
        ("llada", "block_group_size", True),
        ("llada", "activation_type", "swiglu"),
        ("llada", "layer_norm_type", "default"),
        ("llada", "scale_logits", True),
        ("llada", "input_emb_norm", True),
        ("llada", "attention_layer_norm", True),
        ("llada", "multi_query_attention", True),
        ("llada", "residual_dropout", 0.1),
        ("llada", "attention_dropout", 0.1),
        ("llada", "embedding_dropout", 0.1),
        ("llada", "weight_tying", 1),
        ("llada", "rope_scaling", {"rope_type": "linear", "factor": 2.0}),
        ("llada", "include_bias", True),
        ("llada", "alibi", True),
        ("llada", "rope", False),
        ("llada", "embedding_size", 126500),
        ("llada", "quantization_config", {"bits": 4}),
        ("llada", "d_model", None),
        ("llada", "n_layers", 2.5),
        ("llada", "n_heads", 30),
        ("llada", "n_kv_heads", 5),
        ("llada", "mask_token_id", 126464),
        ("llada", "eos_token_id", None),
        ("llada", "rope_theta", 0.5),
        ("dream", "hidden_act", "gelu"),
        ("dream", "tie_word_embeddings", None),
        ("dream", "use_sliding_window", True),
        ("dream", "rope_scaling", {"type": "yarn"}),
        ("dream", "rope_parameters", {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}),
        ("dream", "rope_parameters", {"rope_theta": 1e6, "factor": 4.0}),
        ("dream", "rope_parameters", {"full_attention": {"rope_theta": 1e6}}),
        ("dream", "rope_parameters", [1e6]),
        ("dream", "attention_dropout", 0.1),
        ("dream", "head_dim", 64),
        ("dream", "num_key_value_heads", 5),
        ("dream", "rms_norm_eps", 0),
        ("illada", "layer_norm_eps", 1e-5),
        ("illada", "attention_bias", True),
        ("illada", "mlp_bias", True),
        ("illada", "resid_pdrop", 0.1),
        ("illada", "rope_scaling", {"type": "linear", "factor": 2.0}),
        ("illada", "eos_token_id", None),
        # LLaDA2.2, which goes by the name of LLaDA2.0.
        ("llada2", "expert_capacity", 48),
        ("llada2", "delete_token_id", 156930),
        ("llada2", "split_token_id", 156931),
        ("sdar", "rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        ("sdar", "attention_bias", True),
        ("qwen3", "head_dim", 0),
        ("qwen3", "layer_types", ["full_attention", "sliding_attention"]),
        ("qwen3", "use_sliding_window", True),
        ("qwen3", "mask_token_id", None),
        ("qwen3", "logit_shift", 1),
        ("qwen2", "use_sliding_window", True),
        ("llama", "attention_bias", True),
        ("llama", "mlp_bias", True),
        ("llama", "eos_token_id", [128001, 128256]),
        ("llama", "eos_token_id", []),
    ],
)
def test_a_config_that_is_not_supported_is_refused_by_field(
    family: str, field: str, value: Any
) -> None:
    with pytest.raises(ValueError, match=rf'config\.json: .*"{field}"'):
        read(family, **{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("high_freq_factor", 2.0),
        ("original_max_position_embeddings", 4096),
        ("factor", -8.0),
        ("attention_factor", 0.5),
    ],
)
def test_a_scaling_that_megatron_does_not_compute_is_refused(field: str, value: Any) -> None:
    scaling = {**LLAMA_CONFIG["rope_scaling"], field: value}
    with pytest.raises(ValueError, match=rf'config\.json: "rope_scaling": "{field}"'):
        read("llama", rope_scaling=scaling)
    assert read("llama", rope_scaling={**LLAMA_CONFIG["rope_scaling"], "factor": 32.0}) == (
        dataclasses.replace(llama3.PUBLISHED, rope_scaling_factor=32.0)
    )


@pytest.mark.parametrize("architectures", [["OlmoeForCausalLM"], ["Qwen3MoeForCausalLM"], None, []])
def test_the_architecture_decides_not_the_model_type(architectures: Any) -> None:
    with pytest.raises(ValueError, match=r'"architectures" is .* LLaDAModelLM, DreamModel'):
        read("llada", architectures=architectures)


# What LLaDA's published configuration_llada.py makes of a file without the field: the shape's
# fields that differ then, or None where the model is another than can be converted.
LLADA_WITHOUT: dict[str, dict[str, Any] | None] = {
    "n_kv_heads": {},
    "mlp_hidden_size": {"ffn_hidden_size": 16384},
    "mlp_ratio": {},
    "include_qkv_bias": {},
    "include_bias": {},
    "bias_for_layer_norm": {},
    "scale_logits": {},
    "block_group_size": {},
    "rms_norm_eps": {},
    "rope_theta": {"rotary_base": 10000},
    "max_sequence_length": {"max_position_embeddings": 1024},
    "weight_tying": {"tied_embeddings": True},
    "n_layers": {"num_layers": 12},
    "block_type": None,
    "activation_type": None,
    "layer_norm_type": None,
    "rope": None,
    "embedding_size": None,
    "attention_dropout": None,
    "residual_dropout": None,
    "embedding_dropout": None,
    "mask_token_id": None,
    "eos_token_id": None,
}


@pytest.mark.parametrize("field", LLADA_WITHOUT)
def test_a_field_that_is_absent_is_what_lladas_own_code_takes(field: str) -> None:
    fields = {name: value for name, value in LLADA_CONFIG.items() if name != field}
    changed = LLADA_WITHOUT[field]
    if changed is None:
        with pytest.raises(ValueError, match=rf'"{field}" is .*(own default|token id below)'):
            llada.read_config(Config(fields, "config.json"))
    else:
        expected = dataclasses.replace(llada.PUBLISHED, **changed)
        assert llada.read_config(Config(fields, "")) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rotary_base_is_found_where_transformers_5_writes_it(family: str) -> None:
    places = ("rope_theta", "rope_scaling", "rope_parameters")
    fields = {name: value for name, value in CONFIGS[family].items() if name not in places}
    for rope in ({"rope_type": "default"}, {}, {"rope_type": "default", "factor": 1.0}):
        changed = {**fields, "rope_parameters": {**rope, "rope_theta": 20000.0}}
        shape = FAMILIES[family].read_config(Config(changed, ""))
        assert shape.rotary_base == 20000
    with pytest.raises(ValueError, match=r'"rope_theta" is 20000\.0 and 30000\.0 in two places'):
        FAMILIES[family].read_config(Config({**changed, "rope_theta": 30000.0}, ""))


def test_a_config_without_the_fact_of_tying_follows_its_family() -> None:
    tied = {"llada": True, "illada": True}
    for family, config in CONFIGS.items():
        names = ("weight_tying", "tie_word_embeddings")
        fields = {name: value for name, value in config.items() if name not in names}
        shape = FAMILIES[family].read_config(Config(fields, ""))
        assert shape.tied_embeddings == tied.get(family, False)


def test_a_config_that_is_no_json_is_named(tmp_path: Path) -> None:
    from megatron_espo.conversion.hugging_face import read_json

    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: cannot be read as JSON"):
        read_json(tmp_path / "config.json")
