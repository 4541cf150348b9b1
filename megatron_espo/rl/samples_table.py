"""A few completions of a rollout as a table for TensorBoard."""

from collections.abc import Sequence
from typing import Any

from megatron_espo.rl.types import Rollout


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
        f"| {rollout.rewards[i]:.3f} | {'yes' if rollout.scores[i].correct else 'no'} | "
        f"{rollout.advantages[i]:+.3f} | {rollout.completion_lengths[i]} | "
        f"{_cell(prompts[i])} | {_cell(rollout.texts[i])} |"
        for i in dict.fromkeys(chosen)
    ]
    header = ["| reward | correct | advantage | tokens | prompt | completion |", "|---" * 6 + "|"]
    writer.add_text("samples", "\n".join([*header, *rows]), step)


def _cell(text: str) -> str:
    escaped = text.replace("|", "\\|").replace("\n", "⏎")
    return f"`{escaped}`" if escaped else "*(empty)*"
