"""Per-completion numbers, brought together from the data-parallel ranks."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from megatron_espo.parallel.layout import Layout

Columns = dict[str, NDArray[np.float64]]


def gather_columns(columns: Mapping[str, Sequence[Any]], layout: Layout) -> Columns:
    """Join each named column over the data-parallel ranks, in rank order.

    Args:
        columns: one number, or list of numbers, per completion of this rank; ranks may lack columns
            that others have.
        layout: process groups.

    Returns:
        float64 arrays, the same on every rank; statistics of them do not depend on how the
        completions are split.
    """
    parts: list[Mapping[str, Sequence[Any]] | None] = [columns]
    if layout.dp_size > 1:
        parts = [None] * layout.dp_size
        dist.all_gather_object(parts, dict(columns), group=layout.dp)
    names = sorted({name for part in parts if part for name in part})
    return {
        name: np.concatenate(
            [np.asarray(part[name], np.float64) for part in parts if part and name in part]
        )
        for name in names
    }


def statistics(columns: Columns, name: str, label: str | None = None) -> dict[str, float]:
    """Summarise a column as mean, minimum and maximum.

    Args:
        columns: gathered columns.
        name: which one.
        label: what to call it; its name if None.

    Returns:
        ``{label/mean, label/min, label/max}``.
    """
    values = columns[name]
    label = label or name
    return {
        f"{label}/mean": float(values.mean()),
        f"{label}/min": float(values.min()),
        f"{label}/max": float(values.max()),
    }
