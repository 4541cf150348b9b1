"""Command line: Megatron's flags and a group per settings dataclass; the only argparse reader."""

import argparse
import dataclasses
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from megatron.training.argument_utils import ArgumentGroupFactory
from megatron.training.arguments import parse_args, validate_args
from megatron.training.checkpointing import load_args_from_checkpoint
from megatron.training.global_vars import get_tokenizer, set_global_variables
from megatron.training.vocab_utils import calculate_padded_vocab_size

from megatron_espo import device
from megatron_espo.checkpoint.tracker import (
    checkpoint_folder,
    has_checkpoint,
    repair_tracker,
    resumed_iteration,
    stored_tokenizer,
)
from megatron_espo.config import (
    CheckpointConfig,
    DiffusionConfig,
    DpoConfig,
    EspoConfig,
    LaunchConfig,
    LoraConfig,
    MonitorConfig,
    PromptConfig,
    RolloutConfig,
    SftConfig,
    SimulateConfig,
)
from megatron_espo.data.tokenizer import load_tokenizer, special_ids
from megatron_espo.errors import UserError
from megatron_espo.model import fp8
from megatron_espo.model.experts import check_stored_optimizer, settle_experts
from megatron_espo.model.presets import expand_preset
from megatron_espo.model.supported import MODEL, check_supported, flag_of
from megatron_espo.recipes import expand_recipes
from megatron_espo.startup.adapters import (
    SETTINGS,
    Stored,
    check_adapters,
    check_stored_adapters,
    settle_base,
)
from megatron_espo.startup.argument_checks import (
    check_backend,
    check_counts,
    check_layout,
    check_precision,
    check_wandb,
)
from megatron_espo.startup.help import arrange_help
from megatron_espo.startup.save_folder import check_writable
from megatron_espo.startup.schedule import settle_schedule
from megatron_espo.startup.stored import checkpoint_arguments, stored_arguments

# Settings class -> flag prefix. Model settings carry none: they sit beside Megatron's model flags.
_PREFIXES: dict[type, str] = {
    LaunchConfig: "",
    DiffusionConfig: "",
    PromptConfig: "prompt",
    LoraConfig: "lora",
    SftConfig: "sft",
    DpoConfig: "dpo",
    RolloutConfig: "rollout",
    EspoConfig: "espo",
    CheckpointConfig: "save",
    MonitorConfig: "monitor",
    SimulateConfig: "simulate",
}

# The project's own model settings, which a checkpoint decides as it does Megatron's.
_SETTINGS = ("vocab_size", "mask_token_id", "logit_shift", "stop_token_ids")

_ATTENTION = ("attention_mask", "block_size")
# How a run that goes on lets its blocks grow.
_GROWTH = (
    *("block_growth_to", "block_growth_from"),
    *("block_growth_factor", "block_growth_interval", "block_growth_start"),
)

# What must agree between a run and the checkpoint it loads. That there is none has a meaning for
# the last ones.
_COMPARED = (*MODEL, "vocab_size", "mask_token_id", "logit_shift")
_OPTIONAL = (
    "activation_func_clamp_value",
    "rotary_seq_len_interpolation_factor",
    "num_experts",
    "moe_shared_expert_intermediate_size",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_topk_scaling_factor",
)


class _PrefixedGroup(ArgumentGroupFactory):
    """Puts ``--PREFIX-`` before every flag of a dataclass."""

    def __init__(self, config: type, prefix: str) -> None:
        super().__init__(config)
        self.prefix = prefix

    def _build_argparse_kwargs_from_field(self, attribute: Any) -> dict[str, Any]:
        kwargs: dict[str, Any] = super()._build_argparse_kwargs_from_field(attribute)
        if self.prefix:
            kwargs["dest"] = f"{self.prefix}_{attribute.name}"
            kwargs["arg_names"] = [
                f"--{self.prefix}-{name.removeprefix('--')}" for name in kwargs["arg_names"]
            ]
        return kwargs


def add_arguments(
    parser: argparse.ArgumentParser, on_gpus: bool = False
) -> argparse.ArgumentParser:
    """Add the project's flag groups and, without CUDA, the defaults a CPU run needs.

    Args:
        parser: Megatron's parser.
        on_gpus: keep the defaults of GPUs although there may be none (a dry run).

    Returns:
        The parser.
    """
    own = [
        _PrefixedGroup(config, prefix).build_group(parser, title=(config.__doc__ or "").strip())
        for config, prefix in _PREFIXES.items()
    ]
    if not (on_gpus or device.has_cuda()):
        parser.set_defaults(**device.CPU_ARGUMENT_DEFAULTS)
    if device.has_cuda():
        parser.set_defaults(**device.gpu_argument_defaults())
    parser.set_defaults(
        tokenizer_type="HuggingFaceTokenizer",
        use_distributed_optimizer=False,
        # SIGTERM saves and leaves; a checkpoint can be taken up in another layout.
        exit_signal_handler=True,
        # Megatron's own, "allgather", wants as many tokens on every rank.
        moe_token_dispatcher_type="alltoall",
        # As all published mixtures score their experts.
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",
        dist_ckpt_optim_fully_reshardable=True,
        # Megatron's default carries scales from call to call; see fp8.check_policy_arguments.
        fp8_recipe=None,
    )
    for action in parser._actions:
        # Some of Megatron's help texts hold a bare per cent sign, which stops --help.
        if isinstance(action.help, str):
            action.help = re.sub(r"%(?![%(])", "%%", action.help.replace("%%", "%"))
    arrange_help(parser, own)
    return parser


def config_from_args[Config](config: type[Config], args: argparse.Namespace) -> Config:
    """Read one of the settings dataclasses back from the parsed command line.

    Args:
        config: the dataclass.
        args: the parsed arguments.

    Returns:
        An instance of it (not validated).
    """
    prefix = _PREFIXES[config]
    names = [field.name for field in dataclasses.fields(config)]  # type: ignore[arg-type]
    return config(**{name: getattr(args, f"{prefix}_{name}" if prefix else name) for name in names})


def initialize_arguments(
    argv: Sequence[str], prepare: Callable[[argparse.Namespace], None]
) -> argparse.Namespace:
    """Parse, check and publish the arguments of a run.

    Everything a user can get wrong is checked here or in ``prepare``, on every rank and from the
    same data, before the first collective.

    Args:
        argv: the command line without the program name.
        prepare: checks and completes the arguments of the entry point (batch sizes, step counts)
            before Megatron derives others from them.

    Returns:
        Megatron's arguments, global from here on.

    Raises:
        UserError: one sentence that names the flag or file.
    """
    args = _parse(argv, add_arguments)
    for path in (args.load, args.pretrained_checkpoint):
        if path is not None:
            repair_tracker(path)
        if has_checkpoint(path):
            checkpoint_folder(path, args.ckpt_step if path == args.load else None)
    _settle_model(args)
    check_backend(args)
    prepare(args)
    if args.tokenizer_model is None or not os.path.isdir(args.tokenizer_model):
        raise UserError(
            f"--tokenizer-model {args.tokenizer_model}: pass a folder with a Hugging Face "
            "tokenizer (tools/make_tokenizer.py makes one)."
        )
    _validate(args)
    check_wandb(args)
    if args.tensorboard_dir is not None:
        check_writable("--tensorboard-dir", args.tensorboard_dir, args.rank)
    load_tokenizer(args.tokenizer_model)  # says in a sentence what Megatron would not
    set_global_variables(args)
    _complete_from_tokenizer(args)
    settle_base(args, _check_checkpoint(args))
    if args.save is not None:
        check_writable("--save", args.save, args.rank)
    if resumed_iteration(args) and not args.no_load_optim:
        stored = stored_arguments(checkpoint_folder(args.load, resumed_iteration(args)))
        settle_schedule(args, stored, f"--load {args.load}")
        check_stored_optimizer(args, stored, f"--load {args.load}")
    return args


def plan_arguments(
    argv: Sequence[str], prepare: Callable[[argparse.Namespace], None], world_size: int
) -> argparse.Namespace:
    """Parse and check the arguments of a run on GPUs that this machine need not have.

    Checked is what the command line alone decides; nothing is read but a checkpoint's arguments
    where --use-checkpoint-args asks for them, and nothing becomes global.

    Args:
        argv: the command line without the program name.
        prepare: see :func:`initialize_arguments`.
        world_size: ranks of the run.

    Returns:
        Megatron's arguments.

    Raises:
        UserError: one sentence that names the flag.
    """
    args = _parse(argv, partial(add_arguments, on_gpus=True))
    args.rank, args.world_size = 0, world_size
    _settle_model(args)
    check_precision(args)
    prepare(args)
    if args.vocab_size is None:
        raise UserError("--vocab-size is missing; a dry run reads no tokenizer: pass it.")
    _validate(args)
    return args


def _parse(
    argv: Sequence[str], add: Callable[[argparse.ArgumentParser], argparse.ArgumentParser]
) -> argparse.Namespace:
    flags = expand_preset(expand_recipes(argv))
    if any(flag.partition("=")[0] == "--yaml-cfg" for flag in flags):
        # Megatron would take all its arguments from there, and the project's would be missing.
        raise UserError("--yaml-cfg: settings are flags; put them into a file for --recipe.")
    program, sys.argv = sys.argv, [sys.argv[0], *flags]
    try:
        args: argparse.Namespace = parse_args(add)
    finally:
        sys.argv = program
    device.prepare()
    config_from_args(LaunchConfig, args).validate()
    config_from_args(CheckpointConfig, args).validate()
    config_from_args(SimulateConfig, args).validate()
    return args


def _validate(args: argparse.Namespace) -> None:
    """Check the layout and let Megatron derive its arguments."""
    check_layout(args)
    if args.transformer_impl != "transformer_engine" and not _has_fused_gradients():
        args.gradient_accumulation_fusion = False
    if args.save is not None and args.save_interval is None:
        args.save_interval = args.train_iters or sys.maxsize
    if args.vocab_size is not None:
        args.padded_vocab_size = calculate_padded_vocab_size(
            args.vocab_size,
            args.make_vocab_size_divisible_by,
            args.tensor_model_parallel_size,
            False,
        )
    try:
        validate_args(args)
    except (AssertionError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        # Many of Megatron's assertions carry no message: then the line says what is wanted.
        wanted = str(error) or traceback.extract_tb(error.__traceback__)[-1].line
        raise UserError(f"Megatron refuses these arguments: {wanted}") from error
    fp8.check_arguments(args)


def _has_fused_gradients() -> bool:
    """Whether apex's extension is installed, without which Megatron's layers refuse to fuse."""
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def _complete_from_tokenizer(args: argparse.Namespace) -> None:
    """Fill model settings that were not given from the tokenizer, and check them against it."""
    tokenizer = get_tokenizer()
    if args.vocab_size is None:
        args.vocab_size = tokenizer.vocab_size
    elif tokenizer.vocab_size > args.vocab_size:
        raise UserError(
            f"--vocab-size {args.vocab_size} is smaller than the {tokenizer.vocab_size} tokens of "
            f"--tokenizer-model {args.tokenizer_model}."
        )
    ids = special_ids(load_tokenizer(args.tokenizer_model), args.mask_token_id)
    args.mask_token_id = ids.mask_token_id
    args.frozen_embedding_id = ids.pad_token_id if args.padding_embedding == "freeze" else None
    if args.stop_token_ids is None:
        args.stop_token_ids = list(ids.stop_token_ids)
    for flag, value in (
        ("--mask-token-id", [args.mask_token_id]),
        ("--stop-token-ids", args.stop_token_ids),
    ):
        if not all(0 <= token < args.vocab_size for token in value):
            raise UserError(f"{flag} {value} lies outside the vocabulary of {args.vocab_size}.")


def _settle_model(args: argparse.Namespace) -> None:
    """Say what the model is, and refuse what no pass of it was written for."""
    _load_model_settings(args)
    check_counts(args)
    config_from_args(DiffusionConfig, args).validate()
    check_supported(args)
    settle_experts(args)
    check_adapters(args)


def _load_model_settings(args: argparse.Namespace) -> None:
    """Take the model's shape and settings from a checkpoint, with --use-checkpoint-args."""
    if not args.use_checkpoint_args:
        return
    source = "load" if has_checkpoint(args.load) else "pretrained_checkpoint"
    if not has_checkpoint(getattr(args, source)):
        raise UserError(
            f"--use-checkpoint-args: there is no checkpoint in --load {args.load} or "
            f"--pretrained-checkpoint {args.pretrained_checkpoint}."
        )
    tokenizer = args.tokenizer_model
    root = getattr(args, source)
    # Says in a sentence what Megatron would not.
    stored_arguments(checkpoint_folder(root, args.ckpt_step if source == "load" else None))
    loaded = load_args_from_checkpoint(args, load_arg=source)
    # Megatron takes some of them itself.
    adapted = getattr(loaded[1], "lora_rank", None) is not None
    for name in (*MODEL, *_SETTINGS, *(SETTINGS if adapted else ())):
        value = getattr(loaded[1], name, None)
        if value is not None or (name in _OPTIONAL and hasattr(loaded[1], name)):
            setattr(args, name, value)
    if args.attention_mask is None:
        # Unlike the rest it may be chosen anew: models are adapted to blocks, and to larger ones.
        for name in _ATTENTION:
            setattr(args, name, getattr(loaded[1], name, None))
        if source == "load" and getattr(loaded[1], "block_growth_to", None) is not None:
            for name in _GROWTH:
                setattr(args, name, getattr(loaded[1], name))
    args.tokenizer_model = tokenizer or stored_tokenizer(root, loaded[1])
    # The padding of the vocabulary depends on the layout; it is worked out anew.
    args.padded_vocab_size = None
    args.iteration = 0


def _check_checkpoint(args: argparse.Namespace) -> list[Stored]:
    """Compare the model with that of the checkpoints to load, before Megatron reads them.

    Returns:
        Those that are there.
    """
    found = []
    for flag, path in (
        ("--load", args.load),
        ("--pretrained-checkpoint", args.pretrained_checkpoint),
    ):
        if path is None:
            continue
        stored = checkpoint_arguments(path)
        if stored is None:
            if flag == "--pretrained-checkpoint" or args.exit_on_missing_checkpoint:
                raise UserError(f"{flag} {path}: no checkpoint there.")
            continue
        fp8.check_stored(stored, args.transformer_impl, f"{flag} {path}")
        found.append(Stored(flag, path, stored))
        check_stored_adapters(args, found[-1])
        if args.attention_mask is None and getattr(stored, "attention_mask", None) is not None:
            raise UserError(
                f"{flag} {path} holds a model of --attention-mask {stored.attention_mask} "
                f"--block-size {stored.block_size}; pass these, --use-checkpoint-args, or full."
            )
        for name in _COMPARED:
            theirs, ours = _model_field(stored, name), _model_field(args, name)
            stands = theirs is not None or (name in _OPTIONAL and hasattr(stored, name))
            if stands and theirs != ours:
                raise UserError(
                    f"{flag} {path} holds another model: {flag_of(name)} is {theirs} there and "
                    f"{ours} here; pass --use-checkpoint-args or the checkpoint's value."
                )
    return found


def _model_field(args: argparse.Namespace, name: str) -> Any:
    if name == "num_query_groups" and not args.group_query_attention:
        # Without grouped queries the number has no meaning, and Megatron writes several.
        return args.num_attention_heads
    return getattr(args, name, None)
