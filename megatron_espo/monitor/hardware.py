"""GPU utilisation, memory, power and temperature through NVML; nothing where there is no GPU."""

import resource
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_espo import device
from megatron_espo.environment import management_library

_GIB = 2**30
# So many GPUs get curves of their own; of more, the mean and the ends are shown.
_MOST_CURVES = 64
# How readings of one GPU are brought together: a peak for what can run over, else the mean.
_PEAKS = ("memory_gib", "temperature_celsius")


class GpuMonitor:
    """Reads one GPU about once a second in a thread, between two reports."""

    def __init__(self, nvml: Any, handle: Any, interval: float = 1.0) -> None:
        """Start reading.

        Args:
            nvml: the module pynvml.
            handle: its handle of the GPU.
            interval: seconds between two readings.
        """
        self._nvml, self._handle = nvml, handle
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._readings: list[dict[str, float]] = []
        self._thread = threading.Thread(target=self._work, args=(interval,), daemon=True)
        self._thread.start()

    def drain(self) -> dict[str, float]:
        """Bring the readings since the last call together.

        Returns:
            By name: per cent, GiB, watts, degrees. A GPU that does not tell a quantity lacks it.
        """
        with self._lock:
            readings, self._readings = [*self._readings, self._read()], []
        names = {name for reading in readings for name in reading}
        joined = {name: [r[name] for r in readings if name in r] for name in sorted(names)}
        return {
            name: max(values) if name in _PEAKS else sum(values) / len(values)
            for name, values in joined.items()
        }

    def close(self) -> None:
        """Stop reading."""
        self._stop.set()
        self._thread.join()

    def _work(self, interval: float) -> None:
        while not self._stop.wait(interval):
            reading = self._read()
            with self._lock:
                self._readings.append(reading)

    def _read(self) -> dict[str, float]:
        nvml, handle = self._nvml, self._handle
        sources: dict[str, Callable[[], float]] = {
            "utilization_percent": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu,
            "memory_gib": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used / _GIB,
            "power_watts": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            "temperature_celsius": lambda: nvml.nvmlDeviceGetTemperature(
                handle, nvml.NVML_TEMPERATURE_GPU
            ),
        }
        reading = {}
        for name, read in sources.items():
            try:
                reading[name] = float(read())
            except nvml.NVMLError:  # a GPU that does not tell it, or fell off the bus
                continue
        return reading


def open_gpu(uuid: str | None = None, interval: float = 1.0) -> GpuMonitor | None:
    """Watch this rank's GPU.

    Args:
        uuid: of the GPU; None takes the one that this process computes on.
        interval: seconds between two readings.

    Returns:
        None where there is no GPU, no driver, or no pynvml.
    """
    if uuid is None:
        if not device.has_cuda():
            return None
        # NVML knows nothing of CUDA_VISIBLE_DEVICES: only the name of a GPU is the same in both.
        uuid = f"GPU-{torch.cuda.get_device_properties(device.current_device()).uuid}"
    nvml = management_library()
    if nvml is None:
        return None
    try:
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
    except nvml.NVMLError:
        return None
    return GpuMonitor(nvml, handle, interval)


def local_hardware(gpu: GpuMonitor | None) -> dict[str, float]:
    """Read what this rank uses: its GPU, PyTorch's peak on it, and the process's memory."""
    reading = {} if gpu is None else gpu.drain()
    if device.has_cuda():
        reading["peak_allocated_gib"] = torch.cuda.max_memory_allocated() / _GIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kilobytes, but bytes on macOS.
    reading["host_peak_gib"] = peak * (1 if sys.platform == "darwin" else 1024) / _GIB
    return reading


def gather_hardware(reading: dict[str, float]) -> dict[str, float]:
    """Bring the ranks' readings together, on all ranks.

    Args:
        reading: of this rank.

    Returns:
        Named numbers, see :func:`hardware_scalars`.
    """
    readings: list[Any] = [reading]
    if dist.is_initialized() and dist.get_world_size() > 1:
        readings = [None] * dist.get_world_size()
        dist.all_gather_object(readings, reading)
    return hardware_scalars(readings)


def hardware_scalars(readings: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Name the numbers of all ranks.

    Args:
        readings: one per rank.

    Returns:
        ``hardware/gpu3/power_watts`` for rank 3; for more ranks than a person can tell apart
        ``hardware/gpus/power_watts/mean``, ``/min`` and ``/max``; peaks of memory over all ranks.
    """
    scalars = {}
    for name in sorted({name for reading in readings for name in reading}):
        values = {rank: r[name] for rank, r in enumerate(readings) if name in r}
        if name in ("peak_allocated_gib", "host_peak_gib"):
            scalars[f"hardware/{name}"] = max(values.values())
        elif len(readings) <= _MOST_CURVES:
            scalars |= {f"hardware/gpu{rank}/{name}": value for rank, value in values.items()}
        else:
            scalars[f"hardware/gpus/{name}/mean"] = sum(values.values()) / len(values)
            scalars[f"hardware/gpus/{name}/min"] = min(values.values())
            scalars[f"hardware/gpus/{name}/max"] = max(values.values())
    return scalars
