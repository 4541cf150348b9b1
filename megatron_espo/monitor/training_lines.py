"""Which of the lines that Megatron prints a person follows, and how the console shows them."""

import re

from megatron_espo.console import own_lines
from megatron_espo.monitor.progress import format_duration

# Megatron puts the time of day before what it says, or after it.
_TIME = re.compile(r"^\s*\[[^\]]*\]\s*")
_END = re.compile(r"\[(exiting program .*?)\.?\] datetime")
_ITERATION = re.compile(r"iteration +(\d+)/ *(\d+) *\|")
_FOLLOWED = re.compile(
    r"successfully (?:loaded|saved|deleted) |validation .*loss at |skipping training|"
    r"WARNING:megatron_espo"
)
_LAYOUT = re.compile(r" *\[ t \d+/\d+,[^\]]*\]")
# Fields that say nothing as long as they have these values.
_SILENT = {
    "loss scale": "1.0",
    "number of skipped iterations": "0",
    "number of nan iterations": "0",
}
_LEFT_OUT = ("consumed samples", "global batch size")


def training_line(line: str, epoch: int | None = None, epochs: float = 0.0) -> str | None:
    """Shorten a line for the console.

    Args:
        line: as Megatron prints it.
        epoch: examples of an epoch; None leaves out how many of them are done.
        epochs: epochs of the run, or 0 where its steps are what is given.

    Returns:
        What the console shows, or None.
    """
    end = _END.match(line)
    if end is not None:
        return end[1]
    text = _TIME.sub("", line).strip()
    step = _ITERATION.match(text)
    if step is not None:
        return _short_step(text, int(step[1]), int(step[2]), epoch, epochs)
    if text.endswith("will start from random"):
        return "No checkpoint to go on from: what is trained begins anew."
    if _FOLLOWED.match(text):
        return _LAYOUT.sub("", re.sub(r" {2,}", " ", text)).rstrip(" |")
    return own_lines(line)


def _short_step(text: str, done: int, total: int, epoch: int | None, epochs: float) -> str:
    """Keep of an iteration's line what changes, and add the time left."""
    fields = dict[str, str]()
    for part in text.split("|")[1:]:
        name, colon, value = part.rpartition(":")
        if colon:
            fields[name.strip()] = value.strip()
    milliseconds = fields.pop("elapsed time per iteration (ms)", None)
    shown = [f"iteration {done}/{total}"]
    if epoch is not None and fields.get("consumed samples", "").isdigit():
        of_all = f"/{epochs:g}" if epochs else ""
        shown.append(f"epoch {int(fields['consumed samples']) / epoch:.2f}{of_all}")
    shown += [
        f"{name}: {value}"
        for name, value in fields.items()
        if name not in _LEFT_OUT and _SILENT.get(name) != value
    ]
    if milliseconds is not None:
        shown.append(f"{milliseconds} ms")
        left = format_duration(float(milliseconds) / 1000 * max(total - done, 0))
        shown.append(f"left {left}")
    return " | ".join(shown)
