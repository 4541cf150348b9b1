"""Is this machine ready? ``python -m megatron_espo.doctor [--gpus N] [--then COMMAND ...]``.

Prints what is here, and a sentence per problem with what to do. Works without a GPU and outside of
Docker. Status 1 if a run could not start; with ``--then`` the command follows if it could.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import re
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

GB = 10**9

# The oldest GPUs with FP8 matrix products: Ada (8.9) and Hopper (9.0).
_FP8_CAPABILITY = (8, 9)
_BF16_CAPABILITY = (8, 0)
_SHARED_MEMORY_PER_GPU = GB

# Distribution -> the versions that work, as a regular expression, and how to get one.
_NEEDED = {
    "torch": (r"2\.([89]|[1-9]\d)", "torch>=2.8"),
    "megatron-core": (r"0\.19(\.|$)", "megatron-core[training]==0.19.*"),
    "transformers": (r"[5-9]\.", "transformers>=5.0"),
}


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        level: ok, warning (a run works, but not all or not as well), problem (no run can start).
        text: what was found; of a warning or problem one sentence that says what to do.
    """

    level: Literal["ok", "warning", "problem"]
    text: str


@dataclass(frozen=True)
class Gpu:
    """A visible GPU.

    Attributes:
        name: product name.
        memory: bytes.
        capability: compute capability.
    """

    name: str
    memory: int
    capability: tuple[int, int]


def check_versions(python: tuple[int, int], versions: Mapping[str, str | None]) -> list[Finding]:
    """Compare Python and packages with what the project needs.

    Args:
        python: major and minor version.
        versions: installed version by distribution, None if it is missing.

    Returns:
        Findings.
    """
    found = []
    if python < (3, 12):
        text = f"Python {python[0]}.{python[1]} is too old; use Python 3.12 or newer."
        found.append(Finding("problem", text))
    else:
        found.append(Finding("ok", f"Python {python[0]}.{python[1]}"))
    for name, (pattern, wanted) in _NEEDED.items():
        version = versions.get(name)
        if version is None:
            text = f"{name} is not installed; pip install '{wanted}'."
            found.append(Finding("problem", text))
        elif not re.match(pattern, version):
            text = f"{name} {version} is not supported; pip install '{wanted}'."
            found.append(Finding("problem", text))
        else:
            found.append(Finding("ok", f"{name} {version}"))
    return found


def check_gpus(gpus: Sequence[Gpu], wanted: int | None, built_with_cuda: bool) -> list[Finding]:
    """Look at the visible GPUs.

    Args:
        gpus: the GPUs.
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
        text = f"{len(same)} x {name}, {memory:.0f} GB, compute capability {_dotted(capability)}"
        found.append(Finding("ok", text))
    if len({gpu.name for gpu in gpus}) > 1:
        text = "the GPUs differ, and the slowest sets the pace; choose with CUDA_VISIBLE_DEVICES."
        found.append(Finding("warning", text))
    oldest = min(gpu.capability for gpu in gpus)
    if oldest < _BF16_CAPABILITY:
        text = f"compute capability {_dotted(oldest)} has no bf16; leave out --bf16."
        found.append(Finding("warning", text))
    return found


def check_transformer_engine(
    version: str | None, error: str | None, gpus: Sequence[Gpu]
) -> list[Finding]:
    """Look for Transformer Engine and say whether FP8 can be used.

    Args:
        version: installed version, or None.
        error: why its import failed, or None.
        gpus: visible GPUs.

    Returns:
        Findings.
    """
    if not gpus:
        text = "Transformer Engine is not needed without a GPU"
        return [Finding("ok", text)]
    if version is None:
        text = (
            "Transformer Engine is not installed: pip install 'megatron-espo[gpu]', use the "
            "Docker image, or pass --transformer-impl local (slower, no FP8)."
        )
        return [Finding("problem", text)]
    if error is not None:
        text = (
            f"Transformer Engine {version} cannot be imported ({error}); install a build for this "
            "PyTorch and CUDA, or use the Docker image."
        )
        return [Finding("problem", text)]
    oldest = min(gpu.capability for gpu in gpus)
    if oldest < _FP8_CAPABILITY:
        text = (
            f"FP8 needs compute capability {_dotted(_FP8_CAPABILITY)} (Ada, Hopper), a GPU here "
            f"has {_dotted(oldest)}; leave out --fp8-format."
        )
        return [Finding("ok", f"Transformer Engine {version}"), Finding("warning", text)]
    return [Finding("ok", f"Transformer Engine {version}, FP8 can be used")]


def check_nccl(version: str | None, gpus: Sequence[Gpu]) -> list[Finding]:
    """Say which NCCL PyTorch brings.

    Args:
        version: its version, or None without it.
        gpus: visible GPUs.

    Returns:
        Findings.
    """
    if version is None and gpus:
        text = "this PyTorch has no NCCL: several GPUs cannot work together; install another build."
        return [Finding("problem", text)]
    return [Finding("ok", f"NCCL {version}" if version else "no NCCL; gloo on the CPU")]


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
            "no sandbox works here for --espo-task code: install bubblewrap; in Docker, "
            "--security-opt seccomp=unconfined lets it make namespaces."
        )
        return [Finding("warning", text)]
    return [Finding("ok", f"{mode} (--espo-task code)")]


def examine(wanted_gpus: int | None) -> list[Finding]:
    """Make all checks on this machine.

    Args:
        wanted_gpus: GPUs there must be, or None.

    Returns:
        Findings.
    """
    versions = {name: _version(name) for name in (*_NEEDED, "transformer-engine")}
    found = check_versions((sys.version_info.major, sys.version_info.minor), versions)
    gpus, nccl, built_with_cuda = _torch_facts()
    found += check_gpus(gpus, wanted_gpus, built_with_cuda)
    found += check_nccl(nccl, gpus)
    engine = versions["transformer-engine"]
    found += check_transformer_engine(engine, _engine_error() if engine and gpus else None, gpus)
    found += check_shared_memory(_free_shared_memory(), len(gpus))
    devices = Path("/sys/class/infiniband")
    infiniband = sorted(path.name for path in devices.iterdir()) if devices.is_dir() else []
    interfaces = [name for _, name in socket.if_nameindex()]
    found += check_network(os.environ, interfaces, infiniband)
    import resource

    locked, files = (
        resource.getrlimit(which)[0] for which in (resource.RLIMIT_MEMLOCK, resource.RLIMIT_NOFILE)
    )
    unlimited = locked == resource.RLIM_INFINITY
    found += check_limits(None if unlimited else locked, files, bool(infiniband))
    found += check_sandbox(_sandbox())
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report.

    Args:
        argv: command line without the program's name; by default the process's own.

    Returns:
        Exit status: 1 if a run could not start.
    """
    parser = argparse.ArgumentParser(prog="python -m megatron_espo.doctor", description=__doc__)
    parser.add_argument("--gpus", type=int, metavar="N", help="there must be N GPUs")
    parser.add_argument(
        "--then", nargs=argparse.REMAINDER, metavar="COMMAND", help="run this if nothing is wrong"
    )
    options = parser.parse_args(argv)
    found = examine(options.gpus)
    for finding in found:
        print(f"{finding.level:8} {finding.text}", file=sys.stderr if options.then else None)
    if any(finding.level == "problem" for finding in found):
        return 1
    if options.then:
        sys.stderr.flush()
        os.execvp(options.then[0], options.then)
    return 0


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch_facts() -> tuple[list[Gpu], str | None, bool]:
    """The visible GPUs, NCCL's version, and whether PyTorch was built with CUDA."""
    if importlib.util.find_spec("torch") is None:
        return [], None, False
    import torch
    import torch.distributed as dist

    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            gpus.append(Gpu(facts.name, facts.total_memory, (facts.major, facts.minor)))
    nccl = None
    if gpus and dist.is_nccl_available():
        version = torch.cuda.nccl.version()
        nccl = ".".join(map(str, version))
    return gpus, nccl, torch.version.cuda is not None


def _engine_error() -> str | None:
    try:
        importlib.import_module("transformer_engine.pytorch")
    # A library that does not fit fails in many ways, and none must end the report.
    except Exception as error:
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return None


def _sandbox() -> str | None:
    from megatron_espo.tasks import sandbox

    try:
        return sandbox.start_line()
    except ValueError:
        return None


def _free_shared_memory() -> int | None:
    try:
        state = os.statvfs("/dev/shm")
    except OSError:
        return None
    return state.f_bavail * state.f_frsize


if __name__ == "__main__":
    sys.exit(main())
