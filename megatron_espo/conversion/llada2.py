"""LLaDA2.0's and 2.1's config.json and tensor names (inclusionAI/LLaDA2.0-mini, arXiv 2512.15745).

Block diffusion in blocks of 32 without a shift. All layers but the first are mixtures of experts;
see model/experts.py. The files name neither the mask token nor the size of a block.
"""

import dataclasses
from typing import Any

from megatron_espo.conversion import llama
from megatron_espo.conversion.mapping import Names
from megatron_espo.errors import UserError
from megatron_espo.model.published_config import Config
from megatron_espo.model.shape import ExpertShape, ModelShape

ARCHITECTURE = "LLaDA2MoeModelLM"

NAMES = Names(
    embedding="model.word_embeddings",
    final_norm="model.norm",
    head="lm_head",
    layer="model.layers.{layer}.",
    attention_norm="input_layernorm",
    # The three of the fused one.
    query="attention.query",
    key="attention.key",
    value="attention.value",
    attention_output="attention.dense",
    ffn_norm="post_attention_layernorm",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
    query_norm="attention.query_layernorm",
    key_norm="attention.key_layernorm",
    fused="attention.query_key_value",
    router="mlp.gate",
    router_bias="mlp.gate.expert_bias",
    expert="mlp.experts.{expert}.",
    shared="mlp.shared_experts.",
)

MASK_TOKEN_ID = 156895
"""``<|mask|>``, where a file names none."""

# What the published code (configuration_llada2_moe.py) takes for fields that a file does not have,
# and what it has in no field.
DEFAULTS: dict[str, Any] = {
    "attention_dropout": 0.1,
    "block_size": 32,
    "embedding_dropout": 0.1,
    "first_k_dense_replace": 0,
    "hidden_act": "silu",
    "mask_token_id": MASK_TOKEN_ID,
    "max_position_embeddings": 16384,
    "n_group": 8,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "num_shared_experts": 0,
    "output_dropout": 0.1,
    "pad_token_id": 126081,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "routed_scaling_factor": 2.5,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "use_bias": True,
}

PUBLISHED = ModelShape(
    num_layers=20,
    hidden_size=2048,
    ffn_hidden_size=5120,
    num_attention_heads=16,
    num_query_groups=4,
    vocab_size=157184,
    max_position_embeddings=32768,
    rotary_base=600000,
    norm_epsilon=1e-6,
    qkv_bias=False,
    logit_shift=False,
    mask_token_id=MASK_TOKEN_ID,
    eos_token_id=156892,
    qk_norm=True,
    attention_mask="block-causal",
    block_size=32,
    rotary_percent=0.5,
    experts=ExpertShape(
        num_experts=256,
        topk=8,
        hidden_size=512,
        layers=(0, *[1] * 19),
        shared_size=512,
        score="sigmoid",
        bias=True,
        groups=8,
        best_groups=4,
        scaling=2.5,
    ),
)
"""LLaDA2.0-mini's and LLaDA2.1-mini's shape."""

# Fields with which the published code would compute something else, and what they must be.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "embedding_dropout": (0.0, 0),
    "moe_router_enable_expert_bias": (True,),
    "norm_head": (False,),
    "norm_softmax": (False,),
    "norm_topk_prob": (True,),
    "output_dropout": (0.0, 0),
    "score_function": ("sigmoid",),
    "use_bias": (False,),
    "use_qk_norm": (True,),
    "use_qkv_bias": (False,),
    "use_rmsnorm": (True,),
    "use_sliding_window": (False,),
    "using_split_qkv_in_self_attention": (False,),
}


# LLaDA2.2 goes by the same architecture's name; these its config.json has, and no earlier one.
_LLADA2_2 = ("expert_capacity", "delete_token_id", "split_token_id")


def read_config(config: Config) -> ModelShape:
    """Read the shape of a LLaDA2.0 or 2.1 model.

    Args:
        config: its config.json.

    Returns:
        The shape.

    Raises:
        UserError: naming the field that is missing, broken or not supported.
    """
    later = [f'"{name}"' for name in _LLADA2_2 if config.fields.get(name) is not None]
    if later:
        raise UserError(
            f"{config.source}: {', '.join(later)}: this is a LLaDA2.2, whose blocks choose experts "
            "together and which inserts and deletes tokens; no such pass was written, use a "
            "LLaDA2.0 or 2.1."
        )
    padding = config.fields.get("pad_token_id", DEFAULTS["pad_token_id"])
    config = config.with_defaults({**DEFAULTS, "eos_token_id": padding})
    for name, allowed in _REQUIRED.items():
        config.require(name, *allowed)
    shape = llama.read_shape(config, logit_shift=False, qk_norm=True, own_heads=True)
    dense = config.fields["first_k_dense_replace"]
    if not isinstance(dense, int) or not 0 <= dense <= shape.num_layers:
        raise UserError(
            f'{config.source}: "first_k_dense_replace" is {dense!r}; a number up to '
            f"{shape.num_layers} is needed."
        )
    inner = config.number("moe_intermediate_size", int)
    shared = config.fields["num_shared_experts"]
    return dataclasses.replace(
        shape,
        attention_mask="block-causal",
        block_size=config.number("block_size", int),
        rotary_percent=config.number("partial_rotary_factor", float),
        experts=ExpertShape(
            num_experts=config.number("num_experts", int),
            topk=config.number("num_experts_per_tok", int),
            hidden_size=inner,
            layers=(*[0] * dense, *[1] * (shape.num_layers - dense)),
            shared_size=inner * config.number("num_shared_experts", int) if shared else None,
            score="sigmoid",
            bias=True,
            groups=config.number("n_group", int),
            best_groups=config.number("topk_group", int),
            scaling=config.number("routed_scaling_factor", float),
        ),
    )


def write_config(shape: ModelShape) -> dict[str, Any]:
    """Write the config.json of a LLaDA2.0 model; the inverse of :func:`read_config`.

    Args:
        shape: the shape, with experts whose scores are sigmoids.

    Returns:
        The fields.

    Raises:
        UserError: the shape has no experts.
    """
    experts = shape.experts
    if experts is None:
        raise UserError(f"a {ARCHITECTURE} has experts.")
    dense = experts.layers.index(1) if 1 in experts.layers else shape.num_layers
    own = {
        **{name: allowed[0] for name, allowed in _REQUIRED.items()},
        "architectures": [ARCHITECTURE],
        "block_size": shape.block_size,
        "first_k_dense_replace": dense,
        "head_dim": shape.head_dim,
        "model_type": "llada2_moe",
        "moe_intermediate_size": experts.hidden_size,
        "n_group": experts.groups,
        "num_experts": experts.num_experts,
        "num_experts_per_tok": experts.topk,
        "num_shared_experts": (experts.shared_size or 0) // experts.hidden_size,
        "partial_rotary_factor": shape.rotary_percent,
        "routed_scaling_factor": experts.scaling,
        "topk_group": experts.best_groups,
    }
    return llama.write_shape(shape, own)
