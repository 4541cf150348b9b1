"""How much of the hardware a run uses: operations per second and MFU, by phase."""

import re
from collections.abc import Mapping
from typing import Literal

import torch

from megatron_espo import device
from megatron_espo.monitor.flops import RolloutFlops

Precision = Literal["16-bit", "fp8"]

# Dense tensor-core peaks in TFLOP/s from NVIDIA's data sheets: bf16 or fp16 with fp32
# accumulation, and FP8. The first entry whose words the device's name contains counts.
PEAK_TFLOPS: tuple[tuple[str, dict[Precision, float]], ...] = (
    ("GB200", {"16-bit": 2500.0, "fp8": 5000.0}),
    ("B200", {"16-bit": 2250.0, "fp8": 4500.0}),
    ("H200", {"16-bit": 989.4, "fp8": 1978.9}),
    ("H100 PCIe", {"16-bit": 756.0, "fp8": 1513.0}),
    ("H100 NVL", {"16-bit": 835.5, "fp8": 1671.0}),
    ("H100", {"16-bit": 989.4, "fp8": 1978.9}),
    ("H800", {"16-bit": 989.4, "fp8": 1978.9}),
    ("H20", {"16-bit": 148.0, "fp8": 296.0}),
    ("L40S", {"16-bit": 362.1, "fp8": 733.0}),
    ("L40", {"16-bit": 181.1, "fp8": 362.0}),
    ("L4", {"16-bit": 121.0, "fp8": 242.0}),
    ("A100", {"16-bit": 312.0}),
    ("A800", {"16-bit": 312.0}),
    ("A40", {"16-bit": 149.7}),
    ("A30", {"16-bit": 165.0}),
    ("A10", {"16-bit": 125.0}),
    ("V100", {"16-bit": 125.0}),
)


def peak_tflops(name: str, precision: Precision) -> float | None:
    """Look up a device's peak.

    Args:
        name: as CUDA gives it.
        precision: of the matrix products.

    Returns:
        TFLOP/s, or None for a device or precision that is not in the table.
    """
    for fragment, peaks in PEAK_TFLOPS:
        if re.search(rf"\b{fragment}\b", name):  # A100 is no A10
            return peaks.get(precision)
    return None


def own_peak_tflops(asked: float | None, bits16: bool, fp8: bool) -> float | None:
    """Decide which peak MFU is measured against.

    Args:
        asked: --monitor-peak-tflops.
        bits16: whether the run computes in bf16 or fp16.
        fp8: whether its layers compute in FP8.

    Returns:
        TFLOP/s of one device; None where it is not known (a CPU, float32, a new GPU).
    """
    if asked is not None:
        return asked
    if not device.has_cuda() or not (bits16 or fp8):
        return None
    name = torch.cuda.get_device_name(device.current_device())
    return peak_tflops(name, "fp8" if fp8 else "16-bit")


def throughput_scalars(
    flops: RolloutFlops,
    seconds: Mapping[str, float],
    updates_share: float,
    devices: int,
    peak: float | None,
) -> dict[str, float]:
    """Turn operations and seconds into rates.

    Args:
        flops: operations of the rollout on all devices.
        seconds: by phase; a phase that ran before the run was resumed is missing.
        updates_share: share of the rollout's updates that these seconds cover.
        devices: number of ranks.
        peak: TFLOP/s of one device, or None.

    Returns:
        ``performance/PHASE_tflops`` per device and, with a peak, ``performance/PHASE_mfu``.
    """
    work = {
        "rollout": (flops.generation, seconds.get("rollout", 0.0)),
        "elbo": (
            flops.old_elbo + flops.ref_elbo,
            seconds.get("old_elbo", 0.0) + seconds.get("ref_elbo", 0.0),
        ),
        "update": (flops.update * updates_share, seconds.get("update", 0.0)),
    }
    scalars = {}
    for phase, (operations, spent) in work.items():
        if operations > 0 and spent > 0:
            rate = operations / spent / devices / 1e12
            scalars[f"performance/{phase}_tflops"] = rate
            if peak is not None:
                scalars[f"performance/{phase}_mfu"] = rate / peak
    return scalars
