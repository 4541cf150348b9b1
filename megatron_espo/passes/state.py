"""What a model pass tells the layers besides Megatron's arguments.

Two things: which hidden states the last layer must give (the others are never read), and a
key/value cache with the window of positions that passes through the model. They travel beside the
call, in a context variable, so that Megatron's blocks and schedules stay as they are; the layers
that listen are in model/attention.py.

Symbols: b rows of tokens, w positions that pass through the model, s positions of the rows, c most
selected positions of a row, r selected positions in all, g key/value heads of this rank, d head
size.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor
from torch.nn.functional import pad

from megatron_espo.passes.block_mask import BlockAttention


class KeyValueCache:
    """Keys and values of some rows, layer by layer, of this rank's heads and pipeline stage.

    Filled by a full pass; a pass over a window of positions replaces the window's entries and
    attends to all of them (Fast-dLLM, arXiv 2505.22618, section 3.2). Without gradients.
    """

    def __init__(self) -> None:
        """Make an empty cache."""
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def width(self) -> int:
        """Positions of the cached rows, padding included; 0 while the cache is empty."""
        return next((key.size(2) for key, _ in self._layers.values()), 0)

    def store(self, layer: int, key: Tensor, value: Tensor, rows: Tensor | None) -> None:
        """Keep the keys and values of a full pass.

        Args:
            layer: number of the layer.
            key: ``[b, g, s, d]``, positions already rotated.
            value: ``[b, g, s, d]``.
            rows: int64 ``[b]``, the cached rows that these are; None replaces the whole cache.
        """
        if rows is None:
            self._layers[layer] = (key.contiguous(), value.contiguous())
            return
        for kept, new in zip(self._layers[layer], (key, value), strict=True):
            kept.index_copy_(0, rows, new)

    def widen(self, width: int) -> None:
        """Make place for positions after those of the pass that filled the cache.

        Args:
            width: positions of the rows from now on; what is new is zero.
        """
        for layer, parts in self._layers.items():
            key, value = (pad(part, (0, 0, 0, width - part.size(2))) for part in parts)
            self._layers[layer] = (key, value)

    def keep(self, rows: Tensor) -> None:
        """Drop all but some rows.

        Args:
            rows: int64 ``[b]``, those that stay, in their new order.
        """
        for layer, (key, value) in self._layers.items():
            index = rows.to(key.device)
            self._layers[layer] = (key.index_select(0, index), value.index_select(0, index))

    def merge(
        self, layer: int, key: Tensor, value: Tensor, positions: Tensor, rows: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Replace the entries of a window and return all of them.

        Args:
            layer: number of the layer.
            key: ``[b, g, w, d]``.
            value: ``[b, g, w, d]``.
            positions: int64 ``[b, w]``, the window.
            rows: int64 ``[b]``, the cached rows that these are; None for all.

        Returns:
            Keys and values, ``[b, g, s, d]`` each.
        """
        kept = self._layers[layer]
        places = torch.arange(key.size(0), device=key.device) if rows is None else rows
        for old, new in zip(kept, (key, value), strict=True):
            old[places[:, None], :, positions] = new.transpose(1, 2)
        if rows is None:
            return kept
        return kept[0].index_select(0, rows), kept[1].index_select(0, rows)


@dataclass(frozen=True)
class SelectedRows:
    """The hidden states that the last layer gives, instead of all ``[w, b]``.

    Attributes:
        queries: int64 ``[b, c]``, places in the window of the selected positions of each row; rows
            with fewer than c repeat place 0.
        flat: int64 ``[r]``, places of the selected positions among ``[c, b]``.
        hidden: int64 ``[r]``, their places among ``[w, b]``.
        sequence_group: tensor-parallel group whose ranks split the positions among them, or None
            without sequence parallelism. r is then a multiple of its size.
    """

    queries: Tensor
    flat: Tensor
    hidden: Tensor
    sequence_group: dist.ProcessGroup | None

    def of_queries(self, query: Tensor) -> Tensor:
        """Take the selected queries: ``[w, b, heads, d]`` to ``[c, b, heads, d]``."""
        index = self.queries.t()[:, :, None, None].expand(-1, -1, *query.shape[2:])
        return query.gather(0, index)

    def of_mask(self, mask: Tensor) -> Tensor:
        """Take the selected queries' rows of an attention mask.

        Args:
            mask: bool ``[b or 1, 1, w or 1, s]``.

        Returns:
            bool ``[b, 1, c, s]``; the mask itself where it is the same for all queries.
        """
        if mask.size(2) == 1:
            return mask
        index = self.queries[:, None, :, None].expand(-1, -1, -1, mask.size(3))
        return mask.expand(index.size(0), -1, -1, -1).gather(2, index)

    def of_attention(self, output: Tensor) -> Tensor:
        """Drop what rows with fewer selected positions repeat: ``[c, b, h]`` to ``[r, 1, h]``."""
        return output.flatten(0, 1).index_select(0, self.flat)[:, None, :]

    def of_hidden(self, hidden: Tensor) -> Tensor:
        """Take the selected hidden states: ``[w, b, h]`` to ``[r, 1, h]``.

        With sequence parallelism each rank holds a part of the positions and gets a part of the
        selected ones; the gradient goes back to the ranks that it belongs to.
        """
        index = self.hidden
        if self.sequence_group is not None:
            hidden = gather_from_sequence_parallel_region(hidden, group=self.sequence_group)
            index = index.chunk(self.sequence_group.size())[self.sequence_group.rank()]
        return hidden.flatten(0, 1).index_select(0, index)[:, None, :]


def select_positions(
    rows: Tensor,
    places: Tensor,
    num_rows: int,
    per_row: int,
    multiple: int,
    sequence_group: dist.ProcessGroup | None,
) -> SelectedRows:
    """Describe selected positions to the last layer.

    Args:
        rows: int64 ``[r]``, row of each selected position, ascending.
        places: int64 ``[r]``, its place in the window.
        num_rows: b.
        per_row: c, at least as many as any row has.
        multiple: r is filled up to a multiple of this by repeating the first entry.
        sequence_group: see SelectedRows.

    Returns:
        The description, on the device of ``rows``.
    """
    # A row's entries are side by side, so the place of its first one is found by bisection.
    slots = torch.arange(rows.numel(), device=rows.device) - torch.searchsorted(rows, rows)
    queries = places.new_zeros(num_rows, per_row)
    queries[rows, slots] = places
    flat, hidden = slots * num_rows + rows, places * num_rows + rows
    extra = -rows.numel() % multiple
    if extra:
        flat = torch.cat((flat, flat[:1].expand(extra)))
        hidden = torch.cat((hidden, hidden[:1].expand(extra)))
    return SelectedRows(queries, flat, hidden, sequence_group)


class RoutingLog:
    """The experts of one micro-batch's tokens under several policies, on this rank.

    What a policy chose is kept on the host, a bit for each token and expert of a layer.
    """

    def __init__(self) -> None:
        """Make an empty log."""
        self.policy: str | None = None
        """Whose passes are noted now; the first of each policy. None notes nothing."""
        self._chosen: dict[tuple[str, int], Tensor] = {}

    def note(self, layer: int, chosen: Tensor) -> None:
        """Keep what a router chose.

        Args:
            layer: number of the layer.
            chosen: bool ``[t, e]``, the experts of each token.
        """
        if self.policy is not None:
            self._chosen.setdefault((self.policy, layer), chosen.detach().cpu())

    def changed(self, first: str, second: str) -> tuple[int, int]:
        """Compare two policies.

        Args:
            first: one of them.
            second: the other.

        Returns:
            How often a token's experts in a layer are not the same, of how many; 0 of 0 where the
            two were not noted over the same tokens.
        """
        changed = total = 0
        for (policy, layer), before in self._chosen.items():
            after = self._chosen.get((second, layer))
            if policy == first and after is not None and after.shape == before.shape:
                changed += int((before != after).any(dim=1).sum())
                total += before.size(0)
        return changed, total


@dataclass(frozen=True)
class PassState:
    """What the layers need to know of the pass that runs.

    Attributes:
        selected: the positions whose hidden states the last layer gives, or None for all.
        cache: key/value cache to fill or to use.
        cache_rows: int64 ``[b]``, rows of the cache that the pass's rows are; None for all.
        positions: int64 ``[b, w]``, the window that passes through the model; None where it is the
            whole row (which fills the cache).
        width: positions of the whole rows.
        padded: whether any row is shorter than that. PyTorch's fused attention has faster kernels
            for passes without a mask, and some devices' fastest one takes none.
        sampling: whether tokens are drawn from the pass. Nothing compares it with a pass that has
            gradients, so the layers may take kernels that round otherwise.
        noisy: how rows attend that hold noisy copies before the clean tokens, where all of their
            positions pass here; None elsewhere.
        routing: where routers of experts note what they choose, or None.
    """

    selected: SelectedRows | None = None
    cache: KeyValueCache | None = None
    cache_rows: Tensor | None = None
    positions: Tensor | None = None
    width: int = 0
    padded: bool = True
    sampling: bool = False
    noisy: BlockAttention | None = None
    routing: RoutingLog | None = None


_current: ContextVar[PassState | None] = ContextVar("model_pass", default=None)


def current_pass() -> PassState | None:
    """Return the state of the pass that runs, or None where it is a plain one."""
    return _current.get()


@contextlib.contextmanager
def running(state: PassState) -> Iterator[None]:
    """Tell the layers about a pass while it runs."""
    token = _current.set(state)
    try:
        yield
    finally:
        _current.reset(token)
