"""What must hold before CUDA starts and Megatron is imported, however a process was started.

Environment variables that CUDA reads once, when it starts, and the question whether Transformer
Engine can be used. Start scripts set nothing of this: a rank of torchrun, a tool and a single
process come through here alike.
"""

import argparse
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_espo.errors import UserError

CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
# From this compute capability on (Blackwell) kernels need not be queued in one line for
# communication to start before the matrix product that it overlaps with.
_ORDERED_BY_PRIORITY = 10
_FSDP = ("--use-torch-fsdp2", "--use-megatron-fsdp")

# The oldest Transformer Engine that was looked at; setup.py's [gpu] extra asks for the same.
OLDEST_ENGINE = (2, 8)

# --attention-backend -> what Megatron lets NVTE_FLASH_ATTN, NVTE_FUSED_ATTN, NVTE_UNFUSED_ATTN be.
_ATTENTION = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
_ATTENTION_BACKENDS = {"flash": "100", "fused": "010", "unfused": "001", "auto": "111"}


_parent = os.getppid()


def _remember_parent() -> None:
    global _parent
    _parent = os.getppid()


# A fork has a parent of its own.
os.register_at_fork(after_in_child=_remember_parent)


def first_parent() -> int:
    """The process that started this one: under torchrun, torchrun, whether it lives or not."""
    return _parent


def set_environment(
    environment: MutableMapping[str, str] = os.environ, argv: Sequence[str] | None = None
) -> None:
    """Set what CUDA reads when it starts; call before anything asks torch.cuda a question.

    Megatron wants one queue of kernels for tensor and context parallelism on GPUs before Blackwell
    and several for FSDP. A value that is there already stays.

    Args:
        environment: changed.
        argv: the command line, looked at for FSDP; by default the process's own.
    """
    if CONNECTIONS in environment:
        return
    words = sys.argv if argv is None else argv
    if any(word in _FSDP for word in words):
        return
    oldest = oldest_capability()
    if oldest is None or oldest[0] < _ORDERED_BY_PRIORITY:
        environment[CONNECTIONS] = "1"


def management_library() -> Any | None:
    """Start NVML, which answers although CUDA has not started or PyTorch cannot use it.

    Returns:
        The module pynvml, or None where it is missing or there is no driver.
    """
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    return nvml


def oldest_capability() -> tuple[int, int] | None:
    """Ask the driver for the lowest compute capability of this machine's GPUs.

    CUDA itself would have to start for an answer.

    Returns:
        Major and minor, or None where there is no GPU, no driver, or no pynvml.
    """
    nvml = management_library()
    if nvml is None:
        return None
    try:
        found = [
            tuple(nvml.nvmlDeviceGetCudaComputeCapability(nvml.nvmlDeviceGetHandleByIndex(i)))
            for i in range(nvml.nvmlDeviceGetCount())
        ]
    except nvml.NVMLError:
        return None
    return min(found, default=None)


def connections_problem(given: str | None, capability: tuple[int, int]) -> str | None:
    """Say what is wrong with CUDA_DEVICE_MAX_CONNECTIONS for tensor and context parallelism.

    Args:
        given: its value.
        capability: of the oldest GPU.

    Returns:
        One sentence without its full stop, or None.
    """
    if given == "1" or capability[0] >= _ORDERED_BY_PRIORITY:
        return None
    return (
        f"the environment's {CONNECTIONS} is {given!r}, but tensor and context parallelism need 1 "
        f"on GPUs of compute capability {capability[0]}.{capability[1]}; unset it"
    )


def check_environment(
    args: argparse.Namespace,
    capability: tuple[int, int] | None,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Check variables that somebody has set against the flags, as Megatron will, but in time.

    Args:
        args: parsed arguments.
        capability: compute capability of the GPU, or None without one.
        environment: the process's.

    Raises:
        UserError: naming the variable to change.
    """
    given = environment.get(CONNECTIONS)
    if args.use_torch_fsdp2:
        if capability is None:
            raise UserError("--use-torch-fsdp2 needs a GPU; use --use-distributed-optimizer.")
        if given == "1":
            raise UserError(
                f"--use-torch-fsdp2 and {CONNECTIONS}=1 do not go together; set it to 8, CUDA's "
                "own value, in the environment."
            )
    elif (
        capability is not None and args.tensor_model_parallel_size * args.context_parallel_size > 1
    ):
        problem = connections_problem(given, capability)
        if problem is not None:
            raise UserError(f"{problem}.")
    _check_attention(args, environment)


def check_ranks(gpus: int, environment: Mapping[str, str] = os.environ) -> None:
    """Check that every rank of this node has a GPU of its own.

    Args:
        gpus: visible GPUs.
        environment: as torchrun sets it.

    Raises:
        UserError: there are more ranks than GPUs.
    """
    ranks = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    if 0 < gpus < ranks:
        raise UserError(
            f"torchrun started {ranks} ranks on a node where {gpus} GPUs are visible; pass "
            f"--nproc-per-node {gpus} to torchrun, or check CUDA_VISIBLE_DEVICES."
        )


def _check_attention(args: argparse.Namespace, environment: Mapping[str, str]) -> None:
    backend = args.attention_backend.name
    if backend not in _ATTENTION_BACKENDS:
        raise UserError(
            f"--attention-backend {backend}: layers without Transformer Engine are chosen with "
            "--transformer-impl local; leave it out."
        )
    for name, wanted in zip(_ATTENTION, _ATTENTION_BACKENDS[backend], strict=True):
        if environment.get(name, wanted) != wanted:
            raise UserError(
                f"the environment's {name} is {environment[name]}, but --attention-backend "
                f"{backend} needs {wanted}; unset {', '.join(_ATTENTION)} and choose with "
                "--attention-backend."
            )
    if args.transformer_impl == "transformer_engine":
        name = "NVTE_APPLY_QK_LAYER_SCALING"
        given = environment.get(name, "0")
        if given != str(int(args.apply_query_key_layer_scaling)):
            raise UserError(
                f"the environment's {name} is {given} and does not go with --apply-query-key-layer-"
                "scaling, which has to be given where it is 1 and only there; change one."
            )


@dataclass(frozen=True)
class Engine:
    """Transformer Engine as it was found.

    Attributes:
        version: installed version, or None.
        error: why its import failed, or None.
    """

    version: str | None
    error: str | None = None

    @property
    def usable(self) -> bool:
        """Whether Megatron finds it."""
        return self.version is not None and self.error is None

    @property
    def problem(self) -> str | None:
        """What is wrong with it and how to mend it, or None."""
        if self.version is None:
            return "Transformer Engine is not installed; install the package's [gpu] extra"
        if self.error is not None:
            return (
                f"Transformer Engine {self.version} is installed but cannot be imported "
                f"({self.error}); install a build for this PyTorch and CUDA"
            )
        numbers = tuple(int(part) for part in self.version.split(".")[:2] if part.isdigit())
        if numbers < OLDEST_ENGINE:
            oldest = ".".join(map(str, OLDEST_ENGINE))
            return f"Transformer Engine {self.version} is too old; install {oldest} or newer"
        return None


@functools.cache
def transformer_engine() -> Engine:
    """Import Transformer Engine before Megatron does.

    Where it is installed and broken, Megatron would end with a traceback, or half believe in it,
    whatever layers were asked for. It is hidden instead, so that runs without it start.

    Returns:
        What was found.
    """
    name = "transformer_engine"
    if name not in sys.modules and importlib.util.find_spec(name) is None:
        return Engine(None)
    try:
        importlib.import_module(f"{name}.pytorch")
    # Missing libraries, wrong versions and mixed packages all raise something else.
    except Exception as error:
        for loaded in [each for each in sys.modules if each.partition(".")[0] == name]:
            del sys.modules[loaded]
        # Python's own way to say that a module cannot be imported.
        sys.modules[name] = None  # type: ignore[assignment]
        reason = next(iter(str(error).splitlines()), "")
        return Engine(
            _installed_version() or "(unknown version)", f"{type(error).__name__}: {reason}"
        )
    version = _installed_version() or str(sys.modules[name].__version__)
    return Engine(version)


def _installed_version() -> str | None:
    try:
        return importlib.metadata.version("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        return None
