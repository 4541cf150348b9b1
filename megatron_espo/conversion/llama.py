"""Tensor names and config.json of the families whose checkpoints have Llama's form."""

from collections.abc import Mapping
from typing import Any

from megatron_espo.conversion.mapping import Names
from megatron_espo.model.published_config import Config
from megatron_espo.model.shape import ModelShape, check_heads, write_rotary

NAMES = Names(
    embedding="model.embed_tokens",
    final_norm="model.norm",
    head="lm_head",
    layer="model.layers.{layer}.",
    attention_norm="input_layernorm",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    attention_output="self_attn.o_proj",
    ffn_norm="post_attention_layernorm",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
    query_norm="self_attn.q_norm",
    key_norm="self_attn.k_norm",
)


def read_shape(
    config: Config,
    *,
    logit_shift: bool,
    qkv_bias: bool = False,
    qk_norm: bool = False,
    own_heads: bool = False,
    rope_scaling: bool = False,
) -> ModelShape:
    """Read the shape of a model.

    Args:
        config: its config.json, with the family's defaults.
        logit_shift: whether its logits are those of the next position.
        qkv_bias: whether the family has biases of queries, keys and values.
        qk_norm: whether it has norms of each head's queries and keys.
        own_heads: whether the size of its heads may be another than hidden size / heads.
        rope_scaling: whether it may have Llama 3's scaling of rotary frequencies.

    Returns:
        The shape.

    Raises:
        UserError: naming the field that is missing, broken or not supported.
    """
    config.require("hidden_act", "silu")
    config.require("attention_dropout", 0.0, 0)
    config.require("quantization_config", None)
    vocab_size = config.number("vocab_size", int)
    hidden_size = config.number("hidden_size", int)
    heads = config.number("num_attention_heads", int)
    usual = hidden_size // heads
    if own_heads and config.fields.get("head_dim") is not None:
        head_dim = config.number("head_dim", int)
    else:
        config.require("head_dim", usual, None)
        head_dim = usual
    rotary_base, factor = config.rotary(scaling=rope_scaling)
    shape = ModelShape(
        num_layers=config.number("num_hidden_layers", int),
        hidden_size=hidden_size,
        ffn_hidden_size=config.number("intermediate_size", int),
        num_attention_heads=heads,
        num_query_groups=config.number("num_key_value_heads", int),
        vocab_size=vocab_size,
        max_position_embeddings=config.number("max_position_embeddings", int),
        rotary_base=rotary_base,
        norm_epsilon=config.number("rms_norm_eps", float),
        qkv_bias=qkv_bias,
        logit_shift=logit_shift,
        mask_token_id=config.token("mask_token_id", vocab_size),
        eos_token_id=config.first_token("eos_token_id", vocab_size),
        tied_embeddings=config.switch("tie_word_embeddings"),
        kv_channels=None if head_dim * heads == hidden_size else head_dim,
        qk_norm=qk_norm,
        rope_scaling_factor=factor,
    )
    return check_heads(
        shape, config.source, "num_attention_heads", "num_key_value_heads", "hidden_size"
    )


def write_shape(shape: ModelShape, own: Mapping[str, Any]) -> dict[str, Any]:
    """Write config.json, with the fields that :func:`read_shape` reads.

    Args:
        shape: the shape.
        own: what the family has beside them.

    Returns:
        The fields, by name.
    """
    fields = {
        "attention_dropout": 0.0,
        "eos_token_id": shape.eos_token_id,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_hidden_size,
        "mask_token_id": shape.mask_token_id,
        "max_position_embeddings": shape.max_position_embeddings,
        "num_attention_heads": shape.num_attention_heads,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_query_groups,
        "pad_token_id": shape.eos_token_id,
        "rms_norm_eps": shape.norm_epsilon,
        "tie_word_embeddings": shape.tied_embeddings,
        "vocab_size": shape.vocab_size,
    }
    return dict(sorted((fields | write_rotary(shape) | dict(own)).items()))
