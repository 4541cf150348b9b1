"""Loads a checkpoint for sampling and evaluation, without an optimizer."""

import argparse
from collections.abc import Callable, Sequence

from megatron.core.enums import ModelType
from megatron.training import training as megatron_training

from megatron_espo.config import EspoConfig, RolloutConfig
from megatron_espo.console import captured
from megatron_espo.conversion.hf_cache import converted_checkpoint
from megatron_espo.data.tokenizer import FastTokenizer, load_tokenizer
from megatron_espo.errors import UserError
from megatron_espo.evaluation.problems import (
    TaskData,
    blend_of,
    load_task_data,
    load_workers,
)
from megatron_espo.model.experts import check_uneven_rows
from megatron_espo.model.handle import DiffusionModel
from megatron_espo.startup.arguments import config_from_args, initialize_arguments
from megatron_espo.startup.setup import (
    block_length,
    build_model,
    diffusion_model,
    initialize_process_groups,
    pad_multiple,
)
from megatron_espo.startup.stored import checkpoint_arguments, reading_checkpoint
from megatron_espo.tasks import Task


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name a model of another kind than Megatron's ``--load``."""
    parser.add_argument(
        "--hf",
        help="Hugging Face folder or name on the hub (LLaDA, Dream) instead of --load; converted "
        "once and kept",
    )
    parser.add_argument(
        "--hf-cache",
        help="where to keep converted checkpoints (default: ~/.cache/megatron_espo)",
    )


def checkpoint_flags(options: argparse.Namespace) -> list[str]:
    """Turn ``--hf`` into ``--load`` of a converted checkpoint.

    Args:
        options: values of :func:`add_checkpoint_arguments`.

    Returns:
        Flags for :func:`load_model`.

    Raises:
        UserError: the folder cannot be converted.
    """
    if options.hf is None:
        return []
    return ["--load", converted_checkpoint(options.hf, options.hf_cache)]


def validate_sampling(config: RolloutConfig, args: argparse.Namespace) -> None:
    """Check sampling settings against a model.

    Args:
        config: the settings.
        args: parsed arguments, with the checkpoint's settings.

    Raises:
        UserError: naming the flag.
    """
    config.validate(args.logit_shift, pad_multiple(args), block_length(args))


def prepare_arguments(args: argparse.Namespace) -> None:
    """Check the arguments and fill in what only training needs.

    Without --bf16 or --fp16 the checkpoint's type is taken.

    Args:
        args: parsed arguments.

    Raises:
        UserError: naming the flag.
    """
    validate_sampling(config_from_args(RolloutConfig, args), args)
    if args.load is None:
        raise UserError("--load is missing: the folder of the checkpoint (or --hf).")
    if not (args.bf16 or args.fp16) and (stored := checkpoint_arguments(args.load)):
        args.bf16, args.fp16 = stored.bf16, stored.fp16
    check_uneven_rows(args, "sampling")
    args.exit_on_missing_checkpoint = True
    args.skip_train = args.no_load_optim = args.no_load_rng = True
    args.perform_initialization = False  # every weight comes from the checkpoint
    args.exit_signal_handler = False  # nothing to save: a signal ends the process
    args.micro_batch_size, args.global_batch_size = 1, None
    args.train_iters, args.lr = 1, 0.0
    if args.seq_length is None:
        args.seq_length = args.max_position_embeddings or 4096
    if args.max_position_embeddings is None:
        args.max_position_embeddings = args.seq_length


def load_model(
    argv: Sequence[str],
    prepare: Callable[[argparse.Namespace], None] = prepare_arguments,
) -> tuple[DiffusionModel, argparse.Namespace]:
    """Build the model that the command line describes and load its checkpoint.

    The shape comes from the checkpoint.

    Args:
        argv: flags.
        prepare: checks and completes the parsed arguments.

    Returns:
        The model in evaluation mode, and Megatron's arguments.
    """
    with captured(aside=True) as output:  # Megatron's start-up is not the result
        args = initialize_arguments(["--use-checkpoint-args", *argv], prepare)
        store = initialize_process_groups(args)
        megatron_training.initialize_megatron(store=store)
        with reading_checkpoint(args.load):
            chunks, _, _ = megatron_training.setup_model_and_optimizer(
                ModelType.encoder_or_decoder, build_model, checkpointing_context={}
            )
        output.settle(None, argv, args.verbose)
    for chunk in chunks:
        chunk.eval()
    return diffusion_model(chunks), args


def load_eval_problems(
    args: argparse.Namespace,
) -> tuple[Task, FastTokenizer, TaskData]:
    """Load what --espo-task, --tokenizer-model and --espo-eval-data name.

    Args:
        args: Megatron's arguments.

    Returns:
        The task, the tokenizer, and the held-out problems.

    Raises:
        UserError: naming the flag or the line of the file.
    """
    espo = config_from_args(EspoConfig, args)
    task, tokenizer = load_workers(espo), load_tokenizer(args.tokenizer_model)
    if (blend := blend_of(task)) is not None:
        raise UserError(
            f"--espo-task {espo.task}: tasks are evaluated one at a time; pass one of "
            f"{', '.join(blend.parts)} with its --espo-eval-data."
        )
    data = load_task_data(task, espo.eval_data, tokenizer, args, espo.eval_samples)
    if data is None:
        raise UserError("--espo-eval-data is missing: the problems to evaluate on.")
    return task, tokenizer, data
