"""Is this machine ready? ``python -m megatron_espo.doctor [--gpus N] [--then COMMAND ...]``.

Prints what is here, and a sentence per problem with what to do. Works without a GPU and outside of
Docker. Status 1 if a run could not start; with ``--then`` the command follows if it could.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import resource
import shutil
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_espo.command_line import Parser
from megatron_espo.doctor.finding import Finding, Gpu
from megatron_espo.doctor.machine import (
    check_gpus,
    check_limits,
    check_network,
    check_sandbox,
    check_shared_memory,
    free_shared_memory,
    sandbox_mode,
)
from megatron_espo.doctor.software import (
    NEEDED,
    Driver,
    check_compiler,
    check_connections,
    check_cudnn,
    check_driver,
    check_kernels,
    check_nccl,
    check_transformer_engine,
    check_versions,
)
from megatron_espo.environment import Engine, management_library, transformer_engine


@dataclass(frozen=True)
class _Torch:
    """What PyTorch says of itself and of the GPUs."""

    gpus: tuple[Gpu, ...] = ()
    nccl: str | None = None
    cuda: str | None = None
    cudnn: int | None = None
    architectures: tuple[str, ...] = ()


def examine(wanted_gpus: int | None) -> list[Finding]:
    """Make all checks on this machine.

    Args:
        wanted_gpus: GPUs there must be, or None.

    Returns:
        Findings.
    """
    versions = {name: _version(name) for name in NEEDED}
    found = check_versions((sys.version_info.major, sys.version_info.minor), versions)
    torch = _torch()
    gpus = torch.gpus
    found += check_driver(_driver(), torch.cuda, gpus)
    found += check_gpus(gpus, wanted_gpus, torch.cuda is not None)
    found += check_kernels(torch.architectures, gpus)
    found += check_nccl(torch.nccl, gpus)
    found += check_cudnn(torch.cudnn, gpus)
    found += check_transformer_engine(transformer_engine() if gpus else Engine(None), gpus)
    found += check_connections(os.environ, gpus)
    compilers = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    found += check_compiler(compilers, gpus)
    found += check_shared_memory(free_shared_memory(), len(gpus))
    devices = Path("/sys/class/infiniband")
    infiniband = sorted(path.name for path in devices.iterdir()) if devices.is_dir() else []
    interfaces = [name for _, name in socket.if_nameindex()]
    found += check_network(os.environ, interfaces, infiniband)
    locked, files = (
        resource.getrlimit(which)[0] for which in (resource.RLIMIT_MEMLOCK, resource.RLIMIT_NOFILE)
    )
    unlimited = locked == resource.RLIM_INFINITY
    found += check_limits(None if unlimited else locked, files, bool(infiniband))
    found += check_sandbox(sandbox_mode())
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report.

    Args:
        argv: command line without the program's name; by default the process's own.

    Returns:
        Exit status: 1 if a run could not start.
    """
    parser = Parser(prog="python -m megatron_espo.doctor", description=__doc__)
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


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch() -> _Torch:
    if importlib.util.find_spec("torch") is None:
        return _Torch()
    import torch

    if not torch.cuda.is_available():
        return _Torch(cuda=torch.version.cuda)
    gpus = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        gpus.append(Gpu(facts.name, facts.total_memory, (facts.major, facts.minor)))
    nccl = None
    if torch.distributed.is_nccl_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
    architectures = tuple(torch.cuda.get_arch_list())
    cudnn = torch.backends.cudnn.version()
    return _Torch(tuple(gpus), nccl, torch.version.cuda, cudnn, architectures)


def _driver() -> Driver | None:
    """Ask NVIDIA's driver, which answers although PyTorch cannot use it."""
    nvml = management_library()
    if nvml is None:
        return None
    try:
        cuda = nvml.nvmlSystemGetCudaDriverVersion_v2()
        version, gpus = nvml.nvmlSystemGetDriverVersion(), nvml.nvmlDeviceGetCount()
    except nvml.NVMLError:
        return None
    return Driver(str(version), (cuda // 1000, cuda % 1000 // 10), gpus)
