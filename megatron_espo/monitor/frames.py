"""Pictures of a completion filling in: an animation, a sheet to print, or a file per step."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from megatron_espo.errors import UserError
from megatron_espo.monitor.denoising import Piece

_WIDTH, _NARROWEST, _MARGIN, _SIZE, _LARGE = 76, 32, 18, 17, 34
_LEAST = 190  # of pixels, for the bar at the bottom and its numbers
_PAPER, _INK, _PALE, _NEW = "#ffffff", "#1b1f24", "#8b949e", "#b7ebc0"
# An animation longer than this is thinned out; nobody watches it otherwise.
_MOST_FRAMES, _SECONDS, _HOLD_MS = 150, 8.0, 2500
_SHEET = 6

Story = Sequence[tuple[int, Sequence[Piece]]]
"""Denoising steps and the completion after each."""


def save_frames(path: Path, prompt: str, story: Story, width: int | None = None) -> int:
    """Draw a completion as it fills in.

    Args:
        path: ``.gif`` for an animation, ``.png`` for a sheet of six moments, a folder name
            otherwise, for a PNG per step.
        prompt: shown above the completion.
        story: the frames.
        width: characters of a line, at least 1; None takes what the text needs, up to 76. Of fewer
            than 32 the letters are large, and the prompt stands to the left: a puzzle of 4 x 4.

    Returns:
        Pictures drawn.

    Raises:
        UserError: the path cannot be written.
    """
    # Equal sizes, so that an animation does not jump.
    layouts = [_lines(pieces, width or _WIDTH) for _, pieces in story]
    rows = max(map(len, layouts))
    widest = max(len(line) for lines in layouts for line in lines)
    columns = min(_WIDTH, max(_NARROWEST, widest, *map(len, prompt.splitlines() or [""])))
    size = _Size(width or columns, rows, width or _WIDTH, (width or _WIDTH) < _NARROWEST)
    try:
        if path.suffix.lower() == ".gif":
            chosen = _spread(story, _MOST_FRAMES)
            images = [_draw(prompt, step, story[-1][0], pieces, size) for step, pieces in chosen]
            pause = int(min(max(1000 * _SECONDS / len(images), 40), 300))
            path.parent.mkdir(parents=True, exist_ok=True)
            images[0].save(
                path,
                save_all=True,
                append_images=images[1:],
                duration=[pause] * (len(images) - 1) + [_HOLD_MS],
                loop=0,
            )
            return len(images)
        if path.suffix.lower() == ".png":
            chosen = _spread(story, _SHEET)
            images = [_draw(prompt, step, story[-1][0], pieces, size) for step, pieces in chosen]
            path.parent.mkdir(parents=True, exist_ok=True)
            _sheet(images).save(path)
            return len(images)
        path.mkdir(parents=True, exist_ok=True)
        for step, pieces in story:
            image = _draw(prompt, step, story[-1][0], pieces, size)
            image.save(path / f"step{step:04d}.png")
        return len(story)
    except OSError as error:
        raise UserError(f"--save-frames {path}: cannot be written ({error.strerror}).") from error


def check_frames_path(path: Path) -> None:
    """Refuse a name whose kind of picture is not known.

    Raises:
        UserError: the name ends like another kind of file.
    """
    if path.suffix.lower() not in ("", ".gif", ".png"):
        raise UserError(
            f"--save-frames {path}: give a name that ends in .gif (animation) or .png (sheet), or "
            "a folder (a picture per step)."
        )


def _spread(story: Story, most: int) -> Story:
    """Take at most so many frames at equal distances, the first and the last among them."""
    if len(story) <= most:
        return story
    return [story[round(i * (len(story) - 1) / (most - 1))] for i in range(most)]


def _cells(text: str) -> list[str]:
    """Cut text into what takes one place: control characters become visible or go."""
    return ["\n" if c == "\n" else "    " if c == "\t" else c for c in text if c != "\r"]


def _lines(pieces: Sequence[Piece], width: int) -> list[list[tuple[str, int]]]:
    """Break a completion into lines of characters with their steps."""
    lines: list[list[tuple[str, int]]] = [[]]
    for piece in pieces:
        for character in _cells(piece.text):
            if character == "\n" or len(lines[-1]) >= width:
                lines.append([])
            if character != "\n":
                lines[-1].append((character, piece.step))
    return lines


class _Size(NamedTuple):
    """What the frames of a story have in common.

    Attributes:
        columns: of text that are drawn.
        rows: of text.
        width: characters after which a line breaks.
        is_small: whether letters are large and the prompt stands beside the completion.
    """

    columns: int
    rows: int
    width: int
    is_small: bool


def _draw(prompt: str, step: int, last: int, pieces: Sequence[Piece], cells: _Size) -> Image.Image:
    """Draw one frame: prompt, completion, progress."""
    font = _font(_LARGE if cells.is_small else _SIZE)
    wide, high = font.getlength("M"), int(font.size * 1.4)
    above = [line for part in prompt.splitlines() for line in _wrapped(part, cells.width)][-8:]
    left, top = float(_MARGIN), _MARGIN
    rows, columns = cells.rows + len(above), cells.columns
    if cells.is_small and above:  # beside each other
        left += (columns + 1) * wide
        rows, columns = max(cells.rows, len(above)), 2 * columns + 1
    elif above:
        top += high * len(above) + 10
    size = (
        max(int(2 * _MARGIN + columns * wide), _LEAST),
        2 * _MARGIN + high * rows + 36,
    )
    image = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(image)
    for number, given in enumerate(above):
        draw.text((_MARGIN, _MARGIN + number * high), given, font=font, fill=_PALE)
    for row, line in enumerate(_lines(pieces, cells.width)):
        y = top + row * high
        for place, (character, born) in enumerate(line):
            x = left + place * wide
            box = (x, y + 2, x + wide - 1, y + high - 3)
            if born == 0:
                draw.rectangle((box[0] + 1, box[1] + 3, box[2] - 1, box[3] - 3), fill="#d0d7de")
            elif born == step > 0:
                draw.rectangle(box, fill=_NEW)
            if born != 0:
                draw.text((x, y), character, font=font, fill=_PALE if born < 0 else _INK)
    _progress(draw, size, step, last)
    return image


def _progress(draw: ImageDraw.ImageDraw, size: tuple[int, int], step: int, last: int) -> None:
    """Draw the bar at the bottom."""
    left, right, y = _MARGIN, size[0] - _MARGIN - 90, size[1] - 22
    draw.rectangle((left, y, right, y + 5), fill="#eaeef2")
    if step:
        draw.rectangle(
            (left, y, left + (right - left) * step / max(last, 1), y + 5), fill="#2da44e"
        )
    small = _font(13)
    draw.text((right + 12, y - 6), f"{step}/{last}", font=small, fill=_PALE)


def _sheet(images: Sequence[Image.Image]) -> Image.Image:
    """Put pictures side by side in two columns."""
    columns = min(2, len(images))
    wide, high = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * wide + columns + 1, rows * high + rows + 1), "#d0d7de")
    for place, image in enumerate(images):
        row, column = divmod(place, columns)
        sheet.paste(image, (1 + column * (wide + 1), 1 + row * (high + 1)))
    return sheet


def _wrapped(line: str, width: int) -> list[str]:
    return [line[i : i + width] for i in range(0, max(len(line), 1), width)]


def _font(size: int = _SIZE) -> ImageFont.FreeTypeFont:
    """Load the fixed-width font that comes with matplotlib."""
    folder = Path(matplotlib.get_data_path(), "fonts/ttf")
    return ImageFont.truetype(str(folder / "DejaVuSansMono.ttf"), size)
