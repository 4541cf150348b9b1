"""Text that fills in: frames, pieces of text, the terminal, pictures, the command line."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from rich.text import Text

from megatron_espo.data.tokenizer import byte_tokenizer
from megatron_espo.monitor.denoising import (
    END,
    MASK,
    Frame,
    LiveView,
    Piece,
    Recorder,
    pieces_of,
    visible_lines,
)
from megatron_espo.monitor.frames import check_frames_path, save_frames

M, EOS = 256, 257
TOKENIZER = byte_tokenizer()


def recorded(*rows: list[int]) -> list[Frame]:
    recorder = Recorder(1, len(rows[0]), M)
    for row in rows:
        recorder.on_step(torch.tensor([row]))
    return recorder.frames[0]


def test_frames_tell_the_step_that_committed_each_token() -> None:
    frames = recorded([M, 65, M], [66, 65, M], [66, 65, 67])
    assert [frame.steps for frame in frames] == [(0, 0, 0), (0, 1, 0), (2, 1, 0), (2, 1, 3)]
    assert [frame.num_committed for frame in frames] == [0, 1, 2, 3]
    assert frames[2].tokens == (66, 65, M)
    # Of a token that is edited, the last one.
    assert recorded([M, 65], [66, 65], [66, 68])[-1].steps == (2, 3)


def test_pieces_are_masks_text_by_step_and_the_end() -> None:
    frames = recorded([M, 65, M, EOS, M], [66, 65, 67, EOS, 90])
    assert pieces_of(frames[1], TOKENIZER, [EOS]) == [
        Piece(MASK, 0), Piece("A", 1), Piece(MASK, 0), Piece(END, -1), Piece(MASK, 0)
    ]  # fmt: skip
    # What follows the first end is not part of the text, whatever it is.
    assert pieces_of(frames[2], TOKENIZER, [EOS]) == [
        Piece("B", 2), Piece("A", 1), Piece("C", 2), Piece(END, -1), Piece(END, -1)
    ]  # fmt: skip


def test_a_character_committed_byte_by_byte_is_shown_whole() -> None:
    first, second = "é".encode()
    frames = recorded([first, M, 65], [first, second, 65])
    assert [piece.step for piece in pieces_of(frames[1], TOKENIZER, [EOS])] == [1, 0, 1]
    assert pieces_of(frames[2], TOKENIZER, [EOS]) == [Piece("é", 2), Piece("A", 1)]


def test_view_redraws_in_place_and_leaves_nothing_behind() -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=40, height=20, color_system=None)
    with LiveView(console, ["ab"], 3, 2, M, TOKENIZER, [EOS]) as view:
        view.on_step(torch.tensor([[M, 65, M]]))
        drawn = output.getvalue()
        assert f"ab{MASK}A{MASK}" in drawn and "step 1/2 · 1/3 tokens" in drawn
    # The cursor moved up and lines were erased.
    assert "\x1b[1A" in output.getvalue() and "\x1b[2K" in output.getvalue()


@pytest.mark.parametrize(
    ("first", "shown"), [(0, range(5)), (10, range(8, 13)), (19, range(15, 20))]
)
def test_tall_text_is_cut_around_the_first_mask(first: int, shown: range) -> None:
    lines = [Text(f"{i}{MASK if i >= first else ''}") for i in range(20)]
    found = [int(line.plain.rstrip(MASK)) for line in visible_lines(lines, 5)]
    assert found == list(shown)
    assert visible_lines(lines[:3], 5) == lines[:3]


STORY = [
    (0, [Piece(MASK, 0)] * 8),
    (1, [Piece(MASK, 0), Piece("two\nlines", 1), Piece(MASK, 0)]),
    (2, [Piece("x", 2), Piece("two\nlines", 1), Piece(END, -1)]),
]


def test_pictures_of_all_kinds_show_each_step(tmp_path: Path) -> None:
    assert save_frames(tmp_path / "steps", "a prompt", STORY) == 3
    images = [Image.open(path) for path in sorted((tmp_path / "steps").iterdir())]
    assert len({image.size for image in images}) == 1
    pixels = [np.asarray(image).tobytes() for image in images]
    assert len(set(pixels)) == 3
    other = [*STORY[:2], (2, [Piece("y", 2), *STORY[2][1][1:]])]
    save_frames(tmp_path / "other", "a prompt", other)
    assert np.asarray(Image.open(tmp_path / "other/step0002.png")).tobytes() != pixels[2]
    assert save_frames(tmp_path / "new/a.gif", "a prompt", STORY) == 3
    with Image.open(tmp_path / "new/a.gif") as animation:
        assert animation.n_frames == 3 and animation.size == images[0].size
    assert save_frames(tmp_path / "a.png", "a prompt", STORY * 5) == 6
    sheet = Image.open(tmp_path / "a.png")
    assert sheet.width > 2 * images[0].width and sheet.height > 3 * images[0].height


def test_a_long_animation_is_thinned_out_and_keeps_its_ends(tmp_path: Path) -> None:
    story = [(step, [Piece(str(step), step)]) for step in range(400)]
    assert save_frames(tmp_path / "a.gif", "", story) == 150


def test_a_puzzle_of_four_by_four_is_drawn_as_one(tmp_path: Path) -> None:
    def frame(prompt: str, width: int | None) -> Image.Image:
        story = [(1, [Piece(digit, 1) for digit in "1234" * 4])]
        save_frames(tmp_path / f"{prompt}{width}", prompt, story, width)
        return Image.open(tmp_path / f"{prompt}{width}/step0001.png").convert("RGB")

    puzzle, line, alone = frame("1" * 16, 4), frame("1" * 16, None), frame("", 4)
    # The puzzle to the left of its solution, four lines each.
    assert puzzle.height == alone.height > 1.5 * line.height
    assert alone.width < puzzle.width < line.width
    right = puzzle.crop((puzzle.width // 2, 0, puzzle.width, puzzle.height - 30))
    left = puzzle.crop((0, 0, puzzle.width // 2, puzzle.height - 30))
    green = (183, 235, 192)
    assert {colour for _, colour in right.getcolors(10_000)} >= {green}
    assert green not in {colour for _, colour in left.getcolors(10_000)}
    wide, wider = frame("1" * 50, 40), frame("1" * 50, None)
    assert wide.height > wider.height


def test_another_kind_of_picture_is_refused(tmp_path: Path) -> None:
    for good in ("a.gif", "a.PNG", "folder"):
        check_frames_path(tmp_path / good)
    with pytest.raises(ValueError, match=r"--save-frames .*a\.jpg: give a name"):
        check_frames_path(tmp_path / "a.jpg")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written"):
        save_frames(tmp_path / "file", "", STORY)
