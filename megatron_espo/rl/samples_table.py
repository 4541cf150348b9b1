"""A few completions of a rollout as a table for TensorBoard."""

import re
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
    """Write text as a cell that Markdown shows as it is, its lines and indentation included.

    A code span would not do: readers of tables disagree about the bars and backslashes in it.
    """
    if not text:
        return "*(empty)*"
    lines = text.expandtabs(4).split("\n")
    return "<br>".join("".join(map(_inert, _SPACES.sub(_unbreakable, line))) for line in lines)


# HTML shows none of them at the ends of a line, and one of several in a row.
_SPACES = re.compile(r"^ +| +$| {2,}")


def _unbreakable(spaces: re.Match[str]) -> str:
    return "\xa0" * len(spaces[0])


def _inert(character: str) -> str:
    """Write a character so that it means nothing to Markdown and HTML."""
    if character in " \xa0" or character.isalnum():
        return character
    if not character.isprintable():
        return "\ufffd"
    return f"&#{ord(character)};" if character.isascii() else character
