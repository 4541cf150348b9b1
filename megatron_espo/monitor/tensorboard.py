"""Writes what a run reports to TensorBoard, through the writer that Megatron opened."""

from collections.abc import Mapping, Sequence
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from megatron_espo.rl.types import Rollout


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


def write_samples(
    writer: Any, rollout: Rollout, prompts: Sequence[str], step: int, count: int
) -> None:
    """Write a few completions as a table.

    Args:
        writer: a SummaryWriter, or None.
        rollout: scored completions of this rank.
        prompts: the prompt of each completion as text.
        step: optimizer steps done.
        count: most completions to write; the best and the worst.
    """
    if writer is None or count == 0:
        return
    order = rollout.rewards[: len(prompts)].argsort(descending=True, stable=True).tolist()
    chosen = order[: (count + 1) // 2] + order[len(order) - count // 2 :]
    rows = [
        f"| {rollout.rewards[i]:.3f} | {rollout.advantages[i]:+.3f} | "
        f"{_cell(prompts[i])} | {_cell(rollout.texts[i])} |"
        for i in dict.fromkeys(chosen)
    ]
    table = "\n".join(["| reward | advantage | prompt | completion |", "|---|---|---|---|", *rows])
    writer.add_text("samples", table, step)


def _cell(text: str) -> str:
    escaped = text.replace("|", "\\|").replace("\n", "⏎")
    return f"`{escaped}`" if escaped else "*(empty)*"
