"""Pre-training and fine-tuning through Megatron's own training loop.

``torchrun -m megatron_espo.training.pretrain [Megatron flags]`` pre-trains on .bin/.idx data;
with ``--sft-train-data FILE`` it fine-tunes on JSONL instead.
"""

import argparse
import contextlib
import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from megatron.core.datasets.utils import Split
from megatron.core.enums import ModelType
from megatron.training import get_args, get_tensorboard_writer, get_tokenizer
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.training import pretrain

from megatron_espo.checkpoint.retention import Keeper
from megatron_espo.checkpoint.tracker import checkpoint_folder, resumed_iteration
from megatron_espo.config import DiffusionConfig, SftConfig
from megatron_espo.console import filter_lines, say
from megatron_espo.data.atomic_folder import full_disk_named
from megatron_espo.data.corpus import split_spans
from megatron_espo.data.indexed import Datasets, pretrain_datasets_from_args
from megatron_espo.data.sft_dataset import SftDataset
from megatron_espo.errors import UserError
from megatron_espo.megatron_patches import around_each_save
from megatron_espo.model.experts import check_uneven_rows
from megatron_espo.monitor.tensorboard import VERSUS_SAMPLES, begin_events
from megatron_espo.monitor.training_lines import training_line
from megatron_espo.passes.block_mask import block_attention
from megatron_espo.passes.shapes import Shapes
from megatron_espo.startup.argument_checks import check_schedule
from megatron_espo.startup.arguments import config_from_args
from megatron_espo.startup.save_folder import open_keeper, own_save_folder
from megatron_espo.startup.setup import (
    build_model,
    initialize_process_groups,
    run_entry_point,
    sequence_split,
)
from megatron_espo.startup.stored import stored_arguments
from megatron_espo.supervised.blocks import begin_growth
from megatron_espo.supervised.forward_step import forward_step
from megatron_espo.supervised.rows import (
    epoch_steps,
    is_readable,
    row_shapes,
    rows_of,
    sft_dataset,
    width_multiple,
)
from megatron_espo.training import entry


def prepare_arguments(args: argparse.Namespace) -> None:
    """Check and complete the arguments of pre-training and fine-tuning.

    Args:
        args: parsed arguments.

    Raises:
        UserError: naming the flag.
    """
    if args.seq_length is None or args.micro_batch_size is None:
        raise UserError("--seq-length and --micro-batch-size are missing; pass both.")
    sft = config_from_args(SftConfig, args)
    sft.validate()
    begin_growth(args)
    if not (args.train_iters or args.train_samples or args.skip_train or sft.epochs):
        raise UserError(
            "--train-iters is missing: how many steps to train; or --sft-epochs with "
            "--sft-train-data."
        )
    if args.skip_train and not (args.train_iters or args.train_samples or sft.epochs):
        args.train_iters = 1  # Megatron builds a training set all the same
    if args.max_position_embeddings is None:
        args.max_position_embeddings = args.seq_length
    model_size = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    model_size *= args.context_parallel_size
    rows = args.micro_batch_size * max(args.world_size // model_size, 1)
    if args.global_batch_size is not None and args.global_batch_size % rows:
        raise UserError(
            f"--global-batch-size {args.global_batch_size} is not a multiple of --micro-batch-size "
            f"{args.micro_batch_size} x {rows // args.micro_batch_size} data-parallel ranks."
        )
    split, needed = sequence_split(args), width_multiple(args)
    if args.seq_length % needed:
        recipe = f" and --fp8-recipe {args.fp8_recipe}" if args.fp8 else ""
        raise UserError(
            f"--seq-length {args.seq_length} is not a multiple of {needed}, which {split} ranks "
            f"that share a row{recipe} need; change it."
        )
    if sft.train_data is not None:
        check_uneven_rows(args, "fine-tuning")
    if sft.epochs:
        _settle_epochs(args, args.global_batch_size or rows)
    is_split = sft.train_data is None and args.split is not None
    if is_split and not args.skip_train and split_spans(args.split)[0] is None:
        raise UserError(f"--split {args.split} leaves no document to train on; change it.")
    if sft.train_data is not None and sft.valid_data is None:
        args.eval_iters = 0
    if args.save_keep_best:
        raise UserError("--save-keep-best goes by the held-out accuracy of ESPO; leave it out.")
    if args.eval_interval is None:
        args.eval_interval = max(args.train_iters or 1, 1)
    check_schedule(args)


def _settle_epochs(args: argparse.Namespace, batch: int) -> None:
    """Set the number of steps from --sft-epochs; a plan does without the data."""
    # Where a file is missing, a plan says so, and the start of a run refuses.
    examples = (
        len(rows_of(args, args.sft_train_data)) if is_readable(args, args.sft_train_data) else None
    )
    args.train_iters = epoch_steps(args, examples or batch, batch)
    if examples is not None and int(os.environ.get("RANK", "0")) == 0:
        say(
            f"{args.sft_epochs:g} epochs of {examples:,} examples: {args.train_iters:,} steps of "
            f"{batch} examples."
        )


def build_datasets(num_samples: Sequence[int | None], vp_stage: int | None = None) -> Datasets:
    """Build the data sets (Megatron's provider interface; called on every rank).

    Args:
        num_samples: rows of the training, validation and test set.
        vp_stage: virtual pipeline stage; all stages read the same rows.

    Returns:
        The sets.
    """
    args = get_args()
    train, valid, test = num_samples
    sft = config_from_args(SftConfig, args)
    if sft.train_data is None:
        return pretrain_datasets_from_args(args, (train, valid, test), get_tokenizer())

    return (
        sft_dataset(args, sft.train_data, train, Split.train),
        sft_dataset(args, sft.valid_data, valid, Split.valid)
        if sft.valid_data and valid != 0
        else None,
        None,
    )


# Megatron then builds the data on every rank instead of broadcasting from the first.
build_datasets.is_distributed = True  # type: ignore[attr-defined]


def main(argv: Sequence[str]) -> None:
    """Train from the command line.

    Args:
        argv: flags.
    """
    entry.start(argv, "megatron_espo.training.pretrain", prepare_arguments, run)


def run(args: argparse.Namespace) -> None:
    """Set up a run and train.

    Args:
        args: Megatron's arguments, checked.
    """
    shapes = _check_data(args)
    if block_attention(config_from_args(DiffusionConfig, args)) is not None:
        # Rows hold a noisy copy besides: twice --seq-length, which Megatron's schedule goes by.
        args.variable_widths = args.pipeline_model_parallel_size > 1
    around_each_save(partial(_saving, args, open_keeper(args)))
    with own_save_folder(args):
        # Only now is the checkpoint the last one of a run that was still ending.
        _continue_events(args)
        store = initialize_process_groups(args)
        config: Any = pretrain_cfg_container_from_args(args)
        pretrain(
            config,
            build_datasets,
            ModelType.encoder_or_decoder,
            partial(forward_step, shapes=shapes),
            build_model,
            store=store,
        )


def _continue_events(args: argparse.Namespace) -> None:
    """Keep TensorBoard's events in step with the checkpoints."""
    writer = get_tensorboard_writer()
    if writer is None:
        return
    step = resumed_iteration(args)
    samples = None
    if args.rampup_batch_size:
        stored = stored_arguments(checkpoint_folder(args.load, step)) if step else None
        samples = 0 if stored is None else stored.consumed_train_samples
    else:
        # TensorBoard drops everything beyond the step where a run goes on. Megatron's second copy
        # of each curve, against samples, lies beyond it; with one batch size it says nothing more.
        add_scalar = writer.add_scalar
        writer.add_scalar = lambda tag, *values, **named: (
            None if tag.endswith(VERSUS_SAMPLES) else add_scalar(tag, *values, **named)
        )
    begin_events(writer, step, samples)


@contextlib.contextmanager
def _saving(args: argparse.Namespace, keeper: Keeper | None) -> Iterator[None]:
    """What comes before and after Megatron writes a checkpoint."""
    writer = get_tensorboard_writer()
    if writer is not None:
        # What the checkpoint has seen must not be lost with a process that is killed.
        with full_disk_named(f"--tensorboard-dir {args.tensorboard_dir}"):
            writer.flush()
    with full_disk_named(f"--save {args.save}"):
        yield
    if keeper is not None:
        keeper.saved(args.iteration, args.rank == 0)


def _check_data(args: argparse.Namespace) -> Shapes | None:
    """Read the data once before any rank waits for another, so that a bad file ends all ranks.

    Returns:
        The widths of fine-tuning's micro-batches; None for pre-training, whose rows are full.
    """
    if args.sft_train_data is None:
        return None
    _check_continued(args)
    built = build_datasets((1, 1 if args.sft_valid_data else 0, 0))
    sets = [data for data in built if isinstance(data, SftDataset)]
    for data in sets:
        if args.rank == 0 and data.rows.num_skipped:
            say(f"{data.rows.path}: {data.rows.num_skipped} examples that do not fit are left out.")
    if not sets:  # a simulated job's
        return Shapes(width_multiple(args), (args.seq_length,))
    filter_lines(partial(training_line, epoch=len(sets[0].rows), epochs=args.sft_epochs))
    shapes = row_shapes(args, sets)
    args.variable_widths = args.pipeline_model_parallel_size > 1 and shapes.widths != (
        args.seq_length,
    )
    return shapes


def _check_continued(args: argparse.Namespace) -> None:
    """Refuse to go on with rows that are filled up in another way than those of the run so far."""
    if not resumed_iteration(args):
        return
    stored = stored_arguments(checkpoint_folder(args.load, resumed_iteration(args)))
    for name, before in (("sft_completion_length", None), ("sft_longest_of", 0)):
        theirs, ours = getattr(stored, name, before), getattr(args, name)
        if name == "sft_longest_of" and args.sft_completion_length is not None:
            continue
        if getattr(stored, "sft_train_data", None) is not None and theirs != ours:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(
                f"--load {args.load}: the run was saved with {flag} {theirs}, here it is {ours}; "
                f"pass the same, or begin a run with --pretrained-checkpoint {args.load}."
            )


if __name__ == "__main__":
    run_entry_point(main)
