"""Llama's config.json (meta-llama/Llama-3.1-8B and the other dense sizes), and tensor names."""

from typing import Any

from megatron_espo.conversion import autoregressive, llama
from megatron_espo.model.published_config import Config
from megatron_espo.model.shape import ModelShape

ARCHITECTURE = "LlamaForCausalLM"

NAMES = llama.NAMES

# What transformers takes for fields that a file does not have.
DEFAULTS: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "mlp_bias": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}

PUBLISHED = ModelShape(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    vocab_size=128256,
    max_position_embeddings=131072,
    rotary_base=500000,
    norm_epsilon=1e-5,
    qkv_bias=False,
    logit_shift=True,
    mask_token_id=128002,
    eos_token_id=128001,
    rope_scaling_factor=8.0,
)
"""Llama-3.1-8B's shape, with ``<|reserved_special_token_0|>`` as its mask token."""


def read_config(config: Config) -> ModelShape:
    """Read the shape of a Llama model.

    Args:
        config: its config.json, with a mask token.

    Returns:
        The shape.

    Raises:
        UserError: naming the field that is missing, broken or not supported.
    """
    config = config.with_defaults({**DEFAULTS, **autoregressive.DEFAULTS})
    config.require("attention_bias", False)
    config.require("mlp_bias", False)
    if config.fields.get("num_key_value_heads") is None:
        heads = config.number("num_attention_heads", int)
        config = Config({**config.fields, "num_key_value_heads": heads}, config.source)
    shift = config.switch("logit_shift")
    shape = llama.read_shape(config, logit_shift=shift, own_heads=True, rope_scaling=True)
    return autoregressive.with_own_fields(shape, config)


def write_config(shape: ModelShape) -> dict[str, Any]:
    """Write the config.json of a Llama model; the inverse of :func:`read_config`.

    Args:
        shape: the shape; ``qkv_bias`` and ``qk_norm`` must be off.

    Returns:
        The fields.
    """
    own = {
        "architectures": [ARCHITECTURE],
        "attention_bias": False,
        "head_dim": shape.head_dim,
        "mlp_bias": False,
        "model_type": "llama",
    }
    return llama.write_shape(shape, own | autoregressive.own_fields(shape))
