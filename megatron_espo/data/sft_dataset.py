"""Supervised fine-tuning data: a prompt, its completion, and the tokens that end it, row by row.

A masked-diffusion model fills a completion of fixed length, so it learns where to stop by
predicting the end-of-sequence tokens that fill the completion up. They belong to the completion;
only what follows the completion is padding without a loss (arXiv 2502.09992, section 2.3).

How far a completion is filled up is a function of the example and its place in the run alone. What
is computed is another matter: the examples of an optimizer step are handed out by their length, so
that those of a micro-batch are about equally long and it can be cut to its longest. Neither the
examples of a step nor their noise, which their places are the keys of, depend on that.
"""

import functools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from megatron_espo.data.sft import SftRows
from megatron_espo.random import randint, stream

if TYPE_CHECKING:
    from megatron.core.datasets.utils import Split

Places = NDArray[np.int64]
"""Places in the order of the rows over all epochs."""


class _Batch(NamedTuple):
    """A batch in the order in which its rows are handed out, the longest first."""

    first: int
    places: Places
    lengths: Places


class SftDataset(Dataset[dict[str, Tensor]]):
    """Rows of a file, epoch after epoch, each in an order of its own."""

    def __init__(
        self,
        rows: SftRows,
        *,
        num_samples: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        longest_of: int = 0,
        batch_size: int = 1,
        first: int = 0,
        split: "Split | None" = None,
    ) -> None:
        """Describe the rows.

        Args:
            rows: the tokenized examples.
            num_samples: rows of the data set, over as many epochs as that takes; None is one.
            seed: decides, with the epoch, the order of the rows.
            shuffle: whether to shuffle at all; the file's order otherwise.
            longest_of: without a completion length, an example is filled up to the longest of so
                many, itself and others drawn at random; 0 fills it up to the rows' length.
            batch_size: rows whose order among themselves does not matter, those of an optimizer
                step: they are handed out by their length. 1 keeps the order.
            first: where the first of such batches starts.
            split: what the rows are for; Megatron's data loader picks its batch size by it.
        """
        self.rows, self.seed, self.shuffle, self.split = rows, seed, shuffle, split
        self.longest_of, self.batch_size, self.first = longest_of, batch_size, first
        self.num_samples = len(rows) if num_samples is None else num_samples
        self._own_lengths = rows.lengths()
        self._batch: _Batch | None = None

    def __len__(self) -> int:
        """Return the number of rows over all epochs."""
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return a row.

        Args:
            index: place in the order in which rows are handed out.

        Returns:
            ``tokens`` int64 ``[s]``: prompt, completion filled up with end-of-sequence tokens,
            padding; and int64 ``[]``: ``prompt_length``, ``completion_length`` (what fills it up
            included) and ``sample_id``, the row's place among those of all epochs.
        """
        if not 0 <= index < self.num_samples:
            raise IndexError(f"row {index} of a data set of {self.num_samples}")
        batch = self._batch_of(int(index))
        place, length = (int(part[index - batch.first]) for part in (batch.places, batch.lengths))
        rows, (example,) = self.rows, self._examples(np.array([place]))
        prompt_length = int(rows.prompt_lengths[example])
        text = rows.tokens[rows.starts[example] : rows.starts[example + 1]]
        tokens = torch.full((rows.seq_length,), rows.ids.pad_token_id, dtype=torch.int64)
        tokens[:length] = rows.ids.eos_token_id
        tokens[: len(text)] = torch.from_numpy(text)
        return {
            "tokens": tokens,
            "prompt_length": torch.tensor(prompt_length),
            "completion_length": torch.tensor(length - prompt_length),
            "sample_id": torch.tensor(place),
        }

    def lengths(self, places: Places) -> Places:
        """Say how long rows are.

        Args:
            places: int64 ``[k]``.

        Returns:
            int64 ``[k]``, tokens of prompt and completion, what fills the completion up included.
        """
        if self.rows.completion_length is not None:
            return self._own_lengths[self._examples(places)]
        if self.longest_of == 0:
            return np.full(len(places), self.rows.seq_length, dtype=np.int64)
        longest = self._own_lengths[self._examples(places)]
        if self.longest_of > 1:
            others = randint(
                stream(self.seed, "sft-fill"),
                torch.from_numpy(places),
                self.longest_of - 1,
                0,
                len(self.rows) - 1,
            )
            longest = np.maximum(longest, self._own_lengths[others.numpy()].max(axis=1))
        return longest

    def length_range(self) -> tuple[int, int]:
        """Return bounds of the rows' lengths: the shortest and the longest that can come."""
        if self.rows.completion_length is None and self.longest_of == 0:
            return self.rows.seq_length, self.rows.seq_length
        return int(self._own_lengths.min()), int(self._own_lengths.max())

    def _examples(self, places: Places) -> Places:
        """Return the examples at places of the run."""
        epochs, within = np.divmod(places, len(self.rows))
        if not self.shuffle:
            return within
        examples = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            examples[here] = epoch_order(len(self.rows), self.seed, int(epoch))[within[here]]
        return examples

    def _batch_of(self, index: int) -> _Batch:
        """Return the batch that a row is of; the last one is kept, as rows come in order."""
        first = index - (index - self.first) % self.batch_size
        if self._batch is None or self._batch.first != max(first, 0):
            places = np.arange(max(first, 0), min(first + self.batch_size, self.num_samples))
            lengths = self.lengths(places)
            # The longest first: what does not fit the memory shows at once.
            order = np.argsort(-lengths, kind="stable")
            self._batch = _Batch(max(first, 0), places[order], lengths[order])
        return self._batch


@functools.lru_cache(maxsize=4)
def epoch_order(num_examples: int, seed: int, epoch: int) -> Places:
    """Return the order of the examples in an epoch.

    Args:
        num_examples: examples in an epoch.
        seed: the run's seed.
        epoch: the epoch, from 0.

    Returns:
        int64 ``[num_examples]``, a permutation that depends on the arguments alone: numpy
        promises the raw bits of Philox for all its versions.
    """
    bits = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64))
    order = np.argsort(bits.random_raw(num_examples), kind="stable")
    order.setflags(write=False)  # shared by all callers
    return order
