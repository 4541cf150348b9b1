"""Counts what a simulated rank does: memory that is alive, kernels, waits, in phases."""

import contextlib
import sys
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_espo.dry_run.record import Phase, Rank
from megatron_espo.dry_run.roofline import Ceilings

# PyTorch's caching allocator gives out multiples of this.
_BLOCK = 512
# Smaller tensors are listed together.
_NAMED = 1 << 22
_PACKAGES = ("/megatron_espo/", "/megatron/", "/transformer_engine/")


def place_of_call(depth: int = 2) -> str:
    """Say where in the package, and in what it called, the running code stands.

    Args:
        depth: frames to leave out.

    Returns:
        ``file:line``, followed by the nearest line of this package where that is another one.
    """
    frame: Any = sys._getframe(depth)
    first = ""
    while frame is not None:
        name = frame.f_code.co_filename
        if "/simulate/" not in name:
            package = next((p for p in _PACKAGES if p in name), None)
            if package is not None:
                here = f"{name[name.rindex(package) + 1 :]}:{frame.f_lineno}"
                first = first or here
                if package == "/megatron_espo/":
                    return here if first == here else f"{first} <- {here}"
        frame = frame.f_back
    return first or "?"


class Ledger:
    """The books of one rank.

    Attributes:
        rank: what is written down.
        live: bytes of the GPU alive now.
        tape: gets what happens, while someone listens: memory that is made and released, kernels,
            and the bare names of all else.
    """

    def __init__(self, rank: int, ceilings: Ceilings) -> None:
        """Open the books.

        Args:
            rank: number of the rank.
            ceilings: for rooflines.
        """
        self.rank = Rank(rank)
        self.ceilings = ceilings
        self.live = 0
        self.tape: list[tuple[Any, ...]] | None = None
        self._storages: dict[int, tuple[Any, int, str, str]] = {}
        # Addresses of storages are above.
        self._number = 0
        self._place: str | None = None
        self._name = "start"
        self._parts_at = 0
        self.phase = self.rank.phases.setdefault("start", Phase())

    # ---- phases

    @contextlib.contextmanager
    def phase_of(self, name: str) -> Iterator[None]:
        """Write to another phase inside the context."""
        before, started = self._name, time.perf_counter()
        self._enter(name)
        self.phase.entered += 1
        try:
            yield
        finally:
            self.phase.wall += time.perf_counter() - started
            self._enter(before)

    @property
    def is_outside(self) -> bool:
        """Whether no phase has been named."""
        return self._name == "start"

    def _enter(self, name: str) -> None:
        self._name, self._parts_at = name, 0
        self.phase = self.rank.phases.setdefault(name, Phase())
        if self.live > self.phase.peak:
            self.phase.peak = self.live

    def count(self, unit: str) -> None:
        """Note that something was done, such as a denoising step."""
        self.phase.units[unit] = self.phase.units.get(unit, 0) + 1

    # ---- memory

    def track(self, tensor: Tensor) -> None:
        """Count a tensor's storage as long as it lives."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = -(-storage.nbytes() // _BLOCK) * _BLOCK
        place = self._place
        if place is None:
            place = place_of_call(4) if size > _NAMED else ""
        self._add(key, weakref.ref(storage, partial(self._free, key)), size, place)

    @contextlib.contextmanager
    def at(self, place: str) -> Iterator[None]:
        """Say where the tensors that are made inside the context would be made."""
        self._place = place
        try:
            yield
        finally:
            self._place = None

    def make(self, size: int, place: str) -> int:
        """Count memory that no tensor holds.

        Args:
            size: bytes, as :meth:`track` rounds them.
            place: where a tensor would be made.

        Returns:
            Its name for :meth:`release`.
        """
        self._number -= 1
        self._add(self._number, None, size, place)
        return self._number

    def release(self, key: int) -> None:
        """Release what :meth:`make` counted."""
        self._free(key, None)

    def _add(self, key: int, reference: Any, size: int, place: str) -> None:
        self._storages[key] = (reference, size, place, self._name)
        if self.tape is not None:
            self.tape.append(("make", key, size, place))
        self.live += size
        phase = self.phase
        if self.live > phase.peak:
            phase.peak = self.live
            # Listing what is alive is slow: again only where it has changed by something.
            if self.live > 1.002 * self._parts_at or size > 1 << 26:
                self._parts_at = self.live
                parts: Counter[str] = Counter()
                for _, part, where, made in list(self._storages.values()):
                    parts[f"{made}: {where or 'small ones'}"] += part
                phase.parts = dict(parts.most_common(24))

    def _free(self, key: int, _: object) -> None:
        entry = self._storages.pop(key, None)
        if entry is not None:
            self.live -= entry[1]
            if self.tape is not None:
                self.tape.append(("free", key))

    def tell(self) -> None:
        """Tell who listens that something else happens."""
        if self.tape is not None:
            self.tape.append(("else",))

    # ---- time

    def kernel(self, name: str, flops: float, moved: float, *, fp8: bool = False) -> None:
        """Count a kernel.

        Args:
            name: of the operation.
            flops: floating-point operations.
            moved: bytes read and written.
            fp8: whether it multiplies in FP8.
        """
        if self.tape is not None:
            self.tape.append(("kernel", name, flops, moved, fp8))
        phase = self.phase
        phase.kernels += 1
        phase.operations[name] = phase.operations.get(name, 0) + 1
        phase.flops += flops
        phase.moved += moved
        phase.seconds += self.ceilings.kernel(flops, moved, fp8=fp8)

    def attention(self, kernel: str, rows: int, queries: int, keys: int, mode: str) -> None:
        """Note the shape that an attention kernel is chosen or built for."""
        self.tell()
        name = f"{kernel} {rows} x {queries} x {keys} {mode}"
        self.phase.attention[name] = self.phase.attention.get(name, 0) + 1

    def wait(self, kind: str) -> None:
        """Note that the host waits for the device."""
        self.tell()
        _add(self.phase.waits, f"{kind} at {place_of_call(3)}")

    def unknown(self, kind: str) -> None:
        """Note that the host reads a value that cannot be known."""
        self.tell()
        _add(self.phase.unknown, f"{kind} at {place_of_call(3)}")

    def complain(self, what: str) -> None:
        """Note what a GPU would refuse."""
        self.tell()
        _add(self.phase.complaints, f"{what} at {place_of_call(3)}")

    def copied(self, to_device: bool, size: int) -> None:
        """Count a copy between host and device."""
        self.tell()
        entry = self.phase.to_device if to_device else self.phase.to_host
        entry[0] += 1
        entry[1] += size


def _add(table: dict[str, int], name: str) -> None:
    table[name] = table.get(name, 0) + 1


def size_of(tensor: Tensor) -> int:
    """Bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def small(shape: torch.Size | list[int] | tuple[int, ...], most: int) -> bool:
    """Whether a shape has at most so many elements."""
    total = 1
    for length in shape:
        total *= int(length)
    return total <= most
