"""Dream's config.json and tensor names (Dream-org/Dream-v0-Base-7B, -Instruct-7B): Qwen2's."""

from typing import Any

from megatron_espo.conversion import llama
from megatron_espo.model.published_config import Config
from megatron_espo.model.shape import ModelShape

ARCHITECTURE = "DreamModel"

NAMES = llama.NAMES

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
    config.require("use_sliding_window", False)
    config.require("use_mrope", False)
    return llama.read_shape(config, qkv_bias=True, logit_shift=True)


def write_config(shape: ModelShape) -> dict[str, Any]:
    """Write the config.json of a Dream model; the inverse of :func:`read_config`.

    Args:
        shape: the shape; ``qkv_bias`` and ``logit_shift`` must be on.

    Returns:
        The fields.
    """
    own = {
        "architectures": [ARCHITECTURE],
        "bos_token_id": shape.eos_token_id,
        "model_type": "Dream",
        "sliding_window": None,
        "use_mrope": False,
        "use_sliding_window": False,
    }
    return llama.write_shape(shape, own)
