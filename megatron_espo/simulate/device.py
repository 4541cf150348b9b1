"""Tensors on a CUDA device that is not there.

A dispatch mode around PyTorch's FakeTensors: shape, type, strides, device checks and autograd are
PyTorch's own. Beside them it keeps the *known values* of small tensors whose inputs are known, so
that the host's logic (indices, lengths, masks, votes) goes its real way. What depends on weights is
unknown: where the host reads it, it reads zeros, and the place is written down.
"""

import contextlib
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from megatron_espo.simulate.collectives import Collectives
from megatron_espo.simulate.ledger import Ledger, size_of, small
from megatron_espo.simulate.private import FakeMode, FakeTensor, flop_registry

aten = torch.ops.aten
_DEVICE_OF = torch.ops.prim.device.default
CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
# Tensors of more elements have no known values.
KNOWN = 1 << 18
# Host tensors of more elements are fake, too: copies of weights.
HOST = 1 << 22

_FACTORIES = (aten.empty, aten.zeros, aten.ones, aten.full, aten.empty_strided)
# Launch nothing.
_FREE = (
    *(aten.empty, aten.empty_strided, aten.empty_like, aten.new_empty, aten.new_empty_strided),
    *(aten.detach, aten._unsafe_view, aten.alias, aten.lift_fresh),
)
# Their result's size depends on values: the host waits for it.
_DYNAMIC = (
    *(aten.nonzero, aten.bincount, aten.masked_select, aten._unique2, aten.unique_dim),
    aten.repeat_interleave,
)
_HALF = (torch.bfloat16, torch.float16)


def known(tensor: Tensor) -> Tensor | None:
    """Return a tensor's values on the host where they are known."""
    return getattr(tensor, "known", None) if isinstance(tensor, FakeTensor) else tensor


class FakeDevice(TorchDispatchMode):
    """The device of one rank.

    Attributes:
        ledger: where everything is counted.
        collectives: what happens to operations of torch.distributed.
    """

    def __init__(self, ledger: Ledger) -> None:
        """Make the device.

        Args:
            ledger: gets what happens.
        """
        super().__init__()
        self._mode = FakeMode(allow_non_fake_inputs=True)
        self.write_to(ledger)

    def write_to(self, ledger: Ledger) -> None:
        """Begin anew, for another rank."""
        self.ledger = ledger
        self.collectives = Collectives(ledger)
        self._pinned: dict[int, tuple[Any, int]] = {}
        self._pinned_live = 0
        self._registered: list[int] = []

    # ---- making tensors

    def adopt(self, values: Tensor) -> Tensor:
        """Make a CUDA tensor with known values.

        Args:
            values: on the host.
        """
        with self._mode:
            made = torch.empty_strided(
                values.shape, values.stride(), dtype=values.dtype, device=CUDA
            )
        if values.numel() <= KNOWN:
            made.known = values  # type: ignore[attr-defined]
        self.ledger.track(made)
        return made

    def pin(self, tensor: Tensor) -> None:
        """Count a host tensor as pinned while it lives; PyTorch rounds up to a power of two."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._pinned or size == 0:
            return
        rounded = 1 << (size - 1).bit_length()
        self.count_pinned(rounded)
        reference = weakref.ref(storage, partial(self._unpin, key, rounded))
        self._pinned[key] = (reference, rounded)

    def count_pinned(self, size: int) -> None:
        """Add pinned bytes, or take them away."""
        self._pinned_live += size
        self.ledger.rank.pinned = max(self.ledger.rank.pinned, self._pinned_live)

    def _unpin(self, key: int, size: int, _: object) -> None:
        if self._pinned.pop(key, None) is not None:
            self._pinned_live -= size

    def register(self, size: int) -> None:
        """Count memory that is pinned in place, of its own size.

        Fake memory has no address: a block is known again by its size.
        """
        self._registered.append(size)
        self.count_pinned(size)

    def unregister(self) -> None:
        """Release the memory that was registered last."""
        self.count_pinned(-self._registered.pop())

    def _is_pinned(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        return storage._cdata in self._pinned or storage.nbytes() in self._registered

    # ---- dispatch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation of PyTorch."""
        kwargs = kwargs or {}
        if func is _DEVICE_OF:  # a question, often asked by autograd; nothing is launched
            return self._fake(func, types, args, kwargs)
        if func.namespace == "c10d":
            return self.collectives(func, args, kwargs)
        packet = func.overloadpacket
        if packet is aten.is_pinned:
            return self._is_pinned(args[0])
        if packet is aten._pin_memory:
            copy = args[0].clone()
            self.pin(copy)
            return copy
        pinned = bool(kwargs.get("pin_memory"))
        if pinned:
            kwargs = {**kwargs, "pin_memory": False}
        flat, spec = tree_flatten((args, kwargs))
        tensors = [t for t in flat if isinstance(t, Tensor)]
        fakes = [t for t in tensors if isinstance(t, FakeTensor)]
        device = kwargs.get("device")
        on_cuda = device is not None and torch.device(device).type == "cuda"
        if not fakes and not on_cuda:
            large = not tensors and packet in _FACTORIES and not small(args[0], HOST)
            out = self._fake(func, types, args, kwargs) if large else func(*args, **kwargs)
        else:
            call = _Call(func, types, args, kwargs, flat, spec, tensors, fakes, on_cuda)
            out = self._on_device(call)
        if pinned:
            for tensor in tree_flatten(out)[0]:
                self.pin(tensor)
        return out

    def _fake(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        return self._mode.__torch_dispatch__(func, types, args, kwargs)

    def _on_device(self, call: "_Call") -> Any:
        packet, args, kwargs = call.packet, call.args, call.kwargs
        handler = _HANDLERS.get(packet)
        if handler is not None:
            return handler(self, call)
        if packet is aten._to_copy and kwargs.get("device") is not None:
            return self._move(call)
        for tensor in call.fakes:  # .data may have been exchanged
            values = getattr(tensor, "known", None)
            if values is not None and (values.shape != tensor.shape or tensor.dtype in _HALF):
                tensor.known = None
        all_known = all(getattr(t, "known", None) is not None for t in call.fakes)
        dynamic = packet in _DYNAMIC or (
            packet is aten.index
            and any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
        )
        if dynamic:
            self.ledger.wait(_name(packet))
        few = all(t.numel() <= KNOWN for t in call.tensors)
        if not call.tensors and args and isinstance(args[0], list | tuple):
            few = small(args[0], KNOWN)
        to_host = not call.on_cuda and kwargs.get("device") is not None
        values = call.on_host() if all_known and few and not to_host else None
        if dynamic:
            if values is None:
                self.ledger.unknown(_name(packet))
                values = _nothing(packet, call)
            return self.adopt(values)
        out = self._fake(call.func, call.types, args, kwargs)
        self._account(call, out)
        self._note_values(call, out, values)
        return out

    def _note_values(self, call: "_Call", out: Any, values: Any) -> None:
        """Keep what is known of an operation's results."""
        results = tree_flatten(out)[0]
        if values is None:
            for tensor in call.written():
                tensor.known = None
            known_values = [None] * len(results)
        else:
            known_values = tree_flatten(values)[0]
        for tensor, value in zip(results, known_values, strict=True):
            if not isinstance(tensor, FakeTensor):
                continue
            if value is not None:
                # Half precision is activations and weights: of no use to the host.
                tensor.known = None if value.dtype in _HALF else value
            if tensor.fake_device.type == "cuda":
                self.ledger.track(tensor)

    def _account(self, call: "_Call", out: Any) -> None:
        schema, packet = call.func._schema, call.packet
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        if views or packet in _FREE:
            return
        moved = sum(map(size_of, call.tensors))
        if not schema.is_mutable:
            moved += sum(size_of(t) for t in tree_flatten(out)[0] if isinstance(t, Tensor))
        flops = 0.0
        if packet in flop_registry:
            with contextlib.suppress(Exception):
                flops = float(flop_registry[packet](*call.args, **call.kwargs, out_val=out))
        self.ledger.kernel(_name(packet), flops, moved)

    # ---- reads and copies

    def _read(self, call: "_Call") -> Any:
        tensor = call.args[0]
        if tensor.fake_device.type == "cuda":
            self.ledger.wait("item")
        values = known(tensor)
        if values is not None:
            return values.item()
        self.ledger.unknown("item")
        if tensor.dtype.is_floating_point:
            return 0.0
        return False if tensor.dtype is torch.bool else 0

    def _equal(self, call: "_Call") -> bool:
        self.ledger.wait("equal")
        first, second = (known(t) for t in call.args[:2])
        if first is None or second is None:
            self.ledger.unknown("equal")
            return True
        return torch.equal(first, second)

    def _move(self, call: "_Call") -> Any:
        """``tensor.to(device)`` and ``tensor.cpu()``."""
        tensor, target = call.args[0], torch.device(call.kwargs["device"])
        size, waits = size_of(tensor), not call.kwargs.get("non_blocking")
        on_host = {**call.kwargs, "device": CPU, "non_blocking": False}
        if not isinstance(tensor, FakeTensor):
            self._to_device(size, waits)
            values = call.func(tensor, **on_host)
            shared = values is tensor or values.data_ptr() == tensor.data_ptr()
            return self.adopt(values.clone() if shared else values)
        source, values = tensor.fake_device.type, known(tensor)
        if source == target.type:
            out = self._fake(call.func, call.types, call.args, call.kwargs)
            self.ledger.track(out)
            if values is not None:
                out.known = call.func(values, **on_host)
            self._account(call, out)
            return out
        if target.type == "cuda":
            out = self._fake(call.func, call.types, call.args, call.kwargs)
            self.ledger.track(out)
            self._to_device(size, waits)
            return out
        self.ledger.copied(False, size)
        if waits:
            self.ledger.wait("copy to the host")
        if values is not None:
            return call.func(values, **on_host).clone()
        if tensor.numel() > HOST:
            return self._fake(call.func, call.types, call.args, call.kwargs)
        self.ledger.unknown("copy to the host")
        return torch.zeros(tensor.shape, dtype=call.kwargs.get("dtype") or tensor.dtype)

    def _to_device(self, size: int, waits: bool) -> None:
        self.ledger.copied(True, size)
        if waits:
            self.ledger.wait("blocking copy to the device")

    def _copy(self, call: "_Call") -> Any:
        """``target.copy_(source)``."""
        target, source = call.args[:2]
        waits = not (call.args[2] if len(call.args) > 2 else call.kwargs.get("non_blocking"))
        size, values = size_of(source), known(source)
        if not isinstance(target, FakeTensor):
            self.ledger.copied(False, size)
            # The host's own memory is complete when the call returns, unless it is pinned.
            if waits or not self._is_pinned(target):
                self.ledger.wait("copy to the host")
            if values is None:
                self.ledger.unknown("copy to the host")
                return target
            return target.copy_(values)
        out = self._fake(call.func, call.types, call.args, call.kwargs)
        devices = (_type(target), _type(source))
        if devices == ("cuda", "cpu"):
            self._to_device(size, waits)
        elif devices == ("cpu", "cuda"):
            self.ledger.copied(False, size)
            if waits or not self._is_pinned(target):
                self.ledger.wait("copy to the host")
        else:
            self._account(call, out)
        kept = known(target)
        if values is not None and kept is not None and values.numel() <= KNOWN:
            kept.copy_(values)
        else:
            vars(target)["known"] = None
        return out

    def _nothing(self, call: "_Call") -> None:
        """``record_stream``."""


_HANDLERS: dict[Any, Callable[[FakeDevice, "_Call"], Any]] = {
    aten._local_scalar_dense: FakeDevice._read,
    aten.item: FakeDevice._read,
    aten.equal: FakeDevice._equal,
    aten.copy_: FakeDevice._copy,
    aten.record_stream: FakeDevice._nothing,
}


class _Call:
    """An operation with its arguments."""

    def __init__(
        self,
        func: Any,
        types: Any,
        args: Any,
        kwargs: dict[str, Any],
        flat: list[Any],
        spec: Any,
        tensors: list[Tensor],
        fakes: list[Any],
        on_cuda: bool,
    ) -> None:
        self.func, self.types, self.args, self.kwargs = func, types, args, kwargs
        self.packet = func.overloadpacket
        self._flat, self._spec = flat, spec
        self.tensors, self.fakes, self.on_cuda = tensors, fakes, on_cuda

    def on_host(self) -> Any:
        """Run the operation on known values."""
        lowered = [known(x) if isinstance(x, FakeTensor) else x for x in self._flat]
        args, kwargs = tree_unflatten(lowered, self._spec)
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": CPU}
        return self.func(*args, **kwargs)

    def written(self) -> list[Any]:
        """The fake tensors that the operation writes into."""
        schema = self.func._schema
        if not schema.is_mutable:
            return []
        found = []
        for place, argument in enumerate(schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            given = self.args[place] if place < len(self.args) else self.kwargs.get(argument.name)
            found += [t for t in tree_flatten(given)[0] if isinstance(t, FakeTensor)]
        return found


def _nothing(packet: Any, call: _Call) -> Tensor:
    """The smallest result of an operation whose result's size depends on values."""
    if packet is aten.nonzero:
        return torch.zeros(0, call.args[0].dim(), dtype=torch.int64)
    if packet is aten.bincount:
        return torch.zeros(call.kwargs.get("minlength", 1) or 1, dtype=torch.int64)
    return torch.zeros(0, dtype=call.args[0].dtype)


def _type(tensor: Tensor) -> str:
    return tensor.fake_device.type if isinstance(tensor, FakeTensor) else tensor.device.type


def _name(packet: Any) -> str:
    return str(packet).split(".")[-1]
