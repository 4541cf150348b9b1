"""Qwen2's config.json (Qwen/Qwen2.5-7B and the other dense sizes), and tensor names: Llama's."""

from typing import Any

from megatron_espo.conversion import autoregressive, llama
from megatron_espo.model.published_config import Config
from megatron_espo.model.shape import ModelShape

ARCHITECTURE = "Qwen2ForCausalLM"

NAMES = llama.NAMES

# What transformers takes for fields that a file does not have.
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
    mask_token_id=151665,
    eos_token_id=151643,
)
"""Qwen2.5-7B's shape, with the mask token that a conversion gives it."""


def read_config(config: Config) -> ModelShape:
    """Read the shape of a Qwen2 model.

    Args:
        config: its config.json, with a mask token.

    Returns:
        The shape.

    Raises:
        UserError: naming the field that is missing, broken or not supported.
    """
    config = config.with_defaults({**DEFAULTS, **autoregressive.DEFAULTS})
    autoregressive.require_full_attention(config)
    shift = config.switch("logit_shift")
    shape = llama.read_shape(config, logit_shift=shift, qkv_bias=True, own_heads=True)
    return autoregressive.with_own_fields(shape, config)


def write_config(shape: ModelShape) -> dict[str, Any]:
    """Write the config.json of a Qwen2 model; the inverse of :func:`read_config`.

    Args:
        shape: the shape; ``qkv_bias`` must be on, ``qk_norm`` off.

    Returns:
        The fields.
    """
    own: dict[str, Any] = {
        "architectures": [ARCHITECTURE],
        "model_type": "qwen2",
        "sliding_window": None,
        "use_sliding_window": False,
    }
    if shape.kv_channels is not None:
        own["head_dim"] = shape.head_dim
    return llama.write_shape(shape, own | autoregressive.own_fields(shape))
