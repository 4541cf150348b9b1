"""Shows a completion as it fills in: in place on a terminal, or step by step in pictures."""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text
from torch import Tensor

from megatron_espo.data.tokenizer import FastTokenizer

MASK = "░"
END = "·"
# What a byte-level token shows as long as the rest of its character is missing.
_BROKEN = "�"


class Piece(NamedTuple):
    """A stretch of a completion that was committed in one step.

    Attributes:
        text: what to show.
        step: the denoising step from 1; 0 where it is still masked, -1 after the end of sequence.
    """

    text: str
    step: int


@dataclass(frozen=True)
class Frame:
    """A completion after a denoising step.

    Attributes:
        step: the step, from 0 (all masked).
        tokens: ids, the mask token where nothing is committed yet.
        steps: for each token the step that put it there, 0 where it is masked.
    """

    step: int
    tokens: tuple[int, ...]
    steps: tuple[int, ...]

    @property
    def num_committed(self) -> int:
        """Tokens that are decided."""
        return sum(step > 0 for step in self.steps)


class Recorder:
    """Keeps the frames of some completions; its ``on_step`` is a hook for the sampler."""

    def __init__(self, count: int, length: int, mask_token_id: int) -> None:
        """Begin with everything masked.

        Args:
            count: completions.
            length: tokens of each.
            mask_token_id: stands where nothing is committed.
        """
        self._mask = mask_token_id
        blank = Frame(0, (mask_token_id,) * length, (0,) * length)
        self.frames: list[list[Frame]] = [[blank] for _ in range(count)]

    def on_step(self, tokens: Tensor) -> None:
        """Take what a step committed.

        Args:
            tokens: int64 ``[n, l]``, the mask token where nothing is committed yet.
        """
        for frames, row in zip(self.frames, tokens.tolist(), strict=True):
            last = frames[-1]
            step = last.step + 1
            steps = tuple(
                0 if token == self._mask else before if token == stood else step
                for token, stood, before in zip(row, last.tokens, last.steps, strict=True)
            )
            frames.append(Frame(step, tuple(row), steps))


def pieces_of(
    frame: Frame, tokenizer: FastTokenizer, stop_token_ids: Collection[int]
) -> list[Piece]:
    """Turn a frame into text, masks and ends included.

    Args:
        frame: a completion in the making.
        tokenizer: writes ids that belong together as one piece.
        stop_token_ids: tokens that end a text.

    Returns:
        Its stretches from left to right. A character whose bytes were committed in different
        steps belongs to the last of them.
    """
    pieces: list[Piece] = []
    ids: list[int] = []
    current = 0

    def flush() -> None:
        nonlocal ids
        if ids:
            pieces.append(Piece(str(tokenizer.decode(ids)), current))
        ids = []

    ended = False
    for token, step in zip(frame.tokens, frame.steps, strict=True):
        ended = ended or (step > 0 and token in stop_token_ids)
        if step == 0:
            flush()
            pieces.append(Piece(MASK, 0))
        elif ended:
            flush()
            pieces.append(Piece(END, -1))
        else:
            if ids and step != current and not tokenizer.decode(ids).endswith(_BROKEN):
                flush()
            current = max(current, step) if ids else step
            ids.append(token)
    flush()
    return pieces


def terminal_text(prompt: str, pieces: Sequence[Piece], step: int) -> Text:
    """Lay out a prompt and its completion for a terminal; what is new stands out.

    Args:
        prompt: what came before.
        pieces: the completion.
        step: the step whose tokens are new.
    """
    text = Text(prompt, style="dim")
    for piece in pieces:
        style = {0: "dim", -1: "dim"}.get(piece.step, "bold")
        text.append(piece.text, "bold black on green" if piece.step == step > 0 else style)
    return text


class LiveView:
    """Redraws completions in place; its ``on_step`` is a hook for the sampler.

    Of text that is taller than the terminal, what surrounds the first masked token is shown.
    """

    def __init__(
        self,
        console: Console,
        prompts: Sequence[str],
        length: int,
        steps: int,
        mask_token_id: int,
        tokenizer: FastTokenizer,
        stop_token_ids: Collection[int],
        delay: float = 0.0,
    ) -> None:
        """Prepare; nothing is drawn before the context is entered.

        Args:
            console: the terminal.
            prompts: shown before the completions.
            length: tokens of a completion.
            steps: denoising steps, for the line of progress.
            mask_token_id: stands where nothing is committed.
            tokenizer: writes ids that belong together as one piece.
            stop_token_ids: tokens that end a text.
            delay: seconds to wait after each step, so that eyes can follow a small model.
        """
        self.recorder = Recorder(len(prompts), length, mask_token_id)
        self._console, self._prompts, self._delay = console, prompts, delay
        self._steps, self._tokenizer, self._stops = steps, tokenizer, stop_token_ids
        self._started = time.monotonic()
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> "LiveView":
        self._live.__enter__()
        self._draw()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.__exit__(None, None, None)

    def on_step(self, tokens: Tensor) -> None:
        """Redraw after a step."""
        self.recorder.on_step(tokens)
        self._draw()
        time.sleep(self._delay)

    def _draw(self) -> None:
        frames = [row[-1] for row in self.recorder.frames]
        lines: list[Text] = []
        for prompt, frame in zip(self._prompts, frames, strict=True):
            pieces = pieces_of(frame, self._tokenizer, self._stops)
            text = terminal_text(prompt, pieces, frame.step)
            lines += text.wrap(self._console, self._console.width)
        committed = sum(frame.num_committed for frame in frames)
        total = sum(len(frame.tokens) for frame in frames)
        status = (
            f"step {frames[0].step}/{self._steps} · {committed}/{total} tokens · "
            f"{time.monotonic() - self._started:.1f} s"
        )
        shown = visible_lines(lines, self._console.height - 3)
        self._live.update(Group(*shown, Text(status, style="dim")), refresh=True)


def visible_lines(lines: Sequence[Text], room: int) -> list[Text]:
    """Choose the lines that fit: those around the first mask.

    Args:
        lines: everything.
        room: lines that fit.
    """
    room = max(room, 1)
    if len(lines) <= room:
        return list(lines)
    first = next((i for i, line in enumerate(lines) if MASK in line.plain), len(lines))
    start = min(max(first - room // 2, 0), len(lines) - room)
    return list(lines[start : start + room])
