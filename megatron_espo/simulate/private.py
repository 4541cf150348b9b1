"""The private interfaces of PyTorch that the simulation rests on, all of them.

Seen with PyTorch 2.15 for CUDA on x86-64 (``support`` says so where it cannot run). What is used:

* ``torch._subclasses.fake_tensor``: tensors with a shape, a type and a device, and no memory;
* the "fake" process group, which returns at once from every collective;
* ``torch._C._ensureCUDADeviceGuardSet``: device guards that do nothing;
* a virtual function of the CUDA hooks, see :func:`_deny_primary_context` and ``support``.
"""

import ctypes
import importlib
import mmap
import os
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import flop_registry

from megatron_espo.dry_run.support import primary_context_slot

# Returns 0 on x86-64: xor eax, eax; ret.
_RETURN_FALSE = b"\x31\xc0\xc3"
_kept: list[Any] = []
_init_process_group = dist.init_process_group

__all__ = ["FakeMode", "FakeTensor", "flop_registry", "prepare"]


class FakeMode(FakeTensorMode):
    """Makes fake CUDA tensors without asking for CUDA."""

    @property
    def avoid_device_init(self) -> bool:
        """Say that no device is to be initialised."""
        return True


def prepare() -> None:
    """Let autograd run on fake CUDA tensors in this process. Call once."""
    # Its tables want the original torch.cuda, which is replaced next.
    importlib.import_module("torch._dynamo")
    _deny_primary_context()
    torch._C._ensureCUDADeviceGuardSet()
    torch._C._set_only_lift_cpu_tensors(True)
    # Collectives of backward passes must come in the order of the pass.
    torch.autograd.set_multithreading_enabled(False)


def _deny_primary_context() -> None:
    """Answer "no" for CUDA when the autograd engine asks which devices have a context.

    Before a backward pass the engine asks this of every device that the (empty) device guard
    counts. In a build for CUDA on a machine without a GPU the answer is an exception.
    """
    library = ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so"))
    get = library._ZN2at6detail12getCUDAHooksEv
    get.restype = ctypes.c_void_p
    table = ctypes.c_void_p.from_address(get()).value
    assert table is not None
    protection = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
    code = mmap.mmap(-1, mmap.PAGESIZE, prot=protection)
    code.write(_RETURN_FALSE)
    _kept.append(code)
    place = table + primary_context_slot() * ctypes.sizeof(ctypes.c_void_p)
    libc = ctypes.CDLL(None, use_errno=True)
    page = ctypes.c_void_p(place & ~(mmap.PAGESIZE - 1))
    if libc.mprotect(page, ctypes.c_size_t(mmap.PAGESIZE), mmap.PROT_READ | mmap.PROT_WRITE):
        raise OSError(ctypes.get_errno(), "mprotect")
    ctypes.c_void_p.from_address(place).value = ctypes.addressof(ctypes.c_char.from_buffer(code))


def init_fake_group(rank: int, world_size: int) -> None:
    """Start torch.distributed with ranks that are not there.

    Args:
        rank: the one that this process plays.
        world_size: ranks of the job.
    """
    _init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)


def finished_work() -> Any:
    """Return the handle of a collective that is done."""
    return FakeWork().boxed()


def group_of(arguments: list[Any]) -> Any:
    """Find the process group among the arguments of a c10d operation, or None."""
    for argument in arguments:
        if isinstance(argument, torch.ScriptObject):
            try:
                return dist.ProcessGroup.unbox(argument)
            except (RuntimeError, ValueError, TypeError):
                continue
    return None


def is_fake(value: object) -> bool:
    """Whether a value is a tensor without memory."""
    return isinstance(value, FakeTensor)


def is_fake_cuda(value: object) -> bool:
    """Whether a value is a tensor without memory on a CUDA device."""
    return isinstance(value, FakeTensor) and value.fake_device.type == "cuda"
