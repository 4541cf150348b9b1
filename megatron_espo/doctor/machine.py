"""The machine's side: GPUs, shared memory, network, limits, and the sandbox."""

import os
import socket
from collections.abc import Mapping, Sequence

from megatron_espo.doctor.finding import GB, Finding, Gpu, dotted
from megatron_espo.errors import UserError

_BF16_CAPABILITY = (8, 0)
_SHARED_MEMORY_PER_GPU = GB


def check_gpus(gpus: Sequence[Gpu], wanted: int | None, built_with_cuda: bool) -> list[Finding]:
    """Look at the visible GPUs.

    Args:
        gpus: as PyTorch and the driver list them.
        wanted: how many there must be, or None.
        built_with_cuda: whether PyTorch was built with CUDA.

    Returns:
        Findings.
    """
    if wanted is not None and len(gpus) < wanted:
        why = "" if built_with_cuda else " (this PyTorch was built without CUDA)"
        text = (
            f"{len(gpus)} of {wanted} GPUs are visible{why}; check nvidia-smi, "
            "CUDA_VISIBLE_DEVICES and, in Docker, --gpus all."
        )
        return [Finding("problem", text)]
    if not gpus:
        text = "no GPU is visible: runs use the CPU; in Docker, pass --gpus all."
        return [Finding("warning", text)]
    found = []
    for name in dict.fromkeys(gpu.name for gpu in gpus):
        same = [gpu for gpu in gpus if gpu.name == name]
        memory, capability = same[0].memory / GB, same[0].capability
        text = f"{len(same)} x {name}, {memory:.0f} GB, compute capability {dotted(capability)}"
        found.append(Finding("ok", text))
    if len({gpu.name for gpu in gpus}) > 1:
        text = "the GPUs differ, and the slowest sets the pace; choose with CUDA_VISIBLE_DEVICES."
        found.append(Finding("warning", text))
    oldest = min(gpu.capability for gpu in gpus)
    if oldest < _BF16_CAPABILITY:
        text = f"compute capability {dotted(oldest)} has no bf16; leave out --bf16."
        found.append(Finding("warning", text))
    return found


def check_shared_memory(free: int | None, num_gpus: int) -> list[Finding]:
    """Look at the free space of /dev/shm, through which NCCL and data loaders talk.

    Args:
        free: bytes, or None where there is no /dev/shm.
        num_gpus: visible GPUs.

    Returns:
        Findings.
    """
    if free is None:
        return [Finding("warning", "there is no /dev/shm; mount one of some gigabytes.")]
    wanted = _SHARED_MEMORY_PER_GPU * max(num_gpus, 1)
    if free < wanted:
        text = (
            f"/dev/shm has {free / GB:.2f} GB free, {wanted / GB:.0f} GB are wanted; in Docker, "
            "pass --ipc=host or --shm-size."
        )
        return [Finding("warning" if num_gpus < 2 else "problem", text)]
    return [Finding("ok", f"/dev/shm: {free / GB:.1f} GB free")]


def check_network(
    environment: Mapping[str, str], interfaces: Sequence[str], infiniband: Sequence[str]
) -> list[Finding]:
    """Check that ranks could find each other.

    Args:
        environment: MASTER_ADDR, RDZV_ENDPOINT, NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME.
        interfaces: names of the network interfaces.
        infiniband: names of the InfiniBand devices.

    Returns:
        Findings.
    """
    found = []
    endpoint = environment.get("RDZV_ENDPOINT", "").rpartition(":")[0]
    names = {
        "this machine's name": socket.gethostname(),
        "MASTER_ADDR": environment.get("MASTER_ADDR"),
        "RDZV_ENDPOINT": endpoint or None,
    }
    for what, name in names.items():
        if name is None:
            continue
        try:
            address = socket.getaddrinfo(name, None)[0][4][0]
        except OSError:
            text = f"{what} {name} has no address; add it to /etc/hosts or the name server."
            several = what != "this machine's name"
            found.append(Finding("problem" if several else "warning", text))
            continue
        if str(address).startswith("127.") and environment.get("NNODES", "1") != "1":
            text = (
                f"{what} {name} is {address}, where other nodes find themselves; mend /etc/hosts "
                "or the name server."
            )
            found.append(Finding("warning", text))
        else:
            found.append(Finding("ok", f"{what} {name} is {address}"))
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        # NCCL's syntax: a list of prefixes; "=" asks for the exact name, "^" leaves names out.
        wanted = environment.get(variable, "")
        if not wanted or wanted.startswith("^"):
            continue
        prefixes = wanted.removeprefix("=").split(",")
        if not any(name.startswith(prefix) for name in interfaces for prefix in prefixes):
            text = (
                f"{variable} is {wanted}, but the interfaces here are {', '.join(interfaces)}; "
                "name one of them or unset it."
            )
            found.append(Finding("problem", text))
    devices = f"InfiniBand {', '.join(infiniband)}" if infiniband else "no InfiniBand"
    found.append(Finding("ok", f"interfaces {', '.join(interfaces)}; {devices}"))
    return found


def check_limits(locked_memory: int | None, open_files: int, infiniband: bool) -> list[Finding]:
    """Look at the process's limits.

    Args:
        locked_memory: bytes that may be locked; None for no limit.
        open_files: files that may be open.
        infiniband: whether there is InfiniBand, which locks memory.

    Returns:
        Findings.
    """
    found = []
    if infiniband and locked_memory is not None:
        text = (
            f"only {locked_memory / GB:.3f} GB of memory may be locked, which InfiniBand needs; "
            "ulimit -l unlimited, in Docker --ulimit memlock=-1."
        )
        found.append(Finding("warning", text))
    if open_files < 4096:
        text = f"only {open_files} files may be open; ulimit -n 65536."
        found.append(Finding("warning", text))
    return found


def check_sandbox(mode: str | None) -> list[Finding]:
    """Say how generated code would be run.

    Args:
        mode: what the sandbox says when a run starts, or None where none works.

    Returns:
        Findings.
    """
    if mode is None:
        text = (
            "generated code cannot be contained here, and --espo-task code does not start: install "
            "bubblewrap; in Docker, --security-opt seccomp=unconfined lets it make namespaces."
        )
        return [Finding("warning", text)]
    return [Finding("ok", f"{mode} (--espo-task code)")]


def sandbox_mode() -> str | None:
    """Ask the sandbox how it would run generated code; None where it cannot."""
    from megatron_espo.sandbox import run as sandbox

    try:
        return sandbox.start_line()
    except UserError:
        return None


def free_shared_memory() -> int | None:
    """Free bytes of /dev/shm; None where there is none."""
    try:
        state = os.statvfs("/dev/shm")
    except OSError:
        return None
    return state.f_bavail * state.f_frsize
