"""Preference pairs as the arguments of a run describe them: files, steps, micro-batches."""

import argparse
import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_espo.config import DpoConfig, SpelledTokens
from megatron_espo.data.pairs import PairRows, read_pairs
from megatron_espo.data.sft_dataset import epoch_order
from megatron_espo.data.tokenizer import SpecialIds, load_tokenizer, special_ids
from megatron_espo.diffusion.block_noise import block_elbo_views, own_length_views
from megatron_espo.diffusion.noise import ElboViews
from megatron_espo.model.handle import DiffusionModel
from megatron_espo.passes.batch import Sequences, ViewBatch, pack_sequences
from megatron_espo.passes.shapes import Shapes, few_widths
from megatron_espo.plan.plan import PlannedRows
from megatron_espo.random import Stream
from megatron_espo.rl.elbo import block_offsets, cut_views
from megatron_espo.startup.arguments import config_from_args
from megatron_espo.startup.setup import keeps_graphs, pad_multiple, would_keep_graphs
from megatron_espo.supervised.rows import is_readable

Places = NDArray[np.int64]

# Steps whose pairs a plan looks at.
_PLANNED_STEPS = 64


def pairs_of(args: argparse.Namespace, path: str) -> PairRows:
    """Read a file of preference pairs, once in a process.

    Args:
        args: parsed arguments, with the tokenizer's folder.
        path: the file.

    Returns:
        Its pairs that fit.

    Raises:
        UserError: naming file and line, or the flag.
    """
    dpo = config_from_args(DpoConfig, args)
    return _read(
        path,
        args.tokenizer_model,
        special_ids(load_tokenizer(args.tokenizer_model), args.mask_token_id),
        args.seq_length,
        dpo.completion_length,
        dpo.skip_long,
        args.prompt_special_tokens,
        int(args.logit_shift),
    )


@functools.lru_cache(maxsize=2)  # training and held-out pairs
def _read(
    path: str,
    tokenizer: str,
    ids: SpecialIds,
    seq_length: int,
    completion_length: int | None,
    skip_long: bool,
    spelled: SpelledTokens,
    shortest_prompt: int,
) -> PairRows:
    return read_pairs(
        path,
        load_tokenizer(tokenizer),
        ids,
        seq_length=seq_length,
        completion_length=completion_length,
        skip_long=skip_long,
        spelled=spelled,
        shortest_prompt=shortest_prompt,
    )


def pairs_at(places: Places, num_pairs: int, seed: int) -> Places:
    """Say which pairs stand at places of the run: epochs, each in an order of its own.

    Args:
        places: int64 ``[k]``, counted through the run.
        num_pairs: pairs of an epoch.
        seed: the run's seed.

    Returns:
        int64 ``[k]``, indices of pairs.
    """
    epochs, within = np.divmod(places, num_pairs)
    pairs = np.empty_like(places)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        pairs[here] = epoch_order(num_pairs, seed, int(epoch))[within[here]]
    return pairs


class PairBatch(NamedTuple):
    """Some pairs with the masks of their ELBOs.

    Attributes:
        sequences: chosen and rejected completions in turn, two rows a pair.
        views: their masks and weights.
        batches: all views, cut into micro-batches.
    """

    sequences: Sequences
    views: ElboViews
    batches: list[ViewBatch]


def pair_batch(
    model: DiffusionModel,
    rows: PairRows,
    pairs: Sequence[int],
    numbers: Sequence[int],
    key: Stream,
    dpo: DpoConfig,
    rows_per_batch: int,
) -> PairBatch:
    """Draw the masks of pairs and cut them into micro-batches.

    Args:
        model: gives special tokens, the shapes of rows and how positions attend.
        rows: the file.
        pairs: which of its pairs.
        numbers: what each is counted by, the keys of its masks: policy and reference, and whoever
            asks again, get the same ones.
        key: random stream.
        dpo: estimator and number of draws.
        rows_per_batch: views of a micro-batch; must divide their number.

    Returns:
        The micro-batches, on the host; micro-batches of whole pairs hold them side by side.
    """
    prompts, completions = [], []
    for prompt, *both in map(rows.pair, pairs):
        prompts += [prompt.tolist()] * 2
        completions += [torch.from_numpy(part.astype(np.int64)) for part in both]
    sequences = pack_sequences(prompts, completions, model.pad_token_id, model.shapes, together=2)
    ids = (torch.tensor(numbers)[:, None] * 2 + torch.arange(2)).flatten()
    views = _views(model, sequences, key, ids, dpo)
    return PairBatch(sequences, views, cut_views(model, sequences, views, rows_per_batch))


def _views(
    model: DiffusionModel, sequences: Sequences, key: Stream, ids: Tensor, dpo: DpoConfig
) -> ElboViews:
    lengths, offsets = sequences.completion_lengths, block_offsets(model, sequences)
    assert lengths is not None
    if offsets is None or model.blocks is None:
        return own_length_views(dpo.elbo_estimator, key, ids, lengths, dpo.num_mc)
    return block_elbo_views(
        dpo.elbo_estimator, key, ids, offsets, int(lengths.max()), dpo.num_mc, model.blocks.size,
        lengths=lengths,
    )  # fmt: skip


def row_lengths(rows: PairRows) -> Places:
    """Return the tokens of each prompt with each completion: int64 ``[n, 2]``."""
    return rows.prompt_lengths()[:, None] + rows.completion_lengths()


def widths_of(args: argparse.Namespace, files: Sequence[PairRows]) -> tuple[int, ...]:
    """Choose the widths of micro-batches: a few where attention keeps a graph for every shape.

    Args:
        args: Megatron's arguments.
        files: all pairs of the run.

    Returns:
        The widths; none where any will do.
    """
    if not keeps_graphs(args):
        return ()
    return _few(files, pad_multiple(args))


def _few(files: Sequence[PairRows], multiple: int) -> tuple[int, ...]:
    lengths = np.concatenate([row_lengths(rows).ravel() for rows in files])
    return few_widths(int(lengths.min()), int(lengths.max()), multiple)


def planned_pairs(args: argparse.Namespace) -> PlannedRows | None:
    """Say what a run's rows will be like, from its first steps.

    Args:
        args: Megatron's arguments, validated.

    Returns:
        None where there is no data or it is not on this machine.

    Raises:
        UserError: naming file and line.
    """
    if not is_readable(args, args.dpo_train_data):
        return None
    rows, multiple = pairs_of(args, args.dpo_train_data), pad_multiple(args)
    steps = min(args.train_iters, _PLANNED_STEPS)
    pairs = pairs_at(np.arange(steps * args.global_batch_size), len(rows), args.seed)
    shapes = Shapes(multiple, _few([rows], multiple) if would_keep_graphs(args) else ())
    lengths, maskable = row_lengths(rows), rows.completion_lengths()
    widths = Counter(_widths(lengths[pairs], args, shapes))
    total = sum(widths.values())
    return PlannedRows(
        num_examples=len(rows),
        mean_length=float(lengths[pairs].mean()),
        mean_maskable=float(maskable[pairs].mean()),
        longest=int(lengths.max()),
        longest_maskable=int(maskable.max()),
        shares={width: count / total for width, count in widths.items()},
    )


def _widths(lengths: Places, args: argparse.Namespace, shapes: Shapes) -> Iterator[int]:
    """The width of each row's micro-batch, of pairs ``[k, 2]`` in the order of the run."""
    local = args.global_batch_size // args.data_parallel_size
    for share in lengths.reshape(-1, local, 2):
        longest = np.sort(share.max(axis=1))[::-1].repeat(2)
        # So many rows lie in a micro-batch; of one that holds less than a row, each lies alone.
        views = config_from_args(DpoConfig, args).views_per_completion
        rows = max(args.dpo_rows_per_batch // views, 1)
        firsts = np.arange(len(longest)) // rows * rows
        if args.pipeline_model_parallel_size > 1:
            firsts[:] = 0
        yield from (shapes.width(int(longest[first])) for first in firsts)
