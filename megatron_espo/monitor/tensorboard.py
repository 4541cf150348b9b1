"""Writes what a run reports to TensorBoard, through the writer that Megatron opened."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from megatron_espo.console import say
from megatron_espo.monitor.lost_events import remove_lost_events

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

# Megatron writes its curves twice, the second time against samples, under names that end so.
VERSUS_SAMPLES = " vs samples"

# Equal bins between the ends: TensorBoard's own grow by a tenth and show nothing of ratios near 1.
_BINS = 30


def begin_events(writer: Any, step: int, samples: int | None = None) -> None:
    """Make ready for the events of a run, or of its continuation after a checkpoint.

    A run that was killed may have written events after its last checkpoint, or without ever
    reaching one, and will write them again. They are taken out of their files; where a TensorBoard
    has read them already, a mark tells it to drop them.

    Args:
        writer: a SummaryWriter, or None.
        step: optimizer steps done.
        samples: samples that these steps have taken, where the run has curves against them
            (``TAG vs samples``), too. Then there is no mark: it would drop those.
    """
    if writer is None:
        return
    # What belongs to step 0, the evaluation before training, is done again after a start.
    first, first_sample = (done + 1 if done else 0 for done in (step, samples or 0))

    def is_lost(tag: str, at: int) -> bool:
        by_samples = samples is not None and tag.endswith(VERSUS_SAMPLES)
        return at >= (first_sample if by_samples else first)

    kept = remove_lost_events(writer.log_dir, is_lost)
    if kept:
        say(
            f"TensorBoard: {len(kept)} event files held points after step {step}; the files as "
            f"they were are {kept[0].parent}/*lost*."
        )
    if samples is None:
        mark = Event(session_log=SessionLog(status=SessionLog.START))
        writer.file_writer.add_event(mark, first)


def write_layout(writer: Any, layout: Mapping[str, Mapping[str, Chart]] = LAYOUT) -> None:
    """Write how the charts are grouped; the last one written counts.

    Args:
        writer: a SummaryWriter, or None.
        layout: charts by group.
    """
    if writer is not None:
        writer.add_custom_scalars(layout)


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


def log_histograms(wandb: Any, columns: Mapping[str, ArrayLike], step: int) -> None:
    """Write the distributions of named columns to Weights & Biases, in the same bins.

    Args:
        wandb: the module, with a run that has been started.
        columns: values by name.
        step: optimizer steps done.
    """
    for name, values in columns.items():
        array = np.asarray(values, np.float64)
        array = array[np.isfinite(array)]
        if array.size:
            counts = np.histogram(array, bins=_BINS)
            wandb.log({f"histograms/{name}": wandb.Histogram(np_histogram=counts)}, step=step)
