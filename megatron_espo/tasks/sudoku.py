"""4x4 sudoku: fill the blanks of a grid so that rows, columns and 2x2 boxes each hold 1 to 4.

File format: {"puzzle": "3102200002100320", "solution": "3142243142131324"}, row by row, 0 = blank.
The prompt explains the rules in a chat, and the answer stands between <answer> tags (d1, ESPO). A
record with "style": "bare" is for a model too small to talk: the prompt is the puzzle's 16
characters and the completion nothing but the 16 digits.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import permutations, product
from os import PathLike
from random import Random
from typing import Any

from megatron_espo.errors import UserError
from megatron_espo.tasks.answers import tagged_span
from megatron_espo.tasks.base import (
    Example,
    Score,
    draw_distinct,
    dressed_answer,
    is_bare,
    read_records,
    tagged_prompt,
)

name = "sudoku"

INSTRUCTION = """Solve a 4x4 sudoku. The puzzle is a string of 16 digits: the cells from left to \
right, row by row, with 0 for an empty cell. Fill the empty cells with digits from 1 to 4 such \
that every row, every column and every 2x2 box holds each digit once.

For example, the puzzle 0412203040211040 stands for the rows

04 12
20 30

40 21
10 40

and its solution is 3412213443211243. Your answer must be the complete string \
of 16 digits, without spaces or separators."""
_BLANK = "0"
_MAX_BLANKS = 12
_ROWS = [tuple(range(start, start + 4)) for start in (0, 4, 8, 12)]
_COLUMNS = [tuple(range(start, 16, 4)) for start in range(4)]
_BOXES = [(start, start + 1, start + 4, start + 5) for start in (0, 2, 8, 10)]


def read(path: str | PathLike[str]) -> list[Example]:
    """Read puzzles with their solutions.

    Args:
        path: JSONL or parquet file with "puzzle" and "solution" in every record.

    Returns:
        One example per line.

    Raises:
        ValueError: A line is malformed, or its solution does not solve its puzzle.
    """
    return read_records(path, {"puzzle": str, "solution": str}, _parse)


def _parse(record: Mapping[str, Any]) -> Example:
    puzzle, solution = record["puzzle"], record["solution"]
    if not re.fullmatch("[0-4]{16}", puzzle):
        raise ValueError("'puzzle' is not 16 digits from 0 (blank) to 4; write it row by row")
    if not re.fullmatch("[1-4]{16}", solution):
        raise ValueError("'solution' is not 16 digits from 1 to 4; write it row by row")
    if _BLANK not in puzzle:
        raise ValueError("'puzzle' has no blank, so nothing to reward; leave a cell 0")
    if not is_grid(solution):
        raise ValueError("'solution' repeats a digit in a row, column or box; correct it")
    if any(given not in (_BLANK, digit) for given, digit in zip(puzzle, solution, strict=True)):
        raise ValueError("'solution' contradicts a given of 'puzzle'; correct one of them")
    if is_bare(record):
        return Example(puzzle, {"puzzle": puzzle, "solution": solution, "style": "bare"})
    prompt = tagged_prompt(INSTRUCTION, f"Puzzle: {puzzle}")
    return Example(prompt, {"puzzle": puzzle, "solution": solution})


def score(example: Example, completion: str) -> Score:
    """Reward the fraction of the blank cells that are right (ESPO, arXiv 2512.03759).

    The answer is what the last answer tags enclose; in the bare style it is the whole completion.
    Of a tagged answer the ASCII digits count and of a bare one all but white space; they fill the
    cells in order. Cells that are missing are wrong, characters after the sixteenth are not looked
    at for the reward, but only the 16 digits of the solution, givens included, are correct. Where a
    puzzle has several solutions, the one in the file counts.

    Args:
        example: A puzzle, from `read`.
        completion: Any text.

    Returns:
        The score, with the metric "givens_kept": the fraction of the givens that were copied.
    """
    puzzle, solution = example.answer["puzzle"], example.answer["solution"]
    text = "".join(completion[place] for place in _cells(example, completion))
    right = [digit == found for digit, found in zip(solution, text.ljust(16)[:16], strict=True)]
    blanks = [hit for given, hit in zip(puzzle, right, strict=True) if given == _BLANK]
    givens = [hit for given, hit in zip(puzzle, right, strict=True) if given != _BLANK]
    return Score(
        reward=sum(blanks) / len(blanks),
        correct=text == solution,
        metrics={"givens_kept": sum(givens) / len(givens) if givens else 1.0},
    )


def _cells(example: Example, completion: str) -> list[int]:
    """Return where in the completion the answer's characters stand, each a cell."""
    if is_bare(example.answer):
        return [place for place, character in enumerate(completion) if not character.isspace()]
    start, stop = tagged_span(completion) or (0, 0)
    return [place for place in range(start, stop) if completion[place] in "0123456789"]


def segments(example: Example, completion: str) -> list[tuple[int, int]]:
    """Return the cells that were blank, in the order of the text; those that are missing are none.

    Args:
        example: A puzzle, from `read`.
        completion: Any text.

    Returns:
        Spans of one character.
    """
    cells = zip(example.answer["puzzle"], _cells(example, completion), strict=False)
    return [(place, place + 1) for given, place in cells if given == _BLANK]


def score_segments(example: Example, completion: str, kept: Sequence[Sequence[int]]) -> list[float]:
    """Reward a completion of which some blank cells are kept and the others left empty.

    Args:
        example: A puzzle, from `read`.
        completion: Any text.
        kept: Numbers of `segments`, for each reward.

    Returns:
        The fractions of the blank cells that are kept and right: a cell adds the same to whatever
        is kept besides it.
    """
    puzzle, solution = example.answer["puzzle"], example.answer["solution"]
    blanks = [digit for given, digit in zip(puzzle, solution, strict=True) if given == _BLANK]
    spans = segments(example, completion)
    right = [completion[start] == blanks[part] for part, (start, _) in enumerate(spans)]
    return [sum(right[part] for part in parts) / len(blanks) for parts in kept]


def generate(
    count: int,
    seed: int,
    split: str,
    *,
    style: str = "bare",
    min_blanks: int = 6,
    max_blanks: int = 10,
) -> list[dict[str, Any]]:
    """Make up distinct puzzles that have exactly one solution.

    The number of blanks is uniform over its range; the grid and the blank cells are drawn until
    the solution is unique. A puzzle's own hash decides its split.

    Args:
        count: Number of puzzles.
        seed: Same seed, same puzzles.
        split: "train", "validation" or "test".
        style: How the problems are put, one of `STYLES`.
        min_blanks: Fewest blank cells.
        max_blanks: Most blank cells, at most 12: fewer than 4 givens never fix the solution.

    Returns:
        Records in the file format.

    Raises:
        ValueError: The range of blanks is empty, the split is unknown or has too few puzzles.
    """
    if not 1 <= min_blanks <= max_blanks <= _MAX_BLANKS:
        raise UserError(
            f"cannot leave {min_blanks} to {max_blanks} cells blank; "
            f"use a range within 1 to {_MAX_BLANKS}"
        )
    rng = Random(f"{name}:{split}:{seed}")

    def draw() -> tuple[str, dict[str, Any]]:
        num_blanks = rng.randint(min_blanks, max_blanks)
        while True:
            solution = rng.choice(all_grids())
            blanks = rng.sample(range(16), num_blanks)
            puzzle = "".join(_BLANK if c in blanks else digit for c, digit in enumerate(solution))
            if num_solutions(puzzle) == 1:
                return puzzle, {"puzzle": puzzle, "solution": solution, "style": style}

    return draw_distinct(draw, count, split)


def demonstrate(record: Mapping[str, Any], rng: Random, noise: float) -> str:
    """Write a completion of mixed quality: some demonstrators solve the puzzle, some are hasty.

    With probability 1 - noise it is the solution. Otherwise it is the work of a hasty demonstrator
    who looks at rows only and writes the digits that a row lacks in ascending order; columns and
    boxes come out wrong as a rule. When noise is above one half, the most likely grid of a model
    that imitates both is a hasty one: supervised training cannot mend that, a reward can.

    Args:
        record: A record of `generate`.
        rng: Source of the noise.
        noise: Probability that the demonstration is a hasty one.
    """
    if rng.random() >= noise:
        return dressed_answer(record, record["solution"])
    puzzle = record["puzzle"]
    rows = (puzzle[start : start + 4] for start in range(0, 16, 4))
    return dressed_answer(record, "".join(_fill_in_order(row) for row in rows))


def _fill_in_order(row: str) -> str:
    missing = iter(digit for digit in "1234" if digit not in row)
    return "".join(next(missing) if cell == _BLANK else cell for cell in row)


def is_grid(text: str) -> bool:
    """Return whether 16 digits from 1 to 4 repeat none in a row, column or box."""
    return all(len({text[cell] for cell in unit}) == 4 for unit in _ROWS + _COLUMNS + _BOXES)


@cache
def all_grids() -> tuple[str, ...]:
    """Return all 288 filled grids, in a fixed order."""
    rows = ["".join(row) for row in permutations("1234")]
    bands = [
        upper + lower
        for upper, lower in permutations(rows, 2)
        if len(set(upper[:2] + lower[:2])) == len(set(upper[2:] + lower[2:])) == 4
    ]
    return tuple(filter(is_grid, (top + bottom for top, bottom in product(bands, repeat=2))))


@cache
def _grids_with(cell: int, digit: str) -> int:
    """Return the set of grids with a digit in a cell; bit i stands for the i-th grid."""
    return sum(1 << i for i, grid in enumerate(all_grids()) if grid[cell] == digit)


def num_solutions(puzzle: str) -> int:
    """Return how many of the 288 grids agree with the givens of a puzzle."""
    grids = (1 << len(all_grids())) - 1
    for cell, digit in enumerate(puzzle):
        if digit != _BLANK:
            grids &= _grids_with(cell, digit)
    return grids.bit_count()
