"""Draws a run's TensorBoard scalars into a picture."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

Curve = tuple[list[int], list[float]]

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
)


def read_scalars(folder: Path) -> dict[str, Curve]:
    """Read all scalars of a TensorBoard folder.

    Args:
        folder: holds event files.

    Returns:
        Steps and values by name.

    Raises:
        ValueError: if there is nothing to draw.
    """
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    names = events.Tags()["scalars"]
    if not names:
        raise ValueError(f"{folder}: no TensorBoard scalars there; pass a run's folder.")
    curves = {}
    for name in names:
        points = events.Scalars(name)
        curves[name] = ([point.step for point in points], [point.value for point in points])
    return curves


def draw_run(curves: dict[str, Curve], title: str, path: Path) -> None:
    """Draw the curves that a person looks at first.

    Args:
        curves: scalars of an ESPO run.
        title: heading.
        path: PNG to write.
    """
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), constrained_layout=True)
    for axis, (heading, unit, labels) in zip(axes.flat, PANELS, strict=True):
        drawn = [name for name in labels if name in curves]
        for name in drawn:
            steps, values = curves[name]
            marker = "o" if len(steps) < 12 else None
            axis.plot(steps, values, label=labels[name], linewidth=1.6, marker=marker)
        axis.set_title(heading, fontsize=11)
        axis.set_xlabel("optimizer step")
        axis.set_ylabel(unit)
        axis.grid(alpha=0.3)
        if len(drawn) > 1:
            axis.legend(fontsize=8, framealpha=0.6)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)
