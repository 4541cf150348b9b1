"""The software's side: Python and packages, CUDA's libraries, and the environment of a run."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_espo.doctor.finding import Finding, Gpu, dotted
from megatron_espo.environment import CONNECTIONS, Engine, connections_problem

# The oldest GPUs with FP8 matrix products: Ada (8.9) and Hopper (9.0).
_FP8_CAPABILITY = (8, 9)

# What Transformer Engine's installation guide asks for up to 2.11, and what 2.20.2 refuses to be
# imported without (MIN_CUDNN_VERSION in transformer_engine/common/__init__.py).
_OLDEST_CUDNN = (9, 3, 0)
_CUDNN = (9, 12, 0)

# Distribution -> the versions that work, as a regular expression, and how to get one.
NEEDED = {
    "torch": (r"2\.([89]|[1-9]\d)", "torch>=2.8"),
    "megatron-core": (r"0\.19(\.|$)", "megatron-core[training]==0.19.*"),
    "transformers": (r"[5-9]\.", "transformers>=5.0"),
}


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver.

    Attributes:
        version: its own version.
        cuda: the newest CUDA that it knows.
        gpus: GPUs that it sees, whatever CUDA_VISIBLE_DEVICES says.
    """

    version: str
    cuda: tuple[int, int]
    gpus: int


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
    for name, (pattern, wanted) in NEEDED.items():
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


def check_driver(
    driver: Driver | None, built_for: str | None, gpus: Sequence[Gpu]
) -> list[Finding]:
    """Compare the driver with the CUDA that PyTorch was built for.

    A driver runs every CUDA of its own major version, and older ones.

    Args:
        driver: the driver, or None without one.
        built_for: PyTorch's CUDA version, or None without CUDA.
        gpus: GPUs that PyTorch sees.

    Returns:
        Findings.
    """
    if driver is None:
        return []
    known = f"driver {driver.version} for CUDA {dotted(driver.cuda)}"
    if built_for is None:
        text = (
            f"the {known} sees {driver.gpus} GPUs, but this PyTorch has no CUDA; install another."
        )
        return [Finding("warning", text)] if driver.gpus else []
    major = int(built_for.split(".")[0])
    if driver.cuda[0] < major and not gpus:
        text = (
            f"the {known} is too old for this PyTorch, built for CUDA {built_for}; update the "
            f"driver or install a PyTorch for CUDA {driver.cuda[0]}."
        )
        return [Finding("problem", text)]
    return [Finding("ok", f"{known}, PyTorch built for CUDA {built_for}")]


def check_kernels(architectures: Sequence[str], gpus: Sequence[Gpu]) -> list[Finding]:
    """Look whether PyTorch holds kernels for the GPUs.

    Args:
        architectures: what PyTorch was compiled for: sm_90 (kernels, for its major version only),
            compute_90 (a form that the driver compiles, for it and anything newer).
        gpus: visible GPUs.

    Returns:
        Findings.
    """

    def runs(architecture: str, capability: tuple[int, int]) -> bool:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", architecture)
        if found is None:
            return False
        compiled = int(found[2]), int(found[3])
        same = compiled[0] == capability[0] or found[1] == "compute"
        return same and compiled <= capability

    missing = {
        gpu.capability for gpu in gpus if not any(runs(a, gpu.capability) for a in architectures)
    }
    return [
        Finding(
            "problem",
            f"this PyTorch has no kernels for compute capability {dotted(capability)} (it has "
            f"{', '.join(architectures)}); install a build for this GPU.",
        )
        for capability in sorted(missing)
    ]


def check_transformer_engine(engine: Engine, gpus: Sequence[Gpu]) -> list[Finding]:
    """Look for Transformer Engine and say whether FP8 can be used.

    Args:
        engine: what was found.
        gpus: visible GPUs.

    Returns:
        Findings.
    """
    if not gpus:
        return [Finding("ok", "Transformer Engine is not needed without a GPU")]
    if engine.problem is not None:
        text = (
            f"{engine.problem}, use the Docker image, or pass --transformer-impl local (slower, no "
            "FP8)."
        )
        return [Finding("problem", text)]
    oldest = min(gpu.capability for gpu in gpus)
    if oldest < _FP8_CAPABILITY:
        text = (
            f"FP8 needs compute capability {dotted(_FP8_CAPABILITY)} (Ada, Hopper), a GPU here "
            f"has {dotted(oldest)}; leave out --fp8-format."
        )
        return [Finding("ok", f"Transformer Engine {engine.version}"), Finding("warning", text)]
    return [Finding("ok", f"Transformer Engine {engine.version}, FP8 can be used")]


def check_cudnn(version: int | None, gpus: Sequence[Gpu]) -> list[Finding]:
    """Compare cuDNN, which Transformer Engine's attention runs on, with what that asks for.

    Args:
        version: as cuDNN encodes it (91200 is 9.12.0), or None without it.
        gpus: visible GPUs.

    Returns:
        Findings.
    """
    if not gpus:
        return []
    if version is None:
        text = "there is no cuDNN, which Transformer Engine's attention needs; install it."
        return [Finding("problem", text)]
    scale = 10000 if version >= 90000 else 1000  # cuDNN 9 has changed its encoding
    found = (version // scale, version % scale // 100, version % 100)
    name, wanted = ".".join(map(str, found)), ".".join(map(str, _CUDNN))
    if found < _CUDNN:
        oldest = ".".join(map(str, _OLDEST_CUDNN))
        text = (
            f"cuDNN {name} is old: Transformer Engine asks for {oldest} or newer, 2.20 for "
            f"{wanted}; install nvidia-cudnn-cu12 or -cu13 of at least that version."
        )
        return [Finding("problem" if found < _OLDEST_CUDNN else "warning", text)]
    return [Finding("ok", f"cuDNN {name}")]


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


def check_connections(environment: Mapping[str, str], gpus: Sequence[Gpu]) -> list[Finding]:
    """Look at CUDA_DEVICE_MAX_CONNECTIONS, which every run sets by itself if nobody else has.

    Args:
        environment: of a run.
        gpus: visible GPUs.

    Returns:
        Findings.
    """
    if not gpus:
        return []
    given = environment.get(CONNECTIONS)
    if given is None:
        return [Finding("ok", f"{CONNECTIONS} is not set: runs set it as the GPUs want it")]
    problem = connections_problem(given, min(gpu.capability for gpu in gpus))
    return [
        Finding("warning", f"{problem}.") if problem else Finding("ok", f"{CONNECTIONS}={given}")
    ]


def check_compiler(found: str | None, gpus: Sequence[Gpu]) -> list[Finding]:
    """Look for a C compiler: Megatron's fused functions go through Triton, which may call one.

    Args:
        found: its name, or None.
        gpus: visible GPUs.

    Returns:
        Findings.
    """
    if found is not None or not gpus:
        return []
    text = (
        "no C compiler was found, which Triton (3.6 does, 3.9 does not) needs at the start of a "
        "run; install gcc or set CC."
    )
    return [Finding("warning", text)]
