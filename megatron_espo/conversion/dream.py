"""Dream's config.json and tensor names (Dream-org/Dream-v0-Base-7B, -Instruct-7B): Qwen2's."""

from typing import Any

from megatron_espo.conversion.mapping import Names
from megatron_espo.model.shape import Config, ModelShape, check_heads

ARCHITECTURE = "DreamModel"

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
)

# What Dream's published code (configuration_dream.py) takes for fields that a file does not have.
DEFAULTS: dict[str, Any] = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
}

PUBLISHED = ModelShape(
    num_layers=28,
    hidden_size=3584,
    ffn_hidden_size=18944,
    num_attention_heads=28,
    num_query_groups=4,
    vocab_size=152064,
    max_position_embeddings=131072,
    rotary_base=1000000,
    norm_epsilon=1e-6,
    qkv_bias=True,
    logit_shift=True,
    mask_token_id=151666,
    eos_token_id=151643,
)
"""Dream-7B's shape."""


def read_config(config: Config) -> ModelShape:
    """Read the shape of a Dream model.

    Args:
        config: its config.json.

    Returns:
        The shape.

    Raises:
        UserError: naming the field that is missing, broken or not supported.
    """
    config = config.with_defaults(DEFAULTS)
    config.require("hidden_act", "silu")
    config.require("use_sliding_window", False)
    config.require("use_mrope", False)
    config.require("attention_dropout", 0.0, 0)
    config.require("quantization_config", None)
    vocab_size = config.number("vocab_size", int)
    hidden_size = config.number("hidden_size", int)
    heads = config.number("num_attention_heads", int)
    config.require("head_dim", hidden_size // heads, None)
    shape = ModelShape(
        num_layers=config.number("num_hidden_layers", int),
        hidden_size=hidden_size,
        ffn_hidden_size=config.number("intermediate_size", int),
        num_attention_heads=heads,
        num_query_groups=config.number("num_key_value_heads", int),
        vocab_size=vocab_size,
        max_position_embeddings=config.number("max_position_embeddings", int),
        rotary_base=config.rotary_base(),
        norm_epsilon=config.number("rms_norm_eps", float),
        qkv_bias=True,
        logit_shift=True,
        mask_token_id=config.token("mask_token_id", vocab_size),
        eos_token_id=config.token("eos_token_id", vocab_size),
        tied_embeddings=config.switch("tie_word_embeddings"),
    )
    return check_heads(
        shape, config.source, "num_attention_heads", "num_key_value_heads", "hidden_size"
    )


def write_config(shape: ModelShape) -> dict[str, Any]:
    """Write the config.json of a Dream model; the inverse of :func:`read_config`.

    Args:
        shape: the shape; ``qkv_bias`` and ``logit_shift`` must be on.

    Returns:
        The fields.
    """
    return {
        "architectures": [ARCHITECTURE],
        "attention_dropout": 0.0,
        "bos_token_id": shape.eos_token_id,
        "eos_token_id": shape.eos_token_id,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_hidden_size,
        "mask_token_id": shape.mask_token_id,
        "max_position_embeddings": shape.max_position_embeddings,
        "model_type": "Dream",
        "num_attention_heads": shape.num_attention_heads,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_query_groups,
        "pad_token_id": shape.eos_token_id,
        "rms_norm_eps": shape.norm_epsilon,
        "rope_scaling": None,
        "rope_theta": float(shape.rotary_base),
        "sliding_window": None,
        "tie_word_embeddings": shape.tied_embeddings,
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": shape.vocab_size,
    }
