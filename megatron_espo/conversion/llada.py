"""LLaDA's config.json and tensor names (GSAI-ML/LLaDA-8B-Base, -Instruct, LLaDA-1.5)."""

from typing import Any

from megatron_espo.conversion.mapping import Names
from megatron_espo.model.published_config import Config
from megatron_espo.model.shape import ModelShape, check_heads

ARCHITECTURE = "LLaDAModelLM"

# LLaDA calls three things ff_out or ff_proj: the gate is ff_proj, a block's ff_out is the down
# projection, and the ff_out beside the blocks is the output head.
NAMES = Names(
    embedding="model.transformer.wte",
    final_norm="model.transformer.ln_f",
    head="model.transformer.ff_out",
    layer="model.transformer.blocks.{layer}.",
    attention_norm="attn_norm",
    query="q_proj",
    key="k_proj",
    value="v_proj",
    attention_output="attn_out",
    ffn_norm="ff_norm",
    gate="ff_proj",
    up="up_proj",
    down="ff_out",
)

DEFAULTS: dict[str, Any] = {
    "activation_type": "swiglu",
    "alibi": False,
    "attention_dropout": 0.1,
    "attention_layer_norm": False,
    "bias_for_layer_norm": None,
    "block_group_size": 1,
    "block_type": "sequential",
    "d_model": 768,
    "embedding_dropout": 0.1,
    "embedding_size": 50304,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "default",
    "layer_norm_with_affine": True,
    "max_sequence_length": 1024,
    "mlp_hidden_size": None,
    "mlp_ratio": 4,
    "multi_query_attention": None,
    "n_heads": 12,
    "n_kv_heads": None,
    "n_layers": 12,
    "residual_dropout": 0.1,
    "rms_norm_eps": 1e-5,
    "rope": False,
    "rope_theta": 10000.0,
    "scale_logits": False,
    "vocab_size": 50257,
    "weight_tying": True,
}
"""What LLaDA's published code (configuration_llada.py) takes for fields that a file does not have:
a GPT-2, of which little can be converted. Token ids are not among them: a wrong one would do no
harm that shows."""

PUBLISHED = ModelShape(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=12288,
    num_attention_heads=32,
    num_query_groups=32,
    vocab_size=126464,
    max_position_embeddings=4096,
    rotary_base=500000,
    norm_epsilon=1e-5,
    qkv_bias=False,
    logit_shift=False,
    mask_token_id=126336,
    eos_token_id=126081,
)
"""LLaDA-8B's shape."""


def read_config(config: Config) -> ModelShape:
    """Read the shape of a LLaDA model.

    Args:
        config: its config.json.

    Returns:
        The shape.

    Raises:
        UserError: naming the field that is missing, broken or not supported.
    """
    config = config.with_defaults(DEFAULTS)
    config.require("block_type", "llama")
    config.require("block_group_size", 1)
    config.require("activation_type", "silu")
    config.require("layer_norm_type", "rms")
    config.require("layer_norm_with_affine", True)
    config.require("rope", True)
    for name in (
        "alibi",
        "attention_layer_norm",
        "include_bias",
        "input_emb_norm",
        "scale_logits",
    ):
        config.require(name, False)
    config.require("bias_for_layer_norm", False, None)
    config.require("multi_query_attention", None, False)
    config.require("clip_qkv", None)
    config.require("quantization_config", None)
    for name in ("attention_dropout", "embedding_dropout", "residual_dropout"):
        config.require(name, 0.0, 0)
    vocab_size = config.number("vocab_size", int)
    # The tables have embedding_size rows; rows without a token could be drawn.
    config.require("embedding_size", vocab_size, None)
    hidden_size, heads = config.number("d_model", int), config.number("n_heads", int)
    fields = config.fields
    groups = heads if fields.get("n_kv_heads") is None else config.number("n_kv_heads", int)
    if fields.get("mlp_hidden_size") is None:
        ffn_hidden_size = config.number("mlp_ratio", int) * hidden_size
    else:
        ffn_hidden_size = config.number("mlp_hidden_size", int)
    shape = ModelShape(
        num_layers=config.number("n_layers", int),
        hidden_size=hidden_size,
        ffn_hidden_size=ffn_hidden_size,
        num_attention_heads=heads,
        num_query_groups=groups,
        vocab_size=vocab_size,
        max_position_embeddings=config.number("max_sequence_length", int),
        rotary_base=config.rotary(scaling=False)[0],
        norm_epsilon=config.number("rms_norm_eps", float),
        qkv_bias=config.switch("include_qkv_bias"),
        logit_shift=False,
        mask_token_id=config.token("mask_token_id", vocab_size),
        eos_token_id=config.token("eos_token_id", vocab_size),
        tied_embeddings=config.switch("weight_tying"),
    )
    return check_heads(shape, config.source, "n_heads", "n_kv_heads", "d_model")


def write_config(shape: ModelShape) -> dict[str, Any]:
    """Write the config.json of a LLaDA model; the inverse of :func:`read_config`.

    Args:
        shape: the shape; ``logit_shift`` must be off.

    Returns:
        The fields.
    """
    return {
        "activation_type": "silu",
        "alibi": False,
        "architectures": [ARCHITECTURE],
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": shape.hidden_size,
        "embedding_dropout": 0.0,
        "embedding_size": shape.vocab_size,
        "eos_token_id": shape.eos_token_id,
        "include_bias": False,
        "include_qkv_bias": shape.qkv_bias,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "mask_token_id": shape.mask_token_id,
        "max_sequence_length": shape.max_position_embeddings,
        "mlp_hidden_size": shape.ffn_hidden_size,
        "model_type": "llada",
        "multi_query_attention": None,
        "n_heads": shape.num_attention_heads,
        "n_kv_heads": shape.num_query_groups,
        "n_layers": shape.num_layers,
        "pad_token_id": shape.eos_token_id,
        "residual_dropout": 0.0,
        "rms_norm_eps": shape.norm_epsilon,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": float(shape.rotary_base),
        "scale_logits": False,
        "vocab_size": shape.vocab_size,
        "weight_tying": shape.tied_embeddings,
    }
