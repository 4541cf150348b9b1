"""Draws a run's TensorBoard scalars into a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_espo.errors import UserError

Curve = tuple[list[int], list[float]]

TIME_DEPENDENT = ("time/", "performance/", "hardware/")
"""Groups of scalars that differ between two runs of the same thing."""

# Title, unit, and the scalars drawn in it with their labels.
PANELS: tuple[tuple[str, str, dict[str, str]], ...] = (
    (
        "Sampled completions",
        "share (0 to 1)",
        {"reward/mean": "mean reward", "reward/correct": "correct"},
    ),
    (
        "Held-out problems, greedy",
        "share (0 to 1)",
        {"eval/accuracy": "exact accuracy", "eval/reward": "mean reward"},
    ),
    (
        "Importance ratio",
        "ratio",
        {
            "policy/ratio/max": "largest",
            "policy/ratio/mean": "mean",
            "policy/ratio/min": "smallest",
        },
    ),
    ("KL to the reference", "nats per token", {"policy/kl_per_token": "KL"}),
    ("ELBO of sampled completions", "nats per token", {"elbo/per_token/mean": "mean ELBO"}),
    ("Gradient norm", "norm before clipping", {"policy/grad_norm": "norm"}),
    (
        "Completion length",
        "tokens before the end",
        {
            "rollout/completion_length/max": "largest",
            "rollout/completion_length/mean": "mean",
            "rollout/completion_length/min": "smallest",
        },
    ),
    (
        "Tokens per second",
        "completion tokens / s",
        {
            "performance/rollout_tokens_per_second": "sampling",
            "performance/tokens_per_second": "all phases",
        },
    ),
    (
        "Seconds of a rollout",
        "s",
        {
            "time/rollout": "sampling",
            "time/reward": "reward",
            "time/old_elbo": "old ELBO",
            "time/ref_elbo": "reference ELBO",
            "time/update": "updates",
        },
    ),
)
# Within a panel colours tell curves of one run apart; of several runs, lines do.
_LINES = ("-", "--", ":", "-.", (0, (1, 3)))


def find_events(run: Path) -> Path:
    """Find the event files of a run: ``tensorboard/espo`` or ``tensorboard`` in it, or itself."""
    if not run.is_dir():
        raise UserError(f"{run}: no such folder; pass a run's folder.")
    for folder in (run / "tensorboard" / "espo", run / "tensorboard"):
        if folder.is_dir():
            return folder
    return run


def run_names(folders: Sequence[Path]) -> list[str]:
    """Name runs by their folders, with as much of the path as tells them apart."""
    for parts in range(1, max(len(folder.resolve().parts) for folder in folders) + 1):
        names = ["/".join(folder.resolve().parts[-parts:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"{folders[0]}: is given twice; give different runs.")


def read_scalars(folder: Path) -> dict[str, Curve]:
    """Read all scalars of a TensorBoard folder.

    Args:
        folder: holds event files.

    Returns:
        Steps and values by name.

    Raises:
        UserError: if there is nothing to draw.
    """
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    names = events.Tags()["scalars"]
    if not names:
        raise UserError(f"{folder}: no TensorBoard scalars there; pass a run's folder.")
    curves = {}
    for name in names:
        points = events.Scalars(name)
        curves[name] = ([point.step for point in points], [point.value for point in points])
    return curves


def read_details(folder: Path) -> dict[str, list[tuple[int, bytes]]]:
    """Read all histograms and texts of a TensorBoard folder, as its server shows them.

    Args:
        folder: holds event files.

    Returns:
        Steps and serialized contents by tag, to be compared.
    """
    events = plugin_event_accumulator.EventAccumulator(str(folder), size_guidance={"tensors": 0})
    events.Reload()
    plugins = {
        tag: events.SummaryMetadata(tag).plugin_data.plugin_name
        for tag in events.Tags().get("tensors", [])
    }
    return {
        tag: [(e.step, e.tensor_proto.SerializeToString()) for e in events.Tensors(tag)]
        for tag, plugin in plugins.items()
        if plugin in ("histograms", "text")
    }


def draw_runs(runs: Mapping[str, Mapping[str, Curve]], title: str, path: Path) -> None:
    """Draw the curves that a person looks at first, of one run or of several to compare.

    Args:
        runs: scalars of ESPO runs by the name to show.
        title: heading.
        path: PNG to write.
    """
    figure, axes = plt.subplots(3, 3, figsize=(13, 9.5), constrained_layout=True)
    several = len(runs) > 1
    for axis, (heading, unit, labels) in zip(axes.flat, PANELS, strict=True):
        drawn = 0
        for colour, (run, curves) in enumerate(runs.items()):
            for place, (name, label) in enumerate(labels.items()):
                if name not in curves:
                    continue
                steps, values = curves[name]
                axis.plot(
                    steps,
                    values,
                    label=f"{run}: {label}" if several else label,
                    color=f"C{colour % 10}" if several else None,
                    linestyle=_LINES[place] if several else "-",
                    linewidth=1.6,
                    marker="o" if len(steps) < 12 else None,
                    markersize=4,
                )
                drawn += 1
        axis.set_title(heading, fontsize=11)
        axis.set_xlabel("optimizer step")
        axis.set_ylabel(unit)
        axis.grid(alpha=0.3)
        if drawn > 1 and not several:
            axis.legend(fontsize=8, framealpha=0.6)
        if not drawn:
            axis.text(0.5, 0.5, "not recorded", transform=axis.transAxes, ha="center", color="gray")
    if several:
        _legends(figure, axes, list(runs))
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _legends(figure: Figure, axes: NDArray[Any], runs: list[str]) -> None:
    """Say once which colour is which run, and in each panel which line is which curve."""
    for axis, (_, _, labels) in zip(axes.flat, PANELS, strict=True):
        if len(labels) > 1:
            lines = [Line2D([], [], color="gray", linestyle=style) for style in _LINES]
            axis.legend(lines[: len(labels)], labels.values(), fontsize=8, framealpha=0.6)
    colours = [Line2D([], [], color=f"C{place % 10}", linewidth=3) for place in range(len(runs))]
    figure.legend(colours, runs, loc="outside lower center", ncols=min(len(runs), 4))
