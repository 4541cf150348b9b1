"""Writes what a run reports to TensorBoard, through the writer that Megatron opened."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_espo.rl.types import Rollout


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
