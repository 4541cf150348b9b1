"""Pre-training and fine-tuning through Megatron's own training loop.

``torchrun -m megatron_espo.training.pretrain [Megatron flags]`` pre-trains on .bin/.idx data;
with ``--sft-train-data FILE`` it fine-tunes on JSONL instead.
"""

import argparse
import contextlib
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
from megatron_espo.config import SftConfig
from megatron_espo.console import say
from megatron_espo.data.atomic_folder import full_disk_named
from megatron_espo.data.corpus import split_spans
from megatron_espo.data.indexed import Datasets, pretrain_datasets_from_args
from megatron_espo.data.sft import SftDataset
from megatron_espo.data.tokenizer import load_tokenizer, special_ids
from megatron_espo.errors import UserError
from megatron_espo.megatron_patches import around_each_save
from megatron_espo.model import fp8
from megatron_espo.monitor.tensorboard import VERSUS_SAMPLES, begin_events
from megatron_espo.startup.argument_checks import check_schedule
from megatron_espo.startup.arguments import config_from_args, stored_arguments
from megatron_espo.startup.save_folder import open_keeper, own_save_folder
from megatron_espo.startup.setup import (
    build_model,
    initialize_process_groups,
    run_entry_point,
    sequence_split,
)
from megatron_espo.supervised.forward_step import forward_step
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
    if not args.train_iters and not args.train_samples and not args.skip_train:
        raise UserError("--train-iters is missing: how many steps to train.")
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
    split = sequence_split(args)
    needed = split * (fp8.alignment(args.fp8_recipe) if args.fp8 else 1)
    if args.seq_length % needed:
        recipe = f" and --fp8-recipe {args.fp8_recipe}" if args.fp8 else ""
        raise UserError(
            f"--seq-length {args.seq_length} is not a multiple of {needed}, which {split} ranks "
            f"that share a row{recipe} need; change it."
        )
    sft = config_from_args(SftConfig, args)
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

    tokenizer = load_tokenizer(args.tokenizer_model)

    def dataset(path: str, count: int | None, split: Split) -> SftDataset:
        return SftDataset(
            path,
            tokenizer,
            special_ids(tokenizer, args.mask_token_id),
            seq_length=args.seq_length,
            completion_length=sft.completion_length,
            num_samples=count,
            seed=args.seed,
            shuffle=split is Split.train,
            skip_long=sft.skip_long,
            split=split,
            spelled=args.prompt_special_tokens,
        )

    return (
        dataset(sft.train_data, train, Split.train),
        dataset(sft.valid_data, valid, Split.valid) if sft.valid_data and valid != 0 else None,
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
    _check_data(args)
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
            forward_step,
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


def _check_data(args: argparse.Namespace) -> None:
    """Read the data once before any rank waits for another, so that a bad file ends all ranks."""
    if args.sft_train_data is None:
        return
    for data in build_datasets((1, 1 if args.sft_valid_data else 0, 0)):
        if args.rank == 0 and isinstance(data, SftDataset) and data.num_skipped:
            say(f"{data.path}: {data.num_skipped} examples that do not fit are left out.")


if __name__ == "__main__":
    run_entry_point(main)
