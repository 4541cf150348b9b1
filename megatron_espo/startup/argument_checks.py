"""Checks of a run's flags against each other and against this machine, on every rank alike.

What Megatron would find out only after the process groups have started, or would not say in a
sentence.
"""

import argparse
import importlib.util
import math

import torch

from megatron_espo import device
from megatron_espo.environment import check_environment, check_ranks, transformer_engine
from megatron_espo.errors import UserError
from megatron_espo.model import fp8

# Flags that need Transformer Engine, and whether they need its layers, too.
_OF_TRANSFORMER_ENGINE = {
    "use_te_activation_func": True,
    "te_rng_tracker": False,
    "use_precision_aware_optimizer": False,
}

_COUNTS = (
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size",
    "num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size",
    "kv_channels", "vocab_size", "seq_length", "max_position_embeddings", "micro_batch_size",
    "expert_model_parallel_size", "expert_tensor_parallel_size", "num_experts", "moe_router_topk",
    "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "moe_router_num_groups",
    "moe_router_group_topk", "global_batch_size", "save_interval", "log_interval",
    "make_vocab_size_divisible_by",
)  # fmt: skip


def check_layout(args: argparse.Namespace) -> None:
    """Check that the model can be split as asked.

    Args:
        args: parsed arguments.

    Raises:
        UserError: naming the flag to change.
    """
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    cp, world = args.context_parallel_size, args.world_size
    if world % (tp * pp * cp):
        raise UserError(
            f"{world} ranks cannot be split into --tensor-model-parallel-size {tp} x "
            f"--pipeline-model-parallel-size {pp} x --context-parallel-size {cp}; start a multiple "
            f"of {tp * pp * cp} ranks or change the sizes."
        )
    for name in ("num_layers", "hidden_size", "num_attention_heads"):
        if getattr(args, name) is None:
            raise UserError(f"--{name.replace('_', '-')} is missing; pass it or a --preset.")
    if args.num_attention_heads % tp:
        raise UserError(
            f"--num-attention-heads {args.num_attention_heads} is not divisible by "
            f"--tensor-model-parallel-size {tp}."
        )
    if args.group_query_attention and args.num_query_groups % tp and tp % args.num_query_groups:
        raise UserError(
            f"--num-query-groups {args.num_query_groups} cannot be split over "
            f"--tensor-model-parallel-size {tp}."
        )
    if args.group_query_attention and tp > args.num_query_groups:
        raise UserError(
            f"--tensor-model-parallel-size {tp} exceeds --num-query-groups "
            f"{args.num_query_groups}; use at most {args.num_query_groups}."
        )
    if args.ffn_hidden_size is not None and args.ffn_hidden_size % tp:
        raise UserError(
            f"--ffn-hidden-size {args.ffn_hidden_size} is not divisible by "
            f"--tensor-model-parallel-size {tp}."
        )
    if args.vocab_size is not None and not args.pad_vocab_size and args.vocab_size % tp:
        raise UserError(
            f"--vocab-size {args.vocab_size} is not divisible by --tensor-model-parallel-size "
            f"{tp}; leave out --no-pad-vocab-size."
        )
    uneven = (
        args.decoder_first_pipeline_num_layers
        or args.decoder_last_pipeline_num_layers
        or args.pipeline_model_parallel_layout
    )
    if not uneven and args.num_layers % pp:
        raise UserError(
            f"--num-layers {args.num_layers} is not divisible by "
            f"--pipeline-model-parallel-size {pp}; change one, or set "
            "--decoder-first-pipeline-num-layers."
        )
    if cp > 1 and args.rollout_cache != "none":
        raise UserError(
            f"--rollout-cache {args.rollout_cache} keeps all positions of a row on one rank; use "
            "none with --context-parallel-size above 1."
        )


def check_counts(args: argparse.Namespace) -> None:
    """Check that what is counted is at least one, before anything is divided by it.

    Args:
        args: parsed arguments.

    Raises:
        UserError: naming the flag to change.
    """
    for name in _COUNTS:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1.")


def check_schedule(args: argparse.Namespace) -> None:
    """Check the learning rate and its schedule.

    Args:
        args: parsed arguments, with the number of steps.

    Raises:
        UserError: naming the flag to change.
    """
    if not args.skip_train:
        if args.lr is None:
            raise UserError("--lr is missing: the highest learning rate of the run.")
        if not 0.0 < args.lr < math.inf:
            raise UserError(f"--lr {args.lr} must be a positive number.")
        if args.min_lr is not None and not 0.0 <= args.min_lr <= args.lr:
            raise UserError(f"--min-lr {args.min_lr} must lie between 0 and --lr {args.lr}.")
    steps = args.lr_decay_iters or args.train_iters
    if steps and args.lr_warmup_iters >= steps:
        raise UserError(
            f"--lr-warmup-iters {args.lr_warmup_iters} must be fewer than the {steps} steps of the "
            "learning-rate schedule."
        )
    if steps and args.lr_decay_style == "WSD" and (args.lr_wsd_decay_iters or 0) > steps:
        raise UserError(
            f"--lr-wsd-decay-iters {args.lr_wsd_decay_iters} must be no more than the {steps} "
            "steps of the learning-rate schedule."
        )


def check_wandb(args: argparse.Namespace) -> None:
    """Check what Weights & Biases needs, which Megatron finds out on the last rank alone.

    Args:
        args: parsed arguments.

    Raises:
        UserError: naming the flag to change.
    """
    if not args.wandb_project:
        return
    if not args.wandb_exp_name:
        raise UserError("--wandb-project needs --wandb-exp-name, the name of the run; pass it.")
    if not (args.wandb_save_dir or args.save):
        raise UserError("--wandb-project writes to --wandb-save-dir or --save; pass one of them.")
    if importlib.util.find_spec("wandb") is None:
        raise UserError("--wandb-project: the package wandb is missing; pip install wandb.")


def check_backend(args: argparse.Namespace) -> None:
    """Check that this machine has the layers, the packages and the environment for a run.

    Args:
        args: parsed arguments; the FP8 recipe is chosen if there is none.

    Raises:
        UserError: naming the flag or the variable to change.
    """
    if args.transformer_impl == "transformer_engine":
        if not device.has_cuda():
            raise UserError(
                "--transformer-impl transformer_engine needs a GPU; use local on this machine."
            )
        problem = transformer_engine().problem
        if problem is not None:
            raise UserError(
                f"--transformer-impl transformer_engine: {problem}, or use --transformer-impl "
                "local."
            )
    if device.has_cuda():
        check_ranks(torch.cuda.device_count())
    check_precision(args)
    _check_needs(args)
    if args.fp8:
        fp8.check_device(args.fp8_recipe)
    capability = torch.cuda.get_device_capability() if device.has_cuda() else None
    check_environment(args, capability)


def _check_needs(args: argparse.Namespace) -> None:
    """Refuse flags of Transformer Engine where there is none, which Megatron finds out late."""
    for name, layers in _OF_TRANSFORMER_ENGINE.items():
        flag = f"--{name.replace('_', '-')}"
        if not getattr(args, name):
            continue
        if layers and args.transformer_impl != "transformer_engine":
            raise UserError(f"{flag} needs --transformer-impl transformer_engine; leave it out.")
        if not transformer_engine().usable:
            raise UserError(f"{flag}: {transformer_engine().problem}, or leave it out.")
    again = args.recompute_modules or () if args.recompute_granularity == "selective" else ()
    if "layernorm" in again and not transformer_engine().usable:
        raise UserError(
            f"--recompute-modules layernorm: {transformer_engine().problem}, or leave it out."
        )


def check_precision(args: argparse.Namespace) -> None:
    """Check that FP8 has its layers, and choose a recipe where none is given.

    Args:
        args: parsed arguments; the recipe is set.

    Raises:
        UserError: naming the flag to change.
    """
    if args.fp8_recipe is None:
        # Megatron's optimizer reads the recipe even without FP8: there its own default stays.
        args.fp8_recipe = fp8.DEFAULT_RECIPE if args.fp8 else "delayed"
    if args.fp8 and args.transformer_impl != "transformer_engine":
        raise UserError("--fp8-format needs --transformer-impl transformer_engine.")
