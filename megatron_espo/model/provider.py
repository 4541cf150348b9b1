"""Builds the model; the only place that names Megatron's GPTModel."""

from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.training import get_args
from megatron.training.argument_utils import core_transformer_config_from_args

from megatron_espo.model.layer_specs import bidirectional_block_spec


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
    return GPTModel(
        config=config,
        transformer_layer_spec=bidirectional_block_spec(
            config, args.transformer_impl == "transformer_engine", vp_stage
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
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
        pg_collection=pg_collection,
        vp_stage=vp_stage,
    )
