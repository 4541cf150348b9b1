"""Fine-tuning as the arguments of a run describe it: its rows, its length, its micro-batches."""

import argparse
import functools
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from megatron.core.datasets.utils import Split

from megatron_espo.config import SftConfig, SpelledTokens
from megatron_espo.data.sft import SftRows, read_rows
from megatron_espo.data.sft_dataset import SftDataset
from megatron_espo.data.tokenizer import SpecialIds, load_tokenizer, special_ids
from megatron_espo.errors import UserError
from megatron_espo.model import fp8
from megatron_espo.passes.shapes import Shapes, few_widths, round_up
from megatron_espo.plan.plan import PlannedRows
from megatron_espo.startup.arguments import config_from_args
from megatron_espo.startup.setup import keeps_graphs, sequence_split, would_keep_graphs

# Most widths of micro-batches where each has its graph: rows differ by a factor of 30 and more.
_WIDTHS = 32
# Steps whose rows a plan looks at.
_PLANNED_STEPS = 64


def rows_of(args: argparse.Namespace, path: str) -> SftRows:
    """Read a fine-tuning file, once in a process.

    Args:
        args: parsed arguments, with the tokenizer's folder.
        path: the file.

    Returns:
        Its examples that fit.

    Raises:
        UserError: naming file and line, or the flag.
    """
    sft = config_from_args(SftConfig, args)
    return _read(
        path,
        args.tokenizer_model,
        special_ids(load_tokenizer(args.tokenizer_model), args.mask_token_id),
        args.seq_length,
        sft.completion_length,
        sft.skip_long,
        args.prompt_special_tokens,
    )


@functools.lru_cache(maxsize=2)  # training and validation data
def _read(
    path: str,
    tokenizer: str,
    ids: SpecialIds,
    seq_length: int,
    completion_length: int | None,
    skip_long: bool,
    spelled: SpelledTokens,
) -> SftRows:
    return read_rows(
        path,
        load_tokenizer(tokenizer),
        ids,
        seq_length=seq_length,
        completion_length=completion_length,
        skip_long=skip_long,
        spelled=spelled,
    )


def sft_dataset(args: argparse.Namespace, path: str, count: int | None, split: Split) -> SftDataset:
    """Build a fine-tuning set.

    Args:
        args: Megatron's arguments, validated.
        path: the file.
        count: rows; None for one epoch.
        split: training or validation.

    Returns:
        The set; Megatron's loader goes on with it where the run was saved.

    Raises:
        UserError: as :func:`rows_of`.
    """
    is_training = split is Split.train
    return SftDataset(
        rows_of(args, path),
        num_samples=count,
        seed=args.seed,
        shuffle=is_training,
        longest_of=args.sft_longest_of,
        batch_size=step_rows(args) if is_training else args.eval_global_batch_size,
        first=args.consumed_train_samples if is_training else args.consumed_valid_samples,
        split=split,
    )


def step_rows(args: argparse.Namespace) -> int:
    """Return rows that are always of the same optimizer step: all of it, with one batch size.

    Args:
        args: Megatron's arguments, validated.
    """
    if args.decrease_batch_size_if_needed or args.step_batch_size_schedule is not None:
        return int(args.micro_batch_size * args.data_parallel_size)
    if args.rampup_batch_size:
        # Batches of all sizes begin at a multiple of this.
        start, increment, _ = (int(number) for number in args.rampup_batch_size)
        return math.gcd(start, increment, args.global_batch_size)
    return int(args.global_batch_size)


def epoch_steps(
    args: argparse.Namespace, num_examples: int, batch: int, flag: str = "--sft-epochs"
) -> int:
    """Return the optimizer steps of some epochs, the last one filled up with the next epoch.

    Args:
        args: parsed arguments.
        num_examples: examples of an epoch.
        batch: examples of a step.
        flag: says how many epochs.

    Raises:
        UserError: the batch size is to change.
    """
    for name in ("rampup_batch_size", "step_batch_size_schedule", "train_samples"):
        if getattr(args, name):
            other = name.replace("_", "-")
            raise UserError(
                f"{flag}: --{other} says otherwise how long the run is; leave one of them out."
            )
    epochs = getattr(args, flag[2:].replace("-", "_"))
    return math.ceil(epochs * num_examples / batch)


def width_multiple(args: argparse.Namespace) -> int:
    """Positions of a row must be a multiple of this: ranks that share them, FP8's products.

    Args:
        args: parsed arguments.
    """
    return sequence_split(args) * (fp8.alignment(args.fp8_recipe) if args.fp8 else 1)


def is_readable(args: argparse.Namespace, data: str | None) -> bool:
    """Whether a file to train on and the run's tokenizer are on this machine.

    Args:
        args: parsed arguments.
        data: the file.
    """
    tokenizer = args.tokenizer_model
    return (
        data is not None
        and os.path.isfile(data)
        and tokenizer is not None
        and os.path.isdir(tokenizer)
    )


def planned_rows(args: argparse.Namespace) -> PlannedRows | None:
    """Say what a run's fine-tuning rows will be like, from its first steps.

    Args:
        args: Megatron's arguments, validated.

    Returns:
        None where there is no data or it is not on this machine.

    Raises:
        UserError: naming file and line.
    """
    if not is_readable(args, args.sft_train_data):
        return None
    steps = min(args.train_iters or _PLANNED_STEPS, _PLANNED_STEPS)
    batch = step_rows(args)
    data = sft_dataset(args, args.sft_train_data, steps * batch, Split.train)
    few = would_keep_graphs(args)
    shapes = _shapes(width_multiple(args), [data.length_range()], few)
    lengths = data.lengths(np.arange(len(data)))
    rows = -np.sort(-lengths.reshape(-1, batch), axis=1).reshape(-1, args.micro_batch_size)
    widths = [shapes.width(int(longest)) for longest in rows[:, 0]]
    prompts = data.rows.prompt_lengths
    fixed = data.rows.completion_length
    return PlannedRows(
        num_examples=len(data.rows),
        mean_length=float(lengths.mean()),
        mean_maskable=float(fixed or lengths.mean() - prompts.mean()),
        longest=data.length_range()[1],
        longest_maskable=int(fixed or data.length_range()[1] - prompts.min()),
        shares={width: count / len(widths) for width, count in Counter(widths).items()},
    )


def row_shapes(args: argparse.Namespace, sets: Iterable[SftDataset]) -> Shapes:
    """Choose the widths that micro-batches are cut to.

    Args:
        args: Megatron's arguments.
        sets: all sets of the run.

    Returns:
        Exact widths; few different ones where attention keeps a graph for each.
    """
    ranges = [data.length_range() for data in sets]
    return _shapes(width_multiple(args), ranges, few=keeps_graphs(args))


def _shapes(multiple: int, ranges: Sequence[tuple[int, int]], few: bool) -> Shapes:
    shortest = round_up(min(low for low, _ in ranges), multiple)
    longest = round_up(max(high for _, high in ranges), multiple)
    if shortest == longest:
        return Shapes(multiple, (longest,))
    return Shapes(multiple, few_widths(shortest, longest, multiple, _WIDTHS) if few else ())
