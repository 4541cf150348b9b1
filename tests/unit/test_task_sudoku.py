"""4x4 sudoku: reader, reward, unique solutions, disjoint splits, demonstrations."""

import json
import re
from collections import Counter
from itertools import combinations, product
from pathlib import Path
from random import Random

import pytest

from megatron_espo.tasks import sudoku
from megatron_espo.tasks.base import SPLITS, Example, split_of

PUZZLE, SOLUTION = "3102200002100320", "3142243142131324"
RECORD = {"puzzle": PUZZLE, "solution": SOLUTION, "style": "bare"}
EXAMPLE = Example(PUZZLE, RECORD)
BLANKS = [cell for cell, digit in enumerate(PUZZLE) if digit == "0"]
GIVENS = [cell for cell, digit in enumerate(PUZZLE) if digit != "0"]


def with_wrong(cells: list[int]) -> str:
    """The solution with another digit in some cells."""
    return "".join(str(int(d) % 4 + 1) if c in cells else d for c, d in enumerate(SOLUTION))


def solutions_by_brute_force(puzzle: str) -> list[str]:
    """Every filling of the blanks that respects the rules, cell by cell."""

    def conflict(a: int, b: int) -> bool:
        same_box = (a // 8, a % 4 // 2) == (b // 8, b % 4 // 2)
        return a // 4 == b // 4 or a % 4 == b % 4 or same_box

    fillings = [puzzle]
    for cell in range(16):
        fillings = [
            f[:cell] + digit + f[cell + 1 :]
            for f in fillings
            for digit in ("1234" if f[cell] == "0" else f[cell])
            if all(f[o] != digit for o in range(16) if o != cell and conflict(cell, o))
        ]
    return fillings


def test_reader_gives_the_puzzle_as_prompt(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(RECORD) + "\n")
    assert sudoku.read(path) == [EXAMPLE]


@pytest.fixture
def chat(tmp_path: Path) -> Example:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"puzzle": PUZZLE, "solution": SOLUTION}) + "\n")
    return sudoku.read(path)[0]


def test_published_record_is_asked_for_in_a_chat_with_answer_tags(chat: Example) -> None:
    (message,) = chat.prompt
    assert isinstance(message, dict) and message["role"] == "user"
    assert PUZZLE in message["content"] and "<answer>" in message["content"]
    example = re.findall("[0-4]{16}", sudoku.INSTRUCTION)
    assert solutions_by_brute_force(example[0]) == [example[1]]


@pytest.mark.parametrize(
    ("text", "blanks"),
    [
        (f"<answer>{SOLUTION}</answer>", 8),
        (f"<reasoning>so</reasoning>\n<answer>\n{SOLUTION}\n</answer> done", 8),
        (f"<answer>{' | '.join(SOLUTION)}</answer>", 8),
        (f"<answer>{'1' * 16}</answer><answer>{SOLUTION}</answer>", 8),
        (f"<answer>{SOLUTION}</answer><answer></answer>", 8),
        (f"<answer>{SOLUTION}</answer><answer>nothing</answer>", 0),
        (f"in <answer> tags: <answer>{SOLUTION}</answer>", 8),
        (SOLUTION, 0),
        (f"<answer>{SOLUTION}", 0),
        (f"{SOLUTION}</answer>", 0),
        (f"</answer>{SOLUTION}<answer>", 0),
        (f"<ANSWER>{SOLUTION}</ANSWER>", 0),
        ("<answer>" + SOLUTION.translate({48 + d: 0x660 + d for d in range(10)}) + "</answer>", 0),
        ("<answer>" * 50_000, 0),
        ("<answer>" + "1" * 100_000 + "</answer>", 2),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_chat_reward_reads_the_last_pair_of_tags(chat: Example, text: str, blanks: int) -> None:
    score = sudoku.score(chat, text)
    assert score.reward == blanks / 8
    assert score.correct is (blanks == 8)


def test_unknown_style_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({**RECORD, "style": "terse"}) + "\n")
    with pytest.raises(ValueError, match="'style' is 'terse'; use one of chat, bare"):
        sudoku.read(path)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"puzzle": PUZZLE}, "'solution' is missing"),
        ({"puzzle": 3102200002100320, "solution": SOLUTION}, "'puzzle' is of type int"),
        ({"puzzle": PUZZLE[:-1], "solution": SOLUTION}, "'puzzle' is not 16 digits"),
        ({"puzzle": PUZZLE + "\n", "solution": SOLUTION}, "'puzzle' is not 16 digits"),
        ({"puzzle": "5" + PUZZLE[1:], "solution": SOLUTION}, "'puzzle' is not 16 digits"),
        ({"puzzle": "٣" + PUZZLE[1:], "solution": SOLUTION}, "'puzzle' is not 16 digits"),
        ({"puzzle": PUZZLE, "solution": "0" + SOLUTION[1:]}, "'solution' is not 16 digits"),
        ({"puzzle": PUZZLE, "solution": SOLUTION + "1"}, "'solution' is not 16 digits"),
        ({"puzzle": SOLUTION, "solution": SOLUTION}, "no blank"),
        ({"puzzle": "0" * 16, "solution": "1234341212343412"}, "repeats a digit"),  # columns
        ({"puzzle": "0" * 16, "solution": "1234234134124123"}, "repeats a digit"),  # boxes
        ({"puzzle": "0" * 16, "solution": "1313242431314242"}, "repeats a digit"),  # rows
        ({"puzzle": "4" + PUZZLE[1:], "solution": SOLUTION}, "contradicts a given"),
    ],
)
def test_reader_names_the_line_and_what_is_wrong(
    tmp_path: Path, record: dict[str, object], message: str
) -> None:
    path = tmp_path / "data.jsonl"
    good = json.dumps(RECORD)
    path.write_text(f"{good}\n{json.dumps(record)}\n")
    with pytest.raises(ValueError, match=message) as caught:
        sudoku.read(path)
    assert str(caught.value).startswith(f"{path}:2: ")


@pytest.mark.parametrize("text", [SOLUTION, f"  {SOLUTION}\n", "3142\n2431\n4213 \r\n\t1324"])
def test_whole_solution_is_correct_whatever_its_white_space(text: str) -> None:
    score = sudoku.score(EXAMPLE, text)
    assert (score.reward, score.correct, score.metrics) == (1.0, True, {"givens_kept": 1.0})


@pytest.mark.parametrize("num_wrong", range(len(BLANKS) + 1))
def test_reward_is_the_fraction_of_blanks_that_are_right(num_wrong: int) -> None:
    score = sudoku.score(EXAMPLE, with_wrong(BLANKS[:num_wrong]))
    assert score.reward == pytest.approx(1 - num_wrong / len(BLANKS))
    assert score.correct is (num_wrong == 0)
    assert score.metrics["givens_kept"] == 1.0


def test_changed_givens_keep_the_reward_but_are_not_correct() -> None:
    score = sudoku.score(EXAMPLE, with_wrong(GIVENS[:2]))
    assert (score.reward, score.correct) == (1.0, False)
    assert score.metrics["givens_kept"] == pytest.approx(1 - 2 / len(GIVENS))


@pytest.mark.parametrize("length", range(16))
def test_short_completion_earns_the_blanks_it_reaches(length: int) -> None:
    score = sudoku.score(EXAMPLE, SOLUTION[:length])
    assert score.reward == sum(cell < length for cell in BLANKS) / len(BLANKS)
    assert score.metrics["givens_kept"] == sum(cell < length for cell in GIVENS) / len(GIVENS)
    assert not score.correct


@pytest.mark.parametrize("tail", ["1", "x", SOLUTION, " and done"])
def test_characters_after_the_sixteenth_keep_the_reward_but_are_not_correct(tail: str) -> None:
    score = sudoku.score(EXAMPLE, SOLUTION + tail)
    assert (score.reward, score.correct) == (1.0, False)


@pytest.mark.parametrize("text", ["", "   ", "x" * 16, PUZZLE, "٣١٤٢٢٤٣١٤٢١٣١٣٢٤", "\x00" * 40])
def test_text_without_right_digits_earns_nothing(text: str) -> None:
    score = sudoku.score(EXAMPLE, text)
    assert (score.reward, score.correct) == (0.0, False)


def test_leading_text_shifts_every_cell() -> None:
    shifted = sudoku.score(EXAMPLE, "x" + SOLUTION)
    expected = sum(SOLUTION[c] == ("x" + SOLUTION)[c] for c in BLANKS) / len(BLANKS)
    assert (shifted.reward, shifted.correct) == (expected, False)


def test_puzzle_without_givens_keeps_all_its_givens() -> None:
    example = Example("0" * 16, {**RECORD, "puzzle": "0" * 16})
    assert sudoku.score(example, SOLUTION).metrics == {"givens_kept": 1.0}


def test_there_are_288_grids_and_solution_counts_equal_brute_force() -> None:
    assert sorted(sudoku.all_grids()) == solutions_by_brute_force("0" * 16)
    assert len(sudoku.all_grids()) == 288
    rng = Random(0)
    counts = set()
    for _ in range(100):
        blanks = rng.sample(range(16), rng.randint(6, 13))
        puzzle = "".join("0" if c in blanks else d for c, d in enumerate(SOLUTION))
        count = sudoku.num_solutions(puzzle)
        assert count == len(solutions_by_brute_force(puzzle))
        counts.add(count)
    assert len(counts) > 3
    assert sudoku.num_solutions("11" + "0" * 14) == 0


def test_generated_puzzles_have_one_solution_and_are_accepted_by_the_reader(
    tmp_path: Path,
) -> None:
    records = sudoku.generate(150, seed=0, split="train")
    for record in records:
        assert solutions_by_brute_force(record["puzzle"]) == [record["solution"]]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert [e.prompt for e in sudoku.read(path)] == [record["puzzle"] for record in records]


def test_number_of_blanks_is_uniform_over_six_to_ten() -> None:
    blanks = Counter(r["puzzle"].count("0") for r in sudoku.generate(2000, 0, "train"))
    assert set(blanks) == {6, 7, 8, 9, 10}
    assert all(abs(count - 400) < 90 for count in blanks.values())  # 5 standard deviations


def test_splits_share_no_puzzle_over_counts_and_seeds() -> None:
    puzzles: dict[str, set[str]] = {split: set() for split in SPLITS}
    for split, seed, count in product(SPLITS, range(4), (10, 150)):
        found = {record["puzzle"] for record in sudoku.generate(count, seed, split)}
        assert len(found) == count
        assert {split_of(puzzle) for puzzle in found} == {split}
        puzzles[split] |= found
    for one, other in combinations(SPLITS, 2):
        assert not puzzles[one] & puzzles[other]


def test_seed_decides_the_puzzles_and_a_smaller_count_is_a_prefix() -> None:
    records = sudoku.generate(40, 1, "test")
    assert records == sudoku.generate(40, 1, "test")
    assert records[:15] == sudoku.generate(15, 1, "test")
    assert records != sudoku.generate(40, 2, "test")
    assert sudoku.generate(0, 1, "test") == []


def test_impossible_requests_are_refused() -> None:
    # One blank leaves 288 * 16 puzzles, all with one solution, in all splits together.
    with pytest.raises(ValueError, match=r"found only \d+ of 4000 distinct train problems"):
        sudoku.generate(4000, 0, "train", min_blanks=1, max_blanks=1)
    with pytest.raises(ValueError, match="split 'dev' is unknown"):
        sudoku.generate(1, 0, "dev")
    for low, high in ((0, 3), (5, 4), (13, 13)):
        with pytest.raises(ValueError, match=f"cannot leave {low} to {high} cells blank"):
            sudoku.generate(1, 0, "train", min_blanks=low, max_blanks=high)


def test_demonstration_without_noise_is_the_solution() -> None:
    assert {sudoku.demonstrate(RECORD, Random(seed), 0.0) for seed in range(50)} == {SOLUTION}
    (record,) = sudoku.generate(1, 0, "train", style="chat")
    assert sudoku.score(Example("", record), sudoku.demonstrate(record, Random(0), 0.0)).correct


def test_hasty_demonstrator_fills_rows_in_ascending_order_and_sees_nothing_else() -> None:
    record = RECORD
    # 3102 2000 0210 0320, row by row, by hand.
    assert {sudoku.demonstrate(record, Random(s), 1.0) for s in range(9)} == {"3142213432141324"}
    for record in sudoku.generate(50, 3, "train"):
        text = sudoku.demonstrate(record, Random(0), 1.0)
        rows = [slice(start, start + 4) for start in range(0, 16, 4)]
        for row in rows:
            assert sorted(text[row]) == list("1234")
            added = [d for d, g in zip(text[row], record["puzzle"][row], strict=True) if g == "0"]
            assert added == sorted(added)
        example = Example(record["puzzle"], record)
        assert sudoku.score(example, text).metrics["givens_kept"] == 1.0


def test_share_of_hasty_demonstrations_is_the_noise() -> None:
    record = RECORD
    rng, count = Random(0), 4000
    texts = [sudoku.demonstrate(record, rng, 0.7) for _ in range(count)]
    again = Random(0)
    assert texts == [sudoku.demonstrate(record, again, 0.7) for _ in range(count)]
    assert texts.count(SOLUTION) / count == pytest.approx(0.3, abs=0.03)
    assert texts.count("3142213432141324") / count == pytest.approx(0.7, abs=0.03)
