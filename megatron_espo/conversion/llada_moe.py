"""LLaDA-MoE's config.json and tensor names (inclusionAI/LLaDA-MoE-7B-A1B-*, arXiv 2509.24389).

Full attention, norms of queries and keys, and OLMoE's experts: a softmax over all of them scores
them, the best ones are weighted by their scores as they are.
"""

import dataclasses
from typing import Any

from megatron_espo.conversion import llama
from megatron_espo.errors import UserError
from megatron_espo.model.published_config import Config
from megatron_espo.model.shape import ExpertShape, ModelShape

ARCHITECTURE = "LLaDAMoEModelLM"

NAMES = dataclasses.replace(llama.NAMES, router="mlp.gate", expert="mlp.experts.{expert}.")

MASK_TOKEN_ID = 156895
"""``<|mask|>``, where a file names none."""

# What the published code (configuration_lladamoe.py) takes for fields that a file does not have;
# sizes have no defaults.
DEFAULTS: dict[str, Any] = {
    "attention_dropout": 0.0,
    "eos_token_id": 50279,
    "hidden_act": "silu",
    "mask_token_id": MASK_TOKEN_ID,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}

PUBLISHED = ModelShape(
    num_layers=16,
    hidden_size=2048,
    ffn_hidden_size=8192,
    num_attention_heads=16,
    num_query_groups=16,
    vocab_size=157184,
    max_position_embeddings=8192,
    rotary_base=50000,
    norm_epsilon=1e-5,
    qkv_bias=False,
    logit_shift=False,
    mask_token_id=MASK_TOKEN_ID,
    eos_token_id=156892,
    qk_norm=True,
    experts=ExpertShape(num_experts=64, topk=8, hidden_size=1024, layers=(1,) * 16),
)
"""LLaDA-MoE-7B-A1B's shape. No layer has the dense feed-forward part whose size it names."""

# Fields with which the published code would compute something else, and what they must be.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "clip_qkv": (None,),
    "moe_router_enable_expert_bias": (False, None),
    "moe_router_score_function": ("softmax", None),
    "norm_topk_prob": (None, False),
    "partial_rotary_factor": (1.0, 1),
    "routed_scaling_factor": (1, 1.0, None),
    "shared_expert_intermediate_size": (None,),
}


def read_config(config: Config) -> ModelShape:
    """Read the shape of a LLaDA-MoE model.

    Args:
        config: its config.json.

    Returns:
        The shape.

    Raises:
        UserError: naming the field that is missing, broken or not supported.
    """
    fields = config.fields
    heads = fields.get("num_key_value_heads") or fields.get("num_attention_heads")
    dense = config.number("dense_intermediate_size", int)
    own = {**fields, "num_key_value_heads": heads, "intermediate_size": dense}
    config = Config(own, config.source, DEFAULTS)
    for name, allowed in _REQUIRED.items():
        config.require(name, *allowed)
    shape = llama.read_shape(config, logit_shift=False, qk_norm=config.switch("qk_layernorm"))
    layers = fields.get("moe_layer_freq")
    valid = isinstance(layers, list) and not set(layers) - {0, 1}
    if not valid or len(layers or ()) != shape.num_layers:
        raise UserError(
            f'{config.source}: "moe_layer_freq" is {layers!r}; 0 or 1 for each of '
            f"{shape.num_layers} layers is needed."
        )
    return dataclasses.replace(
        shape,
        experts=ExpertShape(
            num_experts=config.number("num_experts", int),
            topk=config.number("num_experts_per_tok", int),
            hidden_size=config.number("expert_intermediate_size", int),
            layers=tuple(layers or ()),
        ),
    )


def write_config(shape: ModelShape) -> dict[str, Any]:
    """Write the config.json of a LLaDA-MoE model; the inverse of :func:`read_config`.

    Args:
        shape: the shape, with experts that a softmax scores.

    Returns:
        The fields.

    Raises:
        UserError: the shape has no experts.
    """
    experts = shape.experts
    if experts is None:
        raise UserError(f"a {ARCHITECTURE} has experts.")
    own = {
        **{name: allowed[0] for name, allowed in _REQUIRED.items()},
        "architectures": [ARCHITECTURE],
        "dense_intermediate_size": shape.ffn_hidden_size,
        "expert_intermediate_size": experts.hidden_size,
        "model_type": "llada",
        "moe_layer_freq": list(experts.layers),
        "num_experts": experts.num_experts,
        "num_experts_per_tok": experts.topk,
        "qk_layernorm": shape.qk_norm,
    }
    fields = llama.write_shape(shape, own)
    del fields["intermediate_size"]
    return fields
