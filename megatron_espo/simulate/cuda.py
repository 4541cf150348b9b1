"""``torch.cuda`` and ``torch.distributed`` of a node of GPUs that are not there.

:func:`install` puts them in place for the whole process, before anything imports Megatron;
:func:`use` points them at the device of a rank.
"""

import contextlib
import os
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from megatron_espo.simulate import private
from megatron_espo.simulate.device import FakeDevice, aten
from megatron_espo.simulate.ledger import Ledger

# An H100 SXM: what Megatron and Transformer Engine ask of a device.
_PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    total_memory=85 * 10**9,
    multi_processor_count=132,
    warp_size=32,
    max_threads_per_multi_processor=2048,
    gcnArchName="",
    L2_cache_size=50 << 20,
    is_integrated=0,
    uuid="0",
)
_current: list[FakeDevice] = []


def device() -> FakeDevice:
    """The device of the rank that runs."""
    return _current[-1]


def use(ledger: Ledger) -> None:
    """Run this process's tensors on a device of this rank from here on."""
    if _current:
        device().write_to(ledger)
        return
    _current.append(FakeDevice(ledger))
    device().__enter__()


def _wait(kind: str) -> None:
    if _current:
        device().ledger.wait(kind)


class _Stream:
    """The only stream."""

    cuda_stream = stream_id = device_index = priority = 0
    device = torch.device("cuda", 0)
    device_type = 1

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def synchronize(self) -> None:
        _wait("stream.synchronize")

    def wait_stream(self, other: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def query(self) -> bool:
        return True


class _Event:
    """An event that has happened."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def record(self, stream: object = None) -> None: ...

    def wait(self, stream: object = None) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        _wait("event.synchronize")

    def elapsed_time(self, other: object) -> float:
        return 1.0


class _Runtime:
    """CUDA's runtime, as far as host memory is registered with it."""

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        """Pin host memory; unlike the allocator's, it is not rounded up."""
        device().register(size)
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        """Release it."""
        device().unregister()
        return 0

    def cudaGetErrorString(self, error: int) -> str:
        """Name an error."""
        return f"error {error}"


def _constant(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def install(gpus: int) -> None:
    """Let this process see a node of GPUs.

    Args:
        gpus: of the node.
    """
    # Fused functions run as they are: what they compile to is not known here.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    private.prepare()
    stream, nothing = _Stream(), _constant(None)
    runtime = _Runtime()
    live = lambda *args, **kwargs: device().ledger.live  # noqa: E731
    peak = lambda *args, **kwargs: device().ledger.phase.peak  # noqa: E731
    replacements: dict[str, Any] = {
        "is_available": _constant(True),
        "device_count": _constant(gpus),
        "current_device": _constant(0),
        "set_device": nothing,
        "_lazy_init": nothing,
        "init": nothing,
        "is_initialized": _constant(True),
        "get_device_capability": _constant((_PROPERTIES.major, _PROPERTIES.minor)),
        "get_device_properties": _constant(_PROPERTIES),
        "get_device_name": _constant(_PROPERTIES.name),
        "get_arch_list": _constant(["sm_90"]),
        "synchronize": lambda *args, **kwargs: _wait("torch.cuda.synchronize"),
        "empty_cache": nothing,
        "current_stream": _constant(stream),
        "default_stream": _constant(stream),
        "set_stream": nothing,
        "stream": _constant(contextlib.nullcontext()),
        "Stream": _Stream,
        "Event": _Event,
        "device": _constant(contextlib.nullcontext()),
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "manual_seed": nothing,
        "manual_seed_all": nothing,
        "seed": nothing,
        "initial_seed": _constant(1),
        "memory_allocated": live,
        "max_memory_allocated": peak,
        "memory_reserved": live,
        "max_memory_reserved": peak,
        "reset_peak_memory_stats": nothing,
        "memory_stats": lambda *args, **kwargs: defaultdict(int),
        "mem_get_info": _constant((80 * 10**9, _PROPERTIES.total_memory)),
        "is_bf16_supported": _constant(True),
        "is_current_stream_capturing": _constant(False),
        "default_generators": (torch.default_generator,) * gpus,
        "cudart": _constant(runtime),
        "utilization": _constant(0),
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    for name in ("get_rng_state", "set_rng_state"):
        setattr(torch.cuda.random, name, replacements[name])
    for name in ("range_push", "range_pop", "mark", "range_start", "range_end"):
        setattr(torch.cuda.nvtx, name, nothing)
    _replace_attention()
    _replace_distributed()
    _replace_module_apply()
    _replace_tensor()


def _replace_attention() -> None:
    """PyTorch chooses its attention kernel from the real device; choose one for an H100."""
    plain = torch.nn.functional.scaled_dot_product_attention

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if not private.is_fake_cuda(query):
            return plain(
                query, key, value, attn_mask, dropout_p, is_causal,
                scale=scale, enable_gqa=enable_gqa,
            )  # fmt: skip
        grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        mode = ("masked" if attn_mask is not None else "plain") + (" training" if grad else "")
        device().ledger.attention("PyTorch", query.size(0), query.size(-2), key.size(-2), mode)
        if attn_mask is None:
            flash = aten._scaled_dot_product_flash_attention
            out: Tensor = flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
            return out
        if enable_gqa and key.size(1) != query.size(1):
            repeats = query.size(1) // key.size(1)
            key, value = (t.repeat_interleave(repeats, 1) for t in (key, value))
        bias = attn_mask
        if attn_mask.dtype == torch.bool:
            bias = torch.zeros_like(attn_mask, dtype=query.dtype)
            bias = bias.masked_fill_(~attn_mask, float("-inf"))
        bias = bias.expand(query.size(0), query.size(1), query.size(2), key.size(-2))
        efficient = aten._scaled_dot_product_efficient_attention
        result: tuple[Tensor, ...] = efficient(
            query, key, value, bias, grad, dropout_p, is_causal, scale=scale
        )
        return result[0]

    torch.nn.functional.scaled_dot_product_attention = attention


def _replace_distributed() -> None:
    """Groups of ranks that are not there; objects are gathered as this rank has them."""
    make_group = dist.new_group
    backend_of = dist.get_backend

    def init_process_group(backend: Any = None, *args: object, **kwargs: object) -> None:
        private.init_fake_group(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))

    def new_group(
        ranks: Any = None, timeout: Any = None, backend: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        group: Any = make_group(ranks, timeout)
        if getattr(group, "group_name", None):  # this rank is one of its ranks
            if backend == "gloo":
                device().collectives.gloo.add(group.group_name)
            # Ranks make their groups in one order and use them in others.
            device().collectives.key(group)
        return group

    def get_backend(group: Any = None) -> str:
        name = getattr(group, "group_name", None)
        if name is None and group is not None:
            return str(backend_of(group))
        return "gloo" if name in device().collectives.gloo else "nccl"

    def note(kind: str, group: Any) -> None:
        device().collectives.note(group or dist.group.WORLD, kind, 0)

    def all_gather_object(objects: list[Any], obj: Any, group: Any = None) -> None:
        note("all_gather_object", group)
        objects[:] = [obj] * len(objects)

    def gather_object(
        obj: Any, object_gather_list: Any = None, dst: Any = None, group: Any = None, **_: Any
    ) -> None:
        note("gather_object", group)
        if object_gather_list is not None:
            object_gather_list[:] = [obj] * len(object_gather_list)

    def broadcast_object_list(
        objects: Any, src: Any = None, group: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        note("broadcast_object_list", group)

    for function in (
        *(init_process_group, new_group, get_backend),
        *(all_gather_object, gather_object, broadcast_object_list),
    ):
        for module in (dist, distributed_c10d):
            setattr(module, function.__name__, function)


def _replace_module_apply() -> None:
    """``Module.cuda()`` and the like without exchanging the insides of fake parameters."""
    plain = torch.nn.Module._apply

    def apply(self: torch.nn.Module, fn: Any, recurse: bool = True) -> torch.nn.Module:
        if not any(private.is_fake(p) for p in self.parameters()):
            return plain(self, fn, recurse)
        for child in self.children():
            child._apply(fn)
        for table in (self._parameters, self._buffers):
            for key, value in list(table.items()):
                if value is None:
                    continue
                with torch.no_grad():
                    new = fn(value)
                if new is value or (new.dtype == value.dtype and new.device == value.device):
                    continue
                if table is self._parameters:
                    made = torch.nn.Parameter(new, value.requires_grad)
                    kept = {k: v for k, v in vars(value).items() if k not in vars(made)}
                    vars(made).update(kept)
                    new = made
                table[key] = new
        return self

    torch.nn.Module._apply = apply  # type: ignore[method-assign]


def _replace_tensor() -> None:
    """``torch.tensor`` of a list of tensors on the device reads each of them."""
    plain = torch.tensor

    def tensor(data: Any, *args: Any, **kwargs: Any) -> Tensor:
        if isinstance(data, list | tuple) and data:
            first = data[0][0] if isinstance(data[0], list | tuple) and data[0] else data[0]
            if private.is_fake(first):
                data = _numbers(data)
        return plain(data, *args, **kwargs)

    torch.tensor = tensor


def _numbers(data: Any) -> Any:
    if isinstance(data, list | tuple):
        return [_numbers(entry) for entry in data]
    return data.item() if private.is_fake(data) else data
