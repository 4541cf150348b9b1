"""What Megatron-Core needs in order to run on this machine, in one place.

Megatron spells "cuda" out in allocations, streams, events and random-state calls. On a machine
without CUDA, :func:`prepare` points these at the CPU and gloo; the code that runs is the same code
that runs on GPUs. With CUDA present nothing of Megatron is changed, apart from the repairs of
``megatron_patches.py`` that do not depend on the device. And one of PyTorch's attention kernels is
not taken.
"""

import contextlib
import functools
import importlib
import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_espo import megatron_patches
from megatron_espo.environment import CONNECTIONS, set_environment, transformer_engine

CPU = torch.device("cpu")

# Megatron's own flags that a run without CUDA cannot do without, as argparse destinations.
CPU_ARGUMENT_DEFAULTS: dict[str, Any] = {
    "transformer_impl": "local",
    "use_cpu_initialization": True,
    "distributed_backend": "gloo",
    "gradient_accumulation_fusion": False,
    "no_persist_layer_norm": True,
    "masked_softmax_fusion": False,
    "bias_swiglu_fusion": False,
    "bias_gelu_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
}


def gpu_argument_defaults() -> dict[str, Any]:
    """Megatron's flags whose defaults this machine's packages do not allow on its GPUs.

    They hold with ``--transformer-impl local``, which is then the only one that can be had.

    Returns:
        Values by argparse destination.
    """
    # The fused rotation is Transformer Engine's, and Megatron refuses to build a model with it.
    return {} if transformer_engine().usable else {"apply_rope_fusion": False}


def has_cuda() -> bool:
    """Say whether this process runs on CUDA devices."""
    return torch.cuda.is_available()


def current_device() -> torch.device:
    """Return the device that this rank computes on."""
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else CPU


def import_megatron() -> None:
    """Import Megatron-Core; without CUDA, leave torch.compile's machinery out of it.

    Before that, set what CUDA reads when it starts, and look for Transformer Engine. Megatron
    decorates its fused functions with torch.compile when it is imported, which loads the whole
    compiler: a third of the start-up, for functions that a CPU runs as they are.
    """
    set_environment()
    transformer_engine()
    if "megatron.core" in sys.modules:
        return
    compiler = torch.compile
    if not has_cuda():
        torch.compile = _uncompiled  # type: ignore[assignment]
    try:
        megatron_patches.import_without_wandb()
    finally:
        torch.compile = compiler


def _uncompiled(function: Any = None, **_: object) -> Any:
    return (lambda later: later) if function is None else function


def prepare() -> None:
    """Make Megatron-Core usable on this machine; call once, before Megatron's start-up.

    Where CUDA is present it changes nothing of Megatron but what is repaired everywhere, and it
    chooses among PyTorch's attention kernels. Calling it again has no effect.
    """
    set_environment()
    transformer_engine()
    megatron_patches.skip_compiled_helpers()
    megatron_patches.repair_distributed_optimizer()
    megatron_patches.repair_strict_loading()
    megatron_patches.expect_parts_of_checkpoints()
    megatron_patches.repair_changed_rates()
    # Its attention keeps a compiled graph for every shape; the passes that go through PyTorch's
    # kernels (caches, the last layer's rows) have as many as there are steps.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if has_cuda() or _CudaOnCpu.active:
        return
    # torch.compile on a CPU costs minutes of start-up for functions that run once in the warm-up.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # Megatron wants it with tensor parallelism even here, where no value has a meaning.
    if CONNECTIONS in os.environ:
        os.environ[CONNECTIONS] = "1"
    # PyTorch's optimizers import this at their first step; its tables want the original torch.cuda.
    importlib.import_module("torch._dynamo")
    _replace_cuda_calls()
    megatron_patches.run_without_cuda()
    _CudaOnCpu.active = True
    _CudaOnCpu().__enter__()


def _is_cuda(device: object) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


class _CudaOnCpu(TorchFunctionMode):
    """Reads ``device="cuda"`` as the CPU in every torch call of the process."""

    active = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Gradient clipping asserts the CUDA type by name.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if kwargs and "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = CPU
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        return func(*args, **kwargs) if kwargs else func(*args)


def skip_interception(module: torch.nn.Module) -> None:
    """Without CUDA, run a module's forward pass without a look at each of its torch calls.

    A layer makes some two hundred of them, and each look costs microseconds. For modules that take
    their devices from their tensors, or ask :func:`torch.cuda.current_device`.

    Args:
        module: its forward method is wrapped.
    """
    if has_cuda():
        return
    forward = module.forward

    @functools.wraps(forward)
    def unwatched(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return forward(*args, **kwargs)

    module.forward = unwatched


def no_interception() -> contextlib.AbstractContextManager[object]:
    """Without CUDA, run some code without a look at each of its torch calls.

    For code that makes many small ones and names no device but those of its tensors.
    """
    return contextlib.nullcontext() if has_cuda() else torch._C.DisableTorchFunction()


class _NoStream:
    """A stream or event of a device that has none."""

    device = CPU

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None

    def record_event(self, event: object = None) -> "_NoStream":
        """Return what others can wait for: it has happened."""
        return _NoStream()

    def query(self) -> bool:
        """Everything on a CPU is done when the call returns."""
        return True

    def elapsed_time(self, other: object) -> float:
        """Events carry no time here; Megatron's timers use the host clock."""
        return 0.0


def _replace_cuda_calls() -> None:
    """Point the calls of torch.cuda that need a device at the CPU."""
    nothing = _constant(None)
    replacements: dict[str, Any] = {
        "current_device": _constant(CPU),
        "set_device": nothing,
        "synchronize": nothing,
        "empty_cache": nothing,
        "current_stream": _constant(_NoStream()),
        "default_stream": _constant(_NoStream()),
        "set_stream": nothing,
        "stream": lambda *args, **kwargs: contextlib.nullcontext(),
        "Stream": _NoStream,
        "Event": _NoStream,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        # torch.manual_seed calls manual_seed_all itself.
        "manual_seed": torch.default_generator.manual_seed,
        "manual_seed_all": nothing,
        "memory_allocated": _constant(0),
        "max_memory_allocated": _constant(0),
        "memory_reserved": _constant(0),
        "max_memory_reserved": _constant(0),
        "reset_peak_memory_stats": nothing,
        "memory_stats": lambda *args, **kwargs: _ZeroStats(),
        "get_device_properties": _constant(
            SimpleNamespace(name="cpu", major=0, minor=0, total_memory=0, multi_processor_count=0)
        ),
        "get_device_capability": _constant((0, 0)),
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, nothing)
    torch.nn.Module.cuda = lambda self, device=None: self  # type: ignore[method-assign]


class _ZeroStats(dict[str, int]):
    """Memory statistics of an allocator that is not there."""

    def __missing__(self, key: str) -> int:
        return 0


def _constant(value: Any) -> Callable[..., Any]:
    def call(*args: object, **kwargs: object) -> Any:
        return value

    return call
