"""SDAR's config.json and tensor names (JetLM/SDAR-*-Chat, arXiv 2510.06303), TraDo's too: Qwen3's.

Models that were trained from Qwen3 as block diffusion: no logit shift, and a mask token in the
first row of the vocabulary that Qwen3's tokenizer leaves free.
"""

import dataclasses
from typing import Any

from megatron_espo.conversion import llama, qwen3
from megatron_espo.model.published_config import Config
from megatron_espo.model.shape import ModelShape

ARCHITECTURE = "SDARForCausalLM"

NAMES = llama.NAMES

MASK_TOKEN_ID = 151669
"""``<|MASK|>``, where a file names none."""

# What SDAR's published code takes for fields that a file does not have.
DEFAULTS: dict[str, Any] = {**qwen3.DEFAULTS, "mask_token_id": MASK_TOKEN_ID, "block_size": 4}

PUBLISHED = ModelShape(
    num_layers=36,
    hidden_size=4096,
    ffn_hidden_size=12288,
    num_attention_heads=32,
    num_query_groups=8,
    vocab_size=151936,
    max_position_embeddings=32768,
    rotary_base=1000000,
    norm_epsilon=1e-6,
    qkv_bias=False,
    logit_shift=False,
    mask_token_id=MASK_TOKEN_ID,
    eos_token_id=151643,
    qk_norm=True,
    attention_mask="block-causal",
    block_size=4,
)
"""SDAR-8B's and TraDo-8B's shape."""


def read_config(config: Config) -> ModelShape:
    """Read the shape of an SDAR model.

    Args:
        config: its config.json.

    Returns:
        The shape.

    Raises:
        UserError: naming the field that is missing, broken or not supported.
    """
    config = config.with_defaults(DEFAULTS)
    return dataclasses.replace(
        qwen3.read_layers(config, logit_shift=False),
        attention_mask="block-causal",
        block_size=config.number("block_size", int),
    )


def write_config(shape: ModelShape) -> dict[str, Any]:
    """Write the config.json of an SDAR model; the inverse of :func:`read_config`.

    Args:
        shape: the shape; ``qk_norm`` must be on, ``qkv_bias`` and ``logit_shift`` off, the
            attention block-causal.

    Returns:
        The fields.
    """
    own = {
        "architectures": [ARCHITECTURE],
        "block_size": shape.block_size,
        "model_type": "sdar",
    }
    return llama.write_shape(shape, {**qwen3.layer_fields(shape), **own})
