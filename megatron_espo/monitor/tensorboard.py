"""Writes what a run reports to TensorBoard, through the writer that Megatron opened."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

Chart = tuple[str, list[str]]

# The tab "custom scalars": what belongs together in one chart. A Multiline chart takes regular
# expressions of tags, a Margin chart a value with its lower and upper end.
LAYOUT: dict[str, dict[str, Chart]] = {
    "Reward": {
        "sampled": ("Multiline", ["reward/mean", "reward/correct"]),
        "held-out, greedy": ("Multiline", ["eval/accuracy", "eval/reward"]),
        "by task": ("Multiline", ["reward/by_task/.*"]),
        "groups that teach nothing": ("Multiline", ["reward/zero_std_groups"]),
        "failed rewards": ("Multiline", ["reward/timeouts", "reward/crashes"]),
    },
    "Policy": {
        "importance ratio": (
            "Margin",
            ["policy/ratio/mean", "policy/ratio/min", "policy/ratio/max"],
        ),
        "KL to the reference": ("Multiline", ["policy/kl_per_token"]),
        "clipped": ("Multiline", ["policy/clip_fraction_low", "policy/clip_fraction_high"]),
        "gradient norm": ("Multiline", ["policy/grad_norm"]),
        "learning rate": ("Multiline", ["policy/learning_rate"]),
        "warnings": ("Multiline", ["warnings/.*"]),
    },
    "ELBO": {
        "per token": (
            "Margin",
            ["elbo/per_token/mean", "elbo/per_token/min", "elbo/per_token/max"],
        ),
        "variance of an estimate": ("Multiline", ["elbo/mc_variance_per_token"]),
    },
    "Rollout": {
        "completion length": (
            "Margin",
            [f"rollout/completion_length/{end}" for end in ("mean", "min", "max")],
        ),
        "model evaluations": ("Multiline", ["rollout/nfe", "rollout/tokens_per_step"]),
        "confidence": ("Multiline", ["rollout/confidence"]),
    },
    "Performance": {
        "tokens per second": ("Multiline", ["performance/.*tokens_per_second"]),
        "seconds of a rollout": ("Multiline", ["time/.*"]),
        "model FLOP utilization": ("Multiline", ["performance/.*_mfu"]),
        "TFLOP/s per device": ("Multiline", ["performance/.*_tflops"]),
    },
    "Hardware": {
        "GPU utilization": ("Multiline", ["hardware/gpu.*/utilization_percent.*"]),
        "GPU memory": ("Multiline", ["hardware/gpu.*/memory_gib.*", "hardware/peak_allocated_gib"]),
        "GPU power": ("Multiline", ["hardware/gpu.*/power_watts.*"]),
        "GPU temperature": ("Multiline", ["hardware/gpu.*/temperature_celsius.*"]),
        "host memory": ("Multiline", ["hardware/host_peak_gib"]),
    },
}

# Equal bins between the ends: TensorBoard's own grow by a tenth and show nothing of ratios near 1.
_BINS = 30


def begin_events(writer: Any, step: int) -> None:
    """Mark the start of a run, or of its continuation after a checkpoint.

    A run that was killed may have written events after its last checkpoint, or without ever
    reaching one; the mark tells TensorBoard to drop those, since they will be written again.

    Args:
        writer: a SummaryWriter, or None.
        step: optimizer steps done.
    """
    if writer is None:
        return
    start = SessionLog(status=SessionLog.START)
    # What belongs to step 0, the evaluation before training, is done again after a start.
    writer.file_writer.add_event(Event(session_log=start), step + 1 if step else 0)


def write_layout(writer: Any) -> None:
    """Write how the charts are grouped; the last one written counts.

    Args:
        writer: a SummaryWriter, or None.
    """
    if writer is not None:
        writer.add_custom_scalars(LAYOUT)


def write_scalars(writer: Any, scalars: Mapping[str, float], step: int) -> None:
    """Write named numbers.

    Args:
        writer: a SummaryWriter, or None on ranks that do not write.
        scalars: the numbers.
        step: optimizer steps done.
    """
    if writer is None:
        return
    for name, value in scalars.items():
        writer.add_scalar(name, value, step)


def write_histograms(writer: Any, columns: Mapping[str, ArrayLike], step: int) -> None:
    """Write the distributions of named columns; numbers that are not finite are left out.

    Args:
        writer: a SummaryWriter, or None.
        columns: values by name.
        step: optimizer steps done.
    """
    if writer is None:
        return
    for name, values in columns.items():
        array = np.asarray(values, np.float64)
        array = array[np.isfinite(array)]
        if array.size:
            writer.add_histogram(name, array, step, bins=_BINS)
