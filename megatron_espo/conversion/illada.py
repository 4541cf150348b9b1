"""iLLaDA's config.json and tensor names (GSAI-ML/iLLaDA-8B-Base, -Instruct; arXiv 2606.25331).

A LLaDA with grouped queries and tied embeddings under Llama's names. The published folder keeps the
output head's copy of the embedding, and its config names no mask token.
"""

from typing import Any

from megatron_espo.conversion import llama
from megatron_espo.model.published_config import Config
from megatron_espo.model.shape import ModelShape

ARCHITECTURE = "ILLaDAForCausalLM"

NAMES = llama.NAMES

MASK_TOKEN_ID = 5
"""``<[MASK]>`` of the published tokenizer, which the model's authors pass to their sampler."""

# What transformers, and with it iLLaDA's published code, takes for fields that a file does not
# have. Its configs are tied unless they say otherwise, and do not write that they are.
DEFAULTS: dict[str, Any] = {
    "attention_bias": False,
    "hidden_act": "silu",
    "mask_token_id": MASK_TOKEN_ID,
    "mlp_bias": False,
    "tie_word_embeddings": True,
}

PUBLISHED = ModelShape(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    vocab_size=155136,
    max_position_embeddings=8192,
    rotary_base=500000,
    norm_epsilon=1e-5,
    qkv_bias=False,
    logit_shift=False,
    mask_token_id=MASK_TOKEN_ID,
    eos_token_id=2,
    tied_embeddings=True,
)
"""iLLaDA-8B's shape. Rotary base, norm epsilon and end of sequence are stand-ins for models with
random weights: they were not at hand, and those of a folder are read from its config.json."""


def read_config(config: Config) -> ModelShape:
    """Read the shape of an iLLaDA model.

    Args:
        config: its config.json.

    Returns:
        The shape.

    Raises:
        UserError: naming the field that is missing, broken or not supported.
    """
    config = config.with_defaults(DEFAULTS)
    config.require("layer_norm_eps", None)  # a number asks for plain layer norms
    config.require("attention_bias", False)
    config.require("mlp_bias", False)
    for name in ("resid_pdrop", "embd_pdrop"):
        config.require(name, 0.0, 0)
    return llama.read_shape(config, logit_shift=False)


def write_config(shape: ModelShape) -> dict[str, Any]:
    """Write the config.json of an iLLaDA model; the inverse of :func:`read_config`.

    Args:
        shape: the shape; ``qkv_bias`` and ``logit_shift`` must be off.

    Returns:
        The fields.
    """
    own = {
        "architectures": [ARCHITECTURE],
        "attention_bias": False,
        "layer_norm_eps": None,
        "mlp_bias": False,
        "model_type": "illada",
        "resid_pdrop": 0.0,
    }
    return llama.write_shape(shape, own)
