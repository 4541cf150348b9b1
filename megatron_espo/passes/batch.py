"""Micro-batches for the model: sequences, their noised views, and the rows to predict.

Symbols: n sequences, s positions, l completion length, m draws, v views per draw, R rows (views)
of a micro-batch, r masked positions in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_espo.diffusion.noise import ElboViews
from megatron_espo.passes.pipeline import RowBatch
from megatron_espo.passes.shapes import Shapes, round_up


@dataclass(frozen=True)
class Sequences:
    """Prompts and completions of one length, padded on the right.

    Attributes:
        tokens: int64 ``[n, s]`` on the host: [prompt][completion][padding].
        prompt_lengths: int64 ``[n]``.
        completion_length: l, end-of-sequence padding included.
        shapes: says how wide a micro-batch is.
        completion_lengths: int64 ``[n]``, at most l, where each completion has a length of its own.
        together: so many sequences, one after another, stay side by side in micro-batches.
    """

    tokens: Tensor
    prompt_lengths: Tensor
    completion_length: int
    shapes: Shapes
    completion_lengths: Tensor | None = None
    together: int = 1

    def __len__(self) -> int:
        return self.tokens.size(0)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each prompt with its completion: int64 ``[n]``."""
        own = self.completion_lengths
        return self.prompt_lengths + (self.completion_length if own is None else own)

    def completions(self) -> Tensor:
        """The completions alone, all of one length: int64 ``[n, l]``."""
        assert self.completion_lengths is None
        places = self.prompt_lengths[:, None] + torch.arange(self.completion_length)[None]
        return self.tokens.gather(1, places)


@dataclass(frozen=True)
class MaskedTargets:
    """Where the cross entropy of a micro-batch's masked tokens goes (a RowBatch's payload).

    Attributes:
        targets: int64 ``[r]``, the clean tokens.
        rows: int64 ``[r]``, row of the micro-batch.
        columns: int64 ``[r]``, position within the maskable part of the row.
        num_rows: R.
        num_columns: length of the maskable part.
        is_dummy: nothing is masked in this micro-batch; the one row is there so that every
            rank's part of the model still gets a gradient (of zeros).
        vocab_size: tokens before padding.
        weights: float32 ``[r]``, factors in sums over rows; None: all 1.
    """

    targets: Tensor
    rows: Tensor
    columns: Tensor
    num_rows: int
    num_columns: int
    is_dummy: bool
    vocab_size: int
    weights: Tensor | None = None


@dataclass(frozen=True)
class ViewBatch:
    """A micro-batch of noised views.

    Attributes:
        batch: what the model reads; its payload is a MaskedTargets.
        view_index: int64 ``[R]``, place of each row among all n*m*v views.
        weights: float32 ``[R]``, weight of each row's summed cross entropy.
    """

    batch: RowBatch
    view_index: Tensor
    weights: Tensor

    @property
    def view_lengths(self) -> Tensor:
        """Positions of each view that hold a token: int64 ``[R]``.

        Views of a sequence may share a row of the model (passes/block_views.py).
        """
        lengths = self.batch.lengths
        return lengths.repeat_interleave(len(self.view_index) // len(lengths))


def pack_sequences(
    prompts: Sequence[Sequence[int]],
    completions: Tensor | Sequence[Tensor],
    pad_token_id: int,
    shapes: Shapes,
    together: int = 1,
) -> Sequences:
    """Join prompts and completions.

    Args:
        prompts: token ids per row.
        completions: int64 ``[n, l]``; or n of int64 ``[l]``, each of a length of its own.
        pad_token_id: fills the right padding.
        shapes: says how wide the rows are.
        together: see `Sequences`.

    Returns:
        The sequences.
    """
    pairs = zip(prompts, completions, strict=True)
    starts, lengths = torch.tensor([(len(one), len(other)) for one, other in pairs]).unbind(dim=1)
    tokens = torch.full((len(starts), shapes.width(int((starts + lengths).max()))), pad_token_id)
    for row, prompt, completion in zip(tokens, prompts, completions, strict=True):
        row[: len(prompt)] = torch.tensor(prompt, dtype=torch.int64)
        row[len(prompt) : len(prompt) + len(completion)] = completion
    own = None if isinstance(completions, Tensor) else lengths
    return Sequences(tokens, starts, int(lengths.max()), shapes, own, together)


def mask_rows(
    tokens: Tensor,
    lengths: Tensor,
    mask: Tensor,
    starts: Tensor,
    mask_token_id: int,
    vocab_size: int,
    hidden: Tensor | None = None,
    predicted: Tensor | None = None,
) -> RowBatch:
    """Noise rows and name the positions to predict.

    Args:
        tokens: int64 ``[R, s]``, clean.
        lengths: int64 ``[R]``; attention sees the positions before it.
        mask: bool ``[R, c]``, which of the maskable part's positions are masked.
        starts: int64 ``[R]``, position where the maskable part starts.
        mask_token_id: the mask token.
        vocab_size: tokens before padding.
        hidden: bool ``[R, p]``, positions before ``starts`` that are masked and not predicted.
        predicted: bool ``[R, c]``, masked positions that are predicted; None: all of them.

    Returns:
        The micro-batch, with MaskedTargets as payload.
    """
    rows, columns = (mask if predicted is None else predicted).nonzero(as_tuple=True)
    is_dummy = rows.numel() == 0
    if is_dummy:
        # Any position with a predecessor: a shifted model reads the state before it.
        rows, columns = rows.new_zeros(1), columns.new_zeros(1)
        positions = rows.new_ones(1)
        noised = tokens
    else:
        positions = starts[rows] + columns
        noised = tokens.clone()
        if predicted is None:
            noised[rows, positions] = mask_token_id
        else:
            there, masked = mask.nonzero(as_tuple=True)
            noised[there, starts[there] + masked] = mask_token_id
    if hidden is not None:
        noised = noised.clone()
        seen = noised[:, : hidden.size(1)]
        places = torch.arange(seen.size(1))
        seen[hidden[:, : seen.size(1)] & (places < starts[:, None])] = mask_token_id
    payload = MaskedTargets(
        tokens[rows, positions], rows, columns, mask.size(0), mask.size(1), is_dummy, vocab_size
    )
    padded = int(lengths.min()) < noised.size(1)
    return RowBatch(noised, lengths, rows, positions, payload, padded=padded)


def fill_up(needed: Tensor, lengths: Tensor, multiple: int, least: int = 0) -> Tensor:
    """Choose the sequences of a pass: those that are needed, and others that fill it up.

    Args:
        needed: bool ``[n]``.
        lengths: int64 ``[n]``; the shortest of the others are taken.
        multiple: how many sequences make whole micro-batches; n is a multiple of it.
        least: how many sequences there must be in any case.

    Returns:
        bool ``[n]``; True at a multiple of ``multiple`` places, at ``multiple`` at least.
    """
    count = max(round_up(max(int(needed.sum()), least), multiple), multiple)
    assert count <= len(needed), (count, len(needed))
    order = torch.where(needed, -1, lengths).argsort(stable=True)
    chosen = torch.zeros_like(needed)
    chosen[order[:count]] = True
    return chosen


def order_of_views(
    sequences: Sequences, per_sequence: int, rows_per_batch: int, chosen: Tensor | None
) -> tuple[Tensor, int]:
    """Say in which order views are cut into micro-batches.

    Args:
        sequences: n sequences.
        per_sequence: views of each, m v.
        rows_per_batch: views of a micro-batch.
        chosen: int64 ``[k]``, the sequences to take; None takes all.

    Returns:
        int64 ``[k m v]``, places among all n m v views, the longest sequences' first, those of a
        sequence side by side; and the width of the longest sequence.
    """
    taken = torch.arange(len(sequences)) if chosen is None else chosen
    lengths = sequences.lengths[taken].view(-1, sequences.together).amax(dim=1)
    by_length = lengths.argsort(descending=True, stable=True)
    by_length = taken.view(-1, sequences.together)[by_length].flatten()
    order = (by_length[:, None] * per_sequence + torch.arange(per_sequence)).flatten()
    assert len(order) % rows_per_batch == 0, (len(order), rows_per_batch)
    return order, sequences.shapes.width(int(lengths.max()))


def view_batches(
    sequences: Sequences,
    views: ElboViews,
    mask_token_id: int,
    vocab_size: int,
    rows_per_batch: int,
    *,
    same_width: bool = True,
    chosen: Tensor | None = None,
    prompt_masks: Tensor | None = None,
) -> list[ViewBatch]:
    """Cut all views of sequences into micro-batches, views of a sequence side by side.

    Sequences go by length, the longest first, and a micro-batch is hardly wider than its longest:
    what would be padding is not computed. Sums over the batch do not depend on the order.

    Args:
        sequences: n sequences.
        views: their masks, ``[n, m, v, l]``.
        mask_token_id: the mask token.
        vocab_size: tokens before padding.
        rows_per_batch: R; must divide the number of views.
        same_width: make all micro-batches as wide as the longest sequence, as pipeline stages need
            it: they pass hidden states of one shape.
        chosen: int64 ``[k]``, the sequences to take; None takes all.
        prompt_masks: bool ``[n, m, v or 1, p]``, prompt tokens that are masked and not predicted.

    Returns:
        Micro-batches on the host; ``view_index`` says which views each holds.
    """
    per_sequence = views.weights[0].numel()
    masks, predicted = views.mask_indices.flatten(0, 2), views.predicted
    predicted = None if predicted is None else predicted.flatten(0, 2)
    weights = views.weights.flatten()
    prompts = prompt_masks
    if prompts is not None:
        prompts = prompts.expand(*views.weights.shape, -1).flatten(0, 2)
    order, width = order_of_views(sequences, per_sequence, rows_per_batch, chosen)
    batches = []
    for index in order.split(rows_per_batch):
        sequence = index // per_sequence
        starts, lengths = sequences.prompt_lengths[sequence], sequences.lengths[sequence]
        if not same_width:
            width = sequences.shapes.width(int(lengths.max()))
        batch = mask_rows(
            sequences.tokens[sequence, :width],
            lengths,
            masks[index],
            starts,
            mask_token_id,
            vocab_size,
            None if prompts is None else prompts[index],
            None if predicted is None else predicted[index],
        )
        # Policies and passes look at the same views, one after the other.
        batches.append(ViewBatch(replace(batch, sent={}), index, weights[index]))
    return batches
