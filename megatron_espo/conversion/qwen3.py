"""Qwen3's config.json (Qwen/Qwen3-8B and its other dense sizes), and tensor names: Llama's."""

from typing import Any

from megatron_espo.conversion import autoregressive, llama
from megatron_espo.model.published_config import Config
from megatron_espo.model.shape import ModelShape

ARCHITECTURE = "Qwen3ForCausalLM"

NAMES = llama.NAMES

# What transformers takes for fields that a file does not have.
DEFAULTS: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
}

PUBLISHED = ModelShape(
    num_layers=36,
    hidden_size=4096,
    ffn_hidden_size=12288,
    num_attention_heads=32,
    num_query_groups=8,
    vocab_size=151936,
    max_position_embeddings=40960,
    rotary_base=1000000,
    norm_epsilon=1e-6,
    qkv_bias=False,
    logit_shift=True,
    mask_token_id=151669,
    eos_token_id=151645,
    qk_norm=True,
)
"""Qwen3-8B's shape, with the mask token that a conversion gives it."""


def read_layers(config: Config, *, logit_shift: bool) -> ModelShape:
    """Read the shape of a model with Qwen3's layers.

    Args:
        config: its config.json, with defaults.
        logit_shift: whether its logits are those of the next position.

    Returns:
        The shape.

    Raises:
        UserError: naming the field that is missing, broken or not supported.
    """
    config.require("attention_bias", False)
    autoregressive.require_full_attention(config)
    return llama.read_shape(config, logit_shift=logit_shift, qk_norm=True, own_heads=True)


def layer_fields(shape: ModelShape) -> dict[str, Any]:
    """Write what Qwen3's layers have beside Llama's."""
    return {
        "attention_bias": False,
        "head_dim": shape.head_dim,
        "sliding_window": None,
        "use_sliding_window": False,
    }


def read_config(config: Config) -> ModelShape:
    """Read the shape of a Qwen3 model.

    Args:
        config: its config.json, with a mask token.

    Returns:
        The shape.

    Raises:
        UserError: naming the field that is missing, broken or not supported.
    """
    config = config.with_defaults({**DEFAULTS, **autoregressive.DEFAULTS})
    shape = read_layers(config, logit_shift=config.switch("logit_shift"))
    return autoregressive.with_own_fields(shape, config)


def write_config(shape: ModelShape) -> dict[str, Any]:
    """Write the config.json of a Qwen3 model; the inverse of :func:`read_config`.

    Args:
        shape: the shape; ``qk_norm`` must be on, ``qkv_bias`` off.

    Returns:
        The fields.
    """
    own = {"architectures": [ARCHITECTURE], "model_type": "qwen3", **layer_fields(shape)}
    return llama.write_shape(shape, own | autoregressive.own_fields(shape))
