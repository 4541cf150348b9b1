"""Reads a run's TensorBoard events."""

from collections.abc import Sequence
from pathlib import Path

from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_espo.errors import UserError

Curve = tuple[list[int], list[float]]

TIME_DEPENDENT = ("time/", "performance/", "hardware/")
"""Groups of scalars that differ between two runs of the same thing."""


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
