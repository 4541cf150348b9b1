"""Builds the model; the only place that names Megatron's GPTModel."""

from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.training import get_args
from megatron.training.argument_utils import core_transformer_config_from_args
from torch import Tensor

from megatron_espo.adapters.base import adapt, lora_settings
from megatron_espo.device import skip_interception
from megatron_espo.model.cpu.embedding import RowwiseEmbedding
from megatron_espo.model.experts import is_balanced, shares_experts
from megatron_espo.model.float_logits import use_float_logits
from megatron_espo.model.layer_specs import bidirectional_block_spec
from megatron_espo.model.padding_embedding import freeze_row
from megatron_espo.model.weight_gradients import built_unfused, fuse_layers
from megatron_espo.passes.state import current_pass


def model_provider(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> GPTModel:
    """Build one pipeline stage of the bidirectional model from Megatron's arguments.

    Args:
        pre_process: whether this stage embeds the tokens.
        post_process: whether this stage holds the output head.
        vp_stage: virtual pipeline stage, if any.
        config: transformer config; made from the arguments if None.
        pg_collection: process groups.

    Returns:
        The stage.
    """
    args = get_args()
    if config is None:
        config = core_transformer_config_from_args(args)
    # Megatron waits for the device after each exchange between pipeline stages, for the sake of a
    # bug in old versions of PyTorch (its own words); a denoising step has several of them.
    config.batch_p2p_sync = False
    # Stages then tell each other the shape of what they send. Not an argument of Megatron's: its
    # config refuses it beside the default of a setting for mixtures of experts.
    config.variable_seq_lengths = getattr(args, "variable_widths", False)
    with_te = args.transformer_impl == "transformer_engine"
    # Frozen weights have no buffer to add a gradient to.
    adapted = lora_settings(args).rank is not None
    fused = config.gradient_accumulation_fusion and with_te and not adapted
    with built_unfused(config, fused or adapted):
        model = GPTModel(
            config=config,
            transformer_layer_spec=bidirectional_block_spec(
                config, with_te, vp_stage, post_process
            ),
            vocab_size=args.padded_vocab_size,
            max_sequence_length=args.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            parallel_output=True,
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
            position_embedding_type=args.position_embedding_type,
            rotary_percent=args.rotary_percent,
            rotary_base=args.rotary_base,
            rope_scaling=args.use_rope_scaling,
            rope_scaling_factor=args.rope_scaling_factor,
            seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )
    model.counts_tokens = is_balanced(config)
    model.same_tokens = config.moe_token_dispatcher_type == "allgather" and shares_experts(args)
    frozen = getattr(args, "frozen_embedding_id", None)
    if pre_process and frozen is not None:
        freeze_row(model.embedding.word_embeddings, frozen)
    if fused:
        fuse_layers(model.decoder)
    if pre_process:
        model.embedding.word_embeddings.__class__ = RowwiseEmbedding
    if post_process:
        # In chunks the weight's gradient is added up in the buffer, where there is one.
        chunk = getattr(args, "head_chunk", None)
        model.output_layer.chunk_rows = chunk
        use_float_logits(model.output_layer, fused or chunk is not None)
    if post_process and model.decoder.layers:
        # Recomputing the core attention would run it after the pass whose rows it selects. The
        # fused kernel keeps no scores, so that there is next to nothing to save.
        model.decoder.layers[-1].self_attention.checkpoint_core_attention = False
    if model.position_embedding_type == "rope":
        model.rotary_pos_emb.register_forward_hook(_rotate_window)
        # Context-parallel ranks take contiguous parts here, see passes/pipeline.py: without a
        # causal mask there is no load to balance.
        model.rotary_pos_emb.cp_group = None
    adapt(model, args)
    skip_interception(model.decoder)
    if post_process:
        skip_interception(model.output_layer)
    return model


def _rotate_window(rotary: Any, arguments: Any, output: Tensor) -> Tensor | None:
    """Give the positions of a window their own rotation: ``[w, b, 1, d]`` for ``[w, 1, 1, d]``.

    A context-parallel rank's part of the positions is the same in all rows: ``[w, 1, 1, d]``.
    """
    state = current_pass()
    if state is None or state.positions is None:
        return None
    table = rotary.forward(state.width)
    return table[state.positions.t() if state.cache else state.positions[0, :, None], 0]
