"""Which settings of Megatron a masked-diffusion pass was written for; all others are refused.

A pass here is not always Megatron's: the last layer may leave out rows, a window may attend to
kept keys and values, context-parallel ranks gather theirs, logits may be shifted, and plain layers
rotate and gate in functions of their own. A setting that these do not know of would be left out in
silence, in some passes or in all. So each field of Megatron's transformer config is in one class:

* free: where and how fast a pass runs, how it rounds, how weights begin. What it means stays;
* known: the values that tests compare between all kinds of passes and with Megatron's own layers;
* refused: everything else must be at Megatron's default, fields of later versions, too.

tests/unit/test_supported.py fails for a field that nobody has put into a class.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_espo.errors import UserError

# Fields of the config, and arguments that Megatron makes fields from.
FREE = frozenset(
    # Which ranks and kernels compute what, and when they wait for each other.
    """
    tensor_model_parallel_size pipeline_model_parallel_size pipeline_model_parallel_comm_backend
    context_parallel_size sequence_parallel microbatch_group_size_per_vp_stage overlap_p2p_comm
    overlap_p2p_comm_warmup_flush use_ring_exchange_p2p pipeline_model_parallel_layout
    account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split
    gradient_accumulation_fusion masked_softmax_fusion bias_dropout_fusion apply_rope_fusion
    use_te_activation_func attention_backend flash_attention_version deterministic_mode
    clone_scatter_output_in_embedding barrier_with_L1_time config_logger_dir
    decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers no_persist_layer_norm
    bias_swiglu_fusion bias_gelu_fusion
    expert_model_parallel_size expert_tensor_parallel_size moe_grouped_gemm moe_permute_fusion
    """.split()
    # Precision. In what the output head and log-probabilities compute is the project's own.
    + """
    fp16 bf16 attention_softmax_in_fp32 disable_bf16_reduced_precision_matmul fp8 fp8_recipe
    fp8_margin fp8_interval fp8_amax_history_len fp8_amax_compute_algo fp8_wgrad
    first_last_layers_bf16 num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 fp8_param_gather
    moe_router_dtype
    """.split()
    # How weights begin, what is computed again, and losses that are not used here.
    + """
    seed perform_initialization use_cpu_initialization init_method_std embedding_init_method_std
    init_method_xavier_uniform
    recompute_granularity recompute_method recompute_num_layers recompute_modules
    distribute_saved_activations cross_entropy_loss_fusion cross_entropy_fusion_impl
    """.split()
)

# No flag sets these: Megatron or this package derives them.
DERIVED = frozenset(
    """
    timers finalize_model_grads_func grad_scale_func moe_grad_scale_func mtp_grad_scale_func
    no_sync_func grad_sync_func param_sync_func experimental_attention_variant_loss_scale_func
    enable_autocast autocast_dtype params_dtype pipeline_dtype use_te_rng_tracker
    num_microbatches_with_partial_activation_checkpoints virtual_pipeline_model_parallel_size
    variable_seq_lengths batch_p2p_comm batch_p2p_sync deallocate_pipeline_outputs
    num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage gtp_weight_remat_size
    expert_gtp_weight_remat_size tp_comm_atomic_ag tp_comm_atomic_rs tp_comm_overlap_disable_qkv
    tp_comm_overlap_disable_fc1 cpu_offloading _cpu_offloading_context cpu_offloading_activations
    cpu_offloading_weights cpu_offloading_double_buffering softmax_scale gated_linear_unit
    activation_func activation_func_fp8_input_store bias_activation_fusion persist_layer_norm
    memory_efficient_layer_norm fused_single_qkv_rope num_moe_experts init_method moe_token_dropping
    moe_router_topk_limited_devices output_layer_init_method embedding_init_method fp8_param
    fp4_param fp8_dot_product_attention fp8_multi_head_attention tp_only_amax_red use_kitchen
    cuda_graph_use_single_mempool cuda_graph_retain_backward_graph cuda_graph_scope
    disable_parameter_transpose_cache inference_sampling_seed use_inference_optimized_layers
    heterogeneous_block_specs hetereogenous_dist_checkpoint quant_recipe
    """.split()
)

ANY = "any"

# What the model is: a checkpoint decides it. Arguments and their values.
MODEL: dict[str, Any] = {
    "num_layers": ANY,
    "hidden_size": ANY,
    "ffn_hidden_size": ANY,
    "num_attention_heads": ANY,
    "num_query_groups": ANY,
    "kv_channels": ANY,
    "normalization": ("RMSNorm",),
    "layernorm_epsilon": ANY,
    "qk_layernorm": ANY,
    "add_bias_linear": ANY,
    "add_qkv_bias": ANY,
    "swiglu": ANY,
    "squared_relu": ANY,
    "quick_geglu": ANY,
    "glu_linear_offset": ANY,
    "activation_func_clamp_value": ANY,
    "untie_embeddings_and_output_weights": ANY,
    "position_embedding_type": ("rope", "learned_absolute", "none"),
    "rotary_base": ANY,
    "rotary_percent": ANY,
    "rotary_interleaved": ANY,
    "rotary_seq_len_interpolation_factor": ANY,
    "use_rope_scaling": ANY,
    "rope_scaling_factor": ANY,
    # Mixtures of experts; model/experts.py says what of it fits together.
    "num_experts": ANY,
    "moe_layer_freq": ANY,
    "moe_ffn_hidden_size": ANY,
    "moe_shared_expert_intermediate_size": ANY,
    "moe_router_topk": ANY,
    "moe_router_num_groups": ANY,
    "moe_router_group_topk": ANY,
    "moe_router_topk_scaling_factor": ANY,
    "moe_router_score_function": ("softmax", "sigmoid"),
    "moe_router_pre_softmax": ANY,
    "moe_router_enable_expert_bias": ANY,
}

# What a run may choose anew for the same model.
OF_RUN: dict[str, Any] = {
    "group_query_attention": ANY,  # the number of groups says it
    "attention_dropout": ANY,
    "hidden_dropout": ANY,
    "transformer_impl": ("transformer_engine", "local"),
    "rope_type": (None, "rope"),
    "moe_router_load_balancing_type": ("none", "aux_loss", "seq_aux_loss"),
    "moe_aux_loss_coeff": ANY,
    "moe_router_bias_update_rate": ANY,
    "moe_token_dispatcher_type": ("alltoall", "allgather"),
    "ckpt_format": ("torch_dist",),
    "dist_ckpt_strictness": (
        "assume_ok_unexpected",
        "log_unexpected",
        "log_all",
        "raise_unexpected",
        "raise_all",
        "ignore_all",
    ),
}

# What Megatron reads for a model, a forward pass or its data besides the fields of its config, and
# what it must be: Megatron's default.
ARGUMENTS: dict[str, Any] = {
    "moe_use_upcycling": False,
    "spec": None,
    "hybrid_layer_pattern": None,
    "hybrid_override_pattern": None,
    "heterogeneous_layers_config_path": None,
    "heterogeneous_layers_config_encoded_json": None,
    "openai_gelu": False,
    "onnx_safe": None,
    "fp16_lm_cross_entropy": False,
    "fp4_param_gather": False,
    "te_precision_config_file": None,
    "kitchen_config_file": None,
    "kitchen_recipe_number": None,
    "add_position_embedding": True,
    "rotary_scaling_factor": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.0,
    "yarn_original_max_position_embeddings": None,
    "yarn_beta_fast": None,
    "yarn_beta_slow": None,
    "yarn_correction_range_round_to_int": None,
    "cache_mla_latents": False,
    "mla_down_proj_fusion": False,
    "cuda_graph_scope_deprecated": None,
    "tp_comm_overlap_cfg": None,
    "use_megatron_fsdp": False,
    "use_torch_fsdp2": False,
    "freeze_all_layers": False,
    "reset_position_ids": False,
    "reset_attention_mask": False,
    "eod_mask_loss": False,
    "fim_data": False,
    "sft": False,
    "perform_rl_step": False,
}

# Flags whose default is another than that of the config's field.
_DEFAULTS: dict[str, Any] = {"cp_comm_type": ["p2p"], "cuda_graph_modules": []}

# Names that are refused, by their beginnings, and why; after a semicolon what to change, unless it
# is to leave the flag out. Of several that fit the longest counts.
REASONS: dict[str, str] = {
    "moe_": "no mixture of experts was tried with it",
    "moe_router_load_balancing_type": "no mixture of experts was tried with it; use none, aux_loss "
    "or seq_aux_loss",
    "moe_token_dispatcher_type": "no mixture of experts was tried with it; use alltoall",
    "moe_router_score_function": "no model here routes so; use sigmoid or softmax",
    "moe_enable_routing_replay": "old, current and reference policies choose their experts anew",
    "use_grouped_gemm_for_shared_expert": "no mixture of experts was tried with it",
    "use_grouped_gemm_for_dense_mlp": "no mixture of experts was tried with it",
    "use_fused_weighted_squared_relu": "no mixture of experts was tried with it",
    "overlap_moe_expert_parallel_comm": "no mixture of experts was tried with it",
    "overlap_dispatch_backward_with_experts_wgrad": "no mixture of experts was tried with it",
    "ep_overlap_early_attn_memory_release": "no mixture of experts was tried with it",
    "high_priority_a2a_comm_stream": "no mixture of experts was tried with it",
    "expert_": "the experts' weights are split by expert and tensor parallelism alone",
    "mtp_": "a masked-diffusion model has no further tokens to predict",
    "dsa_": "every position attends to all others",
    "experimental_attention_variant": "every position attends to all others",
    "linear_": "every position attends to all others",
    "window_": "every position attends to all others, whatever its distance",
    "softmax_type": "attention takes a plain softmax",
    "apply_query_key_layer_scaling": "scores are not scaled by layer",
    "attention_output_gate": "the last layer gives fewer rows than a gate has",
    "log_max_attention_logit": "the fused attention kernels give no scores",
    "qk_clip": "the fused attention kernels give no scores",
    "qk_l2_norm": "no layer here normalizes so; --qk-layernorm is known",
    "no_rope_freq": "all layers rotate alike",
    "position_embedding_type": "windows of a cache and context-parallel parts cannot place it",
    "rope_type": "windows of a cache and context-parallel parts cannot place it",
    "rotary_scaling_factor": "it belongs to yarn, which is refused",
    "mscale": "it belongs to yarn, which is refused",
    "yarn_": "it belongs to yarn, which is refused",
    "multi_latent_attention": "a key/value cache holds keys and values",
    "cache_mla_latents": "it belongs to multi-latent attention, which is refused",
    "mla_": "it belongs to multi-latent attention, which is refused",
    "normalization": "the norms are RMS norms; pass --normalization RMSNorm",
    "layernorm_zero_centered_gamma": "the norms are plain RMS norms",
    "fp32_residual_connection": "plain layers want one type throughout",
    "cuda_graph_": "a captured layer would repeat the first pass's rows and windows",
    "enable_cuda_graph": "a captured layer would repeat the first pass's rows and windows",
    "external_cuda_graph": "a captured layer would repeat the first pass's rows and windows",
    "inference_": "sampling has its own passes here",
    "flash_decode": "sampling has its own passes here",
    "mlp_chunks_for_prefill": "sampling has its own passes here",
    "nccl_all_reduce_for_prefill": "sampling has its own passes here",
    "symmetric_ar_type": "sampling has its own passes here",
    "tp_comm_": "its buffers have one shape, and passes here have many",
    "cp_comm_type": "context-parallel ranks gather keys and values",
    "hierarchical_context_parallel_sizes": "the context-parallel ranks form one group",
    "hybrid_context_parallel": "the context-parallel ranks form one group",
    "defer_embedding_wgrad_compute": "it keeps the states and gradients of every call of the "
    "output head, which reads the masked positions only",
    "calculate_per_token_loss": "losses are averages over sequences",
    "fp8_output_proj": "log-probabilities need the output head in higher precision",
    "fp4": "rows are not padded for FP4; leave it out or use --fp8-format",
    "transformer_impl": "its layers cannot be trained; use transformer_engine or local",
    "use_megatron_fsdp": "its checkpoints fit no other layout; use --use-distributed-optimizer",
    "use_torch_fsdp2": "its checkpoints fit no other layout; use --use-distributed-optimizer",
    "ckpt_format": "checkpoints must fit every layout; use torch_dist",
    "dist_ckpt_strictness": "Megatron's own loading does not take what it returns; use log_all",
    "spec": "the layers are those of megatron_espo/model/layer_specs.py",
    "add_position_embedding": "it has no effect; use --position-embedding-type none",
    "reset_": "rows are not cut into documents",
    "eod_mask_loss": "the masked tokens alone are trained",
    "sft": "Megatron's own fine-tuning is causal; use --sft-train-data",
    "perform_rl_step": "Megatron's own RL is causal; use megatron_espo.training.espo",
}
# What is left of Megatron's settings.
_OTHERS = """
    tensor_parallel_num_weight_shards max_seqlen_per_dp_cp_rank delay_wgrad_compute
    wgrad_deferral_limit cpu_offloading_ fine_grained_ offload_modules min_offloaded_tensor_size
    delay_offload_until_cuda_graph delta_offload_bytes_across_pp_ranks activation_offload_fraction
    apply_residual_connection_post_layernorm test_mode init_model_with_meta_device use_mup mup_
    fused_residual_rmsnorm use_transformer_engine_op_fuser fp8_quantizer_factory
    te_precision_config_file use_kitchen_attention kitchen_ batch_invariant_mode mrope_section
    is_hybrid_model hybrid_ mamba_ use_mamba_mem_eff_path heterogeneous_ mlp_chunks_for_training
    openai_gelu onnx_safe fp16_lm_cross_entropy freeze_all_layers fim_data
"""
REASONS.update(dict.fromkeys(_OTHERS.split(), "no masked-diffusion pass was written for it"))

# Refused arguments that Megatron's validation fills in.
_FILLED_IN = (
    "tensor_parallel_num_weight_shards",
    "expert_tensor_parallel_num_weight_shards",
    "inference_cuda_graph_scope",
)

# Names of flags that are not those of their arguments.
_FLAGS = {
    "layernorm_epsilon": "--norm-epsilon",
    "layernorm_zero_centered_gamma": "--apply-layernorm-1p",
    "add_position_embedding": "--no-position-embedding",
    "use_mamba_mem_eff_path": "--disable-mamba-mem-eff-path",
    "cuda_graph_scope_deprecated": "--cuda-graph-scope",
    "add_bias_linear": "--disable-bias-linear",
    "fp4": "--fp4-format",
}


def flag_of(name: str, value: Any = None) -> str:
    """Name the flag of an argument, with its value unless that is yes or no.

    Args:
        name: the argument.
        value: its value; None leaves it out.

    Returns:
        The flag as a command line has it.
    """
    flag = _FLAGS.get(name, f"--{name.replace('_', '-')}")
    if name not in _FLAGS and value is False:
        flag = f"--no-{name.replace('_', '-')}"
    if value is None or isinstance(value, bool):
        return flag
    values = value if isinstance(value, list | tuple) else [value]
    return " ".join([flag, *(str(getattr(one, "name", one)) for one in values)])


def requirements() -> dict[str, tuple[Any, ...]]:
    """List the arguments of Megatron whose values are limited.

    Returns:
        For each the values that it may have.
    """
    limited: dict[str, tuple[Any, ...]] = {}
    for field in dataclasses.fields(TransformerConfig):
        name = field.name
        if name in FREE or name in DERIVED or name in MODEL or name in OF_RUN:
            continue
        made = field.default_factory
        default = field.default if made is dataclasses.MISSING else made()
        limited[name] = (_DEFAULTS.get(name, default),)
    limited.update({name: (value,) for name, value in ARGUMENTS.items()})
    limited.update({n: values for n, values in {**MODEL, **OF_RUN}.items() if values != ANY})
    return limited


def refusals(args: argparse.Namespace, validated: bool = False) -> Iterator[str]:
    """Say of each setting that no pass was written for what to change.

    Args:
        args: Megatron's arguments; one that is missing is at its default.
        validated: whether they are those after Megatron's own validation, as in a checkpoint. It
            fills in some of what is refused.

    Yields:
        One sentence that names the flag.
    """
    for name, allowed in requirements().items():
        value = getattr(args, name, allowed[0])
        if isinstance(value, list) and len(value) == 1 and not isinstance(allowed[0], list):
            (value,) = value  # of a flag that takes several
        if value not in allowed and not (validated and name in _FILLED_IN):
            reason = reason_of(name) or "this version of Megatron has it new"
            advice = "" if ";" in reason else "; leave it out"
            yield f"{flag_of(name, value)}: {reason}{advice}."


def check_supported(args: argparse.Namespace) -> None:
    """Refuse the settings of Megatron that no masked-diffusion pass was written for.

    Args:
        args: Megatron's arguments before its own validation.

    Raises:
        UserError: naming the first flag to change.
    """
    first = next(refusals(args), None)
    if first is not None:
        raise UserError(first)


def reason_of(name: str) -> str | None:
    """Say why a setting of Megatron is refused.

    Args:
        name: the argument.

    Returns:
        The reason; None for a setting that nobody has decided about.
    """
    fitting = [start for start in REASONS if name.startswith(start)]
    return REASONS[max(fitting, key=len)] if fitting else None
