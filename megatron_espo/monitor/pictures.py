"""Draws runs' scalars into pictures."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from megatron_espo.monitor.curves import Curve
from megatron_espo.tasks.checking import RESERVED_METRICS


class Panel(NamedTuple):
    """What is drawn into one set of axes.

    Attributes:
        heading: of the panel.
        unit: of its vertical axis.
        labels: what is drawn, by the scalar's name.
    """

    heading: str
    unit: str
    labels: Mapping[str, str]


PANELS = (
    Panel(
        "Sampled completions",
        "share",
        {"reward/mean": "mean reward", "reward/correct": "exact"},
    ),
    Panel(
        "Held-out problems, greedy",
        "share",
        {"eval/reward": "mean reward", "eval/accuracy": "exact"},
    ),
    Panel(
        "Importance ratio",
        "ratio",
        {
            "policy/ratio/max": "largest",
            "policy/ratio/mean": "mean",
            "policy/ratio/min": "smallest",
        },
    ),
    Panel("KL to the reference", "nats per token", {"policy/kl_per_token": "KL"}),
    Panel("ELBO of sampled completions", "nats per token", {"elbo/per_token/mean": "mean ELBO"}),
    Panel("Gradient norm", "norm before clipping", {"policy/grad_norm": "norm"}),
    Panel(
        "Completion length",
        "tokens before the end",
        {
            "rollout/completion_length/max": "largest",
            "rollout/completion_length/mean": "mean",
            "rollout/completion_length/min": "smallest",
        },
    ),
    Panel(
        "Tokens per second",
        "completion tokens / s",
        {
            "performance/rollout_tokens_per_second": "sampling",
            "performance/tokens_per_second": "all phases",
        },
    ),
    Panel(
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
# A quantity has one colour, wherever it is drawn.
_COLOURS = {
    "reward/mean": "C0", "eval/reward": "C0", "time/reward": "C0",
    "reward/correct": "C1", "eval/accuracy": "C1",
    "policy/ratio": "C4", "policy/kl_per_token": "C3",
    "elbo/per_token/mean": "C2", "time/old_elbo": "C2", "time/ref_elbo": "C3",
    "policy/grad_norm": "C5", "time/update": "C5",
    "rollout/completion_length": "C6",
    "time/rollout": "C9", "performance/rollout_tokens_per_second": "C9",
    "performance/tokens_per_second": "C7",
}  # fmt: skip
# Within a panel lines tell curves of one run apart where several runs have the colours.
_LINES = ("-", "--", ":", "-.", (0, (1, 3)))
# Points beyond the middle ones by this many times their spread leave the panel.
_FAR, _MIDDLE, _FEWEST = 1.0, (3.0, 97.0), 20


def panels_of(runs: Mapping[str, Mapping[str, Curve]]) -> list[Panel]:
    """List the panels of a picture: those of every run, and the task's own metrics if it has any.

    Args:
        runs: scalars of ESPO runs by name.

    Returns:
        :data:`PANELS`, and one for ``reward/NAME`` of what ``score`` returns as metrics.
    """
    names = sorted({name for curves in runs.values() for name in curves})
    own = {
        name: name.removeprefix("reward/")
        for name in names
        if name.startswith("reward/") and name.split("/")[1] not in RESERVED_METRICS
    }
    return [*PANELS, *([Panel("Metrics of the task", "mean", own)] if own else [])]


def draw_runs(runs: Mapping[str, Mapping[str, Curve]], title: str, path: Path) -> None:
    """Draw the curves that a person looks at first, of one run or of several to compare.

    A point far beyond the others leaves its panel and is marked at the edge, so that one spike
    does not flatten the rest.

    Args:
        runs: scalars of ESPO runs by the name to show.
        title: heading.
        path: PNG to write.
    """
    panels = panels_of(runs)
    rows = -(-len(panels) // 3)
    figure, axes = plt.subplots(rows, 3, figsize=(10.6, 2.8 * rows + 0.5), layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    several = len(runs) > 1
    for axis, panel in zip(axes.flat, panels, strict=False):
        drawn = []
        for number, (run, curves) in enumerate(runs.items()):
            for place, (name, label) in enumerate(panel.labels.items()):
                if name not in curves:
                    continue
                style = _style(name, place)
                if several:
                    style = {"color": f"C{number % 10}", "linestyle": _LINES[place % len(_LINES)]}
                steps, values = curves[name]
                few = {"marker": "o", "markersize": 4} if len(steps) < 12 else {}
                text = f"{run}: {label}" if several else label
                axis.plot(steps, values, label=text, linewidth=1.5, **style, **few)
                drawn.append((steps, values, style["color"]))
        _dress(axis, panel, drawn)
        if (len(drawn) > 1 or (drawn and panel not in PANELS)) and not several:
            axis.legend(fontsize=8, framealpha=0.6)
    if several:
        _legends(figure, axes, panels, list(runs))
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _style(name: str, place: int) -> dict[str, Any]:
    """Choose a quantity's colour; largest and smallest are thin lines of the mean's colour."""
    known = _COLOURS.get(name, _COLOURS.get(name.rpartition("/")[0], f"C{place % 10}"))
    is_edge = name.endswith(("/max", "/min"))
    return {"color": known, "linestyle": "-", "alpha": 0.45 if is_edge else 1.0}


def _dress(axis: Axes, panel: Panel, drawn: Sequence[tuple[list[int], list[float], str]]) -> None:
    """Write heading, ticks and limits of a panel, and mark what lies beyond them."""
    axis.set_title(panel.heading, fontsize=10.5)
    axis.set_xlabel("optimizer step", fontsize=9)
    axis.set_ylabel(panel.unit, fontsize=9)
    axis.tick_params(labelsize=9)
    axis.grid(alpha=0.3)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(5))
    axis.ticklabel_format(useOffset=False)
    if not drawn:
        axis.text(0.5, 0.5, "not recorded", transform=axis.transAxes, ha="center", color="gray")
        return
    low, high = limits([values for _, values, _ in drawn])
    if panel.unit == "share":
        low, high = 0.0, 1.0
    elif panel.unit.startswith("tokens"):
        low, high = math.floor(low) - 1.0, math.ceil(high) + 1.0
        axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.set_ylim(low, high)
    for steps, values, colour in drawn:
        for edge, beyond, marker in (
            (high, [s for s, v in zip(steps, values, strict=True) if v > high], "^"),
            (low, [s for s, v in zip(steps, values, strict=True) if v < low], "v"),
        ):
            axis.plot(beyond, [edge] * len(beyond), marker, color=colour, markersize=7)


def limits(curves: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Choose the vertical limits of a panel.

    Args:
        curves: values of each curve drawn in it; what is not finite does not count.

    Returns:
        Lowest and highest value to show. A constant has room above and below it; of a curve with
        twenty points or more, a point that lies farther from the middle 94% than these are wide is
        left out.
    """
    kept = []
    for values in curves:
        finite = np.asarray([value for value in values if math.isfinite(value)])
        if len(finite) >= _FEWEST:
            first, last = np.percentile(finite, _MIDDLE)
            room = _FAR * (last - first)
            if room > 0.0:
                finite = finite[(finite >= first - room) & (finite <= last + room)]
        kept.append(finite)
    shown = np.concatenate(kept)
    if not len(shown):
        return 0.0, 1.0
    low, high = float(shown.min()), float(shown.max())
    # A curve that hardly moves must not look as if it did.
    room = max(0.06 * (high - low), 0.02 * max(abs(low), abs(high))) or 1.0
    return low - room, high + room


def _legends(
    figure: Figure, axes: NDArray[Any], panels: Sequence[Panel], runs: Sequence[str]
) -> None:
    """Say once which colour is which run, and in each panel which line is which curve."""
    for axis, panel in zip(axes.flat, panels, strict=False):
        if len(panel.labels) > 1:
            lines = [
                Line2D([], [], color="gray", linestyle=_LINES[place % len(_LINES)])
                for place in range(len(panel.labels))
            ]
            axis.legend(lines, panel.labels.values(), fontsize=8, framealpha=0.6)
    colours = [Line2D([], [], color=f"C{place % 10}", linewidth=3) for place in range(len(runs))]
    figure.legend(colours, runs, loc="outside lower center", ncols=min(len(runs), 4))


def draw_demo(
    tests: Mapping[str, Mapping[str, float]], runs: Mapping[str, Mapping[str, Curve]], path: Path
) -> None:
    """Draw what a demo is about: held-out accuracy before, after and of the control, and its way.

    Args:
        tests: for each run, the share of test problems that are solved by what was tested
            ("before", "after ESPO", "control"), 0 to 1.
        runs: for each run, the scalars of its training.
        path: PNG to write.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 3.1), layout="constrained")
    bars = {"before": "0.7", "control": "C4", "after ESPO": "C1"}
    width = 0.8 / len(bars)
    for number, (name, colour) in enumerate(bars.items()):
        heights = [100 * found.get(name, 0.0) for found in tests.values()]
        places = [run + (number - 1) * width for run in range(len(tests))]
        drawn = left.bar(places, heights, width, color=colour, label=name)
        left.bar_label(drawn, fmt="%.0f", fontsize=9)
    left.set_xticks(range(len(tests)), tests)
    left.set_title("Held-out test puzzles solved", fontsize=10.5)
    for number, (run, curves) in enumerate(runs.items()):
        steps, values = curves["eval/accuracy"]
        right.plot(
            steps, [100 * value for value in values], label=run, color="C1", marker="o",
            markersize=4, linestyle=_LINES[number % len(_LINES)],
        )  # fmt: skip
    right.set_title("Validation puzzles solved, during ESPO", fontsize=10.5)
    right.set_xlabel("optimizer step", fontsize=9)
    for axis in (left, right):
        axis.set_ylabel("% exact, greedy", fontsize=9)
        axis.tick_params(labelsize=9)
        axis.grid(alpha=0.3, axis="y")
        axis.set_axisbelow(True)
        axis.legend(fontsize=8.5, framealpha=0.6)
        axis.yaxis.set_major_locator(MaxNLocator(6))
    top = max([100 * value for found in tests.values() for value in found.values()], default=1.0)
    left.set_ylim(0, 1.3 * top)
    right.set_ylim(bottom=0)
    figure.savefig(path, dpi=110)
    plt.close(figure)
