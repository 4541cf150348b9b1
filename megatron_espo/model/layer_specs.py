"""Layer specs of a bidirectional transformer, for Transformer Engine and for plain PyTorch."""

import copy
from functools import partial

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_espo.model.attention import (
    BidirectionalAttention,
    selecting_bias_dropout_add,
    transformer_engine_attention,
)
from megatron_espo.model.cpu.feed_forward import GatedFeedForward
from megatron_espo.model.cpu.linear import (
    ColumnParallelLinear,
    FeatureMajorColumnParallelLinear,
    RowParallelLinear,
)
from megatron_espo.model.cpu.rotary import RotatingSelfAttention
from megatron_espo.model.experts import CountingRouter


class RMSNorm(torch.nn.RMSNorm):
    """PyTorch's RMS norm whose weight takes part in sequence parallelism.

    Megatron's wrapper of the PyTorch norms refuses sequence parallelism although the norm works
    position by position: all it takes is to mark the weight, so that Megatron sums its gradient
    over the tensor-parallel ranks.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object
    ) -> None:
        super().__init__(normalized_shape=hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def _use_plain_layers(experts: MoESubmodules) -> None:
    """Let the shared expert of a mixture, which every token passes, have the faster kernels."""
    if experts.shared_experts is not None:
        shared = experts.shared_experts.keywords["submodules"]
        shared.linear_fc1, shared.linear_fc2 = ColumnParallelLinear, RowParallelLinear


def bidirectional_block_spec(
    config: TransformerConfig,
    use_transformer_engine: bool,
    vp_stage: int | None = None,
    is_last_stage: bool = True,
) -> TransformerBlockSubmodules:
    """Build this pipeline stage's layer specs with attention over the whole sequence.

    The mask type is ``padding`` in both backends: every position sees every position that is not
    right padding. The last layer can leave out the rows that nothing reads (see
    passes/state.py). Everything else is Megatron's own block.

    Args:
        config: the model's transformer config.
        use_transformer_engine: build Transformer Engine layers, else Megatron's local ones.
        vp_stage: virtual pipeline stage, if any.
        is_last_stage: whether this is the stage of the output head.

    Returns:
        Submodules for GPTModel.
    """
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine, normalization=config.normalization, vp_stage=vp_stage
    )
    # Megatron names one spec several times: the last layer's must be one of its own.
    block.layer_specs = [copy.deepcopy(layer) for layer in block.layer_specs]
    for layer in block.layer_specs:
        part = layer.submodules.mlp.keywords.get("submodules")
        if isinstance(part, MoESubmodules):
            part.router = CountingRouter
        attention = layer.submodules.self_attention
        attention.params["attn_mask_type"] = AttnMaskType.padding
        if use_transformer_engine and config.context_parallel_size == 1:
            attention.submodules.core_attention = transformer_engine_attention()
        else:
            attention.submodules.core_attention = BidirectionalAttention
        if not use_transformer_engine:
            layer.submodules.input_layernorm = RMSNorm
            layer.submodules.pre_mlp_layernorm = RMSNorm
            attention.module = RotatingSelfAttention
            attention.submodules.linear_qkv = ColumnParallelLinear
            attention.submodules.linear_proj = RowParallelLinear
            if config.qk_layernorm:
                attention.submodules.q_layernorm = RMSNorm
                attention.submodules.k_layernorm = RMSNorm
            feed_forward = layer.submodules.mlp.keywords["submodules"]
            if isinstance(feed_forward, MoESubmodules):
                _use_plain_layers(feed_forward)
                # Transformer Engine's spec has no layer to fuse this norm with; under its own name
                # checkpoints fit both.
                layer.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
            if isinstance(feed_forward, MLPSubmodules):
                layer.submodules.mlp = partial(
                    GatedFeedForward.as_mlp_submodule, **layer.submodules.mlp.keywords
                )
                feed_forward.linear_fc1 = FeatureMajorColumnParallelLinear
                feed_forward.linear_fc2 = RowParallelLinear
    if is_last_stage and block.layer_specs:
        block.layer_specs[-1].submodules.self_attn_bda = selecting_bias_dropout_add
    if not use_transformer_engine:
        block.layer_norm = RMSNorm
    return block
