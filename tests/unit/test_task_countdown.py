"""Countdown: parser against Python, reward on hostile text, reader, splits, demonstrations."""

import ast
import json
import re
import time
from collections.abc import Callable
from fractions import Fraction
from itertools import combinations, product
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_espo.tasks import countdown
from megatron_espo.tasks.base import SPLITS, Example, split_of


def bare(numbers: list[int], target: int) -> Example:
    answer = {"numbers": numbers, "target": target, "style": "bare"}
    return Example(f"{','.join(map(str, numbers))}={target}:", answer)


EXAMPLE = bare([44, 19, 35], 98)
CHAT = Example("", {"numbers": [44, 19, 35], "target": 98})


@pytest.mark.parametrize(
    "text",
    [
        "44+19+35",
        "44+19+35=98",
        " 35 + (19+44)\n= 98 ",
        "(((35)+44))+19",
        "19+44+35 ",
        "(" * 32 + "44+19+35" + ")" * 32,
    ],
)
def test_expression_with_the_target_earns_one(text: str) -> None:
    score = countdown.score(EXAMPLE, text)
    assert (score.reward, score.correct, score.metrics) == (1.0, True, {"well_formed": 1.0})


@pytest.mark.parametrize("text", ["44+19-35", "44*19*35", "44/(19-35)", "44-19-35=98", "35/19/44"])
def test_well_formed_miss_earns_a_tenth(text: str) -> None:
    score = countdown.score(EXAMPLE, text)
    assert (score.reward, score.correct, score.metrics) == (0.1, False, {"well_formed": 1.0})


@pytest.mark.parametrize(
    "text",
    [
        # No expression at all, or not of these numbers, each once.
        *["", " ", "98", "=98", "44,19,35", "441935", "44+19", "44+19+35+35"],
        *["44+19+34+1", "44+19+35+0"],
        # Something else after "=", or before and after the expression.
        *["44+19+35=", "44+19+35=97", "44+19+35=098", "44+19+35=+98"],
        *["44+19+35=٩٨", "44+19+35=98=98"],
        *["44+19+35=98 and more", "44+19+35 and more", "the answer: 44+19+35"],
        *["44+19+35;", "44+19+35#", "44+19+35\x00", "\ud800"],
        # Signs, missing operands and unbalanced parentheses.
        *["44++19+35", "44+-19+35", "-44+19+35", "+44+19+35", "44+19+35-"],
        *["*44+19+35", "44(19+35)"],
        *["()44+19+35", "44+19+35)", "(44+19+35", "((44+19)+35", ")44+19+35("],
        *["[44+19]+35", "((("],
        # Other operators and other spellings of numbers.
        *["44**19+35", "44//19+35", "44%19+35", "9**9**9", "9**9**9**9**9**9"],
        *["044+19+35", "44.0+19+35", "4_4+19+35", "4e1+19+35", "0x2c+19+35"],
        *["44 19 35", "44+19+3 5", "__import__('os').system('true')"],
        # Digits, operators and spaces that are not ASCII.
        *["٤٤+19+35", "\uff14\uff14+19+35", "44+19+³⁵", "44\uff0b19+35"],
        *["44\u00a0+19+35", "44\u221219+35", "44\u00d719+35"],
        # Too deep or too long.
        *["(" * 100_000, "(" * 33 + "44+19+35" + ")" * 33, "44+19+35" + " " * 249],
        *["1+" * 100_000, "9" * 200, "9" * 10_000],
    ],
    ids=lambda text: ascii(text[:24]),
)
def test_malformed_text_earns_nothing_and_returns_at_once(text: str) -> None:
    start = time.monotonic()
    score = countdown.score(EXAMPLE, text)
    assert (score.reward, score.correct, score.metrics) == (0.0, False, {"well_formed": 0.0})
    assert time.monotonic() - start < 1.0


def test_division_by_zero_is_well_formed_but_has_no_value() -> None:
    example = bare([2, 2, 5], 0)
    for text in ("5/(2-2)", "5/(2-2)=0", "(2-2)/5", "2*2-5"):
        expected = 1.0 if text == "(2-2)/5" else 0.1
        assert countdown.score(example, text).reward == expected
    # Nothing multiplies the missing value away.
    assert countdown.parse_expression("0*(1/0)").value is None
    assert countdown.parse_expression("1/0-1/0").value is None


def test_values_are_exact_and_repeated_numbers_are_counted() -> None:
    example = bare([3, 3, 8, 8], 24)
    assert countdown.score(example, "8/(3-8/3)").correct
    assert countdown.score(example, "8*3+8-3").reward == 0.1
    assert countdown.score(example, "8*3").reward == 0.0
    assert countdown.score(example, "8+8+8").reward == 0.0
    third = bare([1, 3, 3], 1)
    assert countdown.score(third, "1/3*3").correct


@pytest.mark.parametrize(
    ("text", "value"),
    [("10-4-3", 3), ("24/4/2", 3), ("2+3*4", 14), ("(2+3)*4", 20), ("10-(4-3)", 9), ("0", 0)],
)
def test_precedence_and_left_associativity(text: str, value: int) -> None:
    assert countdown.parse_expression(text).value == value


def test_length_limit_is_exact() -> None:
    longest = "1" + "+1" * 127 + " "
    assert len(longest) == countdown.MAX_LENGTH
    assert countdown.parse_expression(longest).value == 128
    with pytest.raises(ValueError, match="longer than 256"):
        countdown.parse_expression(longest + " ")


OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
}
TREES: st.SearchStrategy[ast.expr] = st.recursive(
    st.integers(0, 999).map(lambda n: ast.Constant(value=n)),
    lambda children: st.builds(
        lambda left, kind, right: ast.BinOp(left=left, op=kind(), right=right),
        children,
        st.sampled_from(sorted(OPERATORS, key=lambda kind: kind.__name__)),
        children,
    ),
    max_leaves=12,
)


def evaluate(tree: ast.expr) -> Fraction:
    if isinstance(tree, ast.BinOp):
        return OPERATORS[type(tree.op)](evaluate(tree.left), evaluate(tree.right))
    assert isinstance(tree, ast.Constant)
    assert isinstance(tree.value, int)
    return Fraction(tree.value)


def leaves(tree: ast.expr) -> list[int]:
    return [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]  # type: ignore[misc]


@settings(max_examples=300, deadline=None)
@given(TREES)
def test_value_of_an_expression_tree_equals_its_evaluation_in_fractions(tree: ast.expr) -> None:
    text = ast.unparse(tree)  # Python's own minimal parentheses
    parsed = countdown.parse_expression(text.replace(" ", "") if len(text) % 2 else text)
    assert sorted(parsed.numbers) == sorted(leaves(tree))
    try:
        assert parsed.value == evaluate(tree)
    except ZeroDivisionError:
        assert parsed.value is None


@settings(max_examples=500, deadline=None)
@given(st.text(alphabet="0123456789+-*/() =", max_size=24) | st.text(max_size=300))
def test_random_text_never_raises_and_whatever_parses_means_the_same_to_python(text: str) -> None:
    score = countdown.score(EXAMPLE, text)
    assert score.reward in (0.0, 0.1, 1.0)
    try:
        parsed = countdown.parse_expression(text)
    except ValueError:
        return
    assert not re.search(r"\*\s*\*|/\s*/", text)  # so that Python cannot hang below
    exact = re.sub("[0-9]+", r"Fraction(\g<0>)", "(" + text + ")")
    try:
        assert parsed.value == eval(exact, {"Fraction": Fraction})
    except ZeroDivisionError:
        assert parsed.value is None


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_reader_writes_numbers_in_order_then_the_target(tmp_path: Path) -> None:
    record = {"numbers": [44, 19, 35], "target": 98, "style": "bare"}
    path = write(tmp_path / "data.jsonl", record, record | {"solution": "44+19+35"})
    assert countdown.read(path) == [EXAMPLE, EXAMPLE]


def test_published_records_are_asked_for_in_a_chat_with_answer_tags(tmp_path: Path) -> None:
    path = write(
        tmp_path / "data.jsonl",
        {"numbers": [44, 19, 35], "target": 98},
        {"nums": [44, 19, 35], "target": 98},
        {"input": "44,19,35", "output": "98"},
    )
    ours, theirs, tests = countdown.read(path)
    assert ours == theirs == tests
    (message,) = ours.prompt
    assert "[44, 19, 35]" in message["content"] and "98" in message["content"]
    assert "<answer>" in message["content"]
    numbers, target, example = re.search(
        r"numbers \[(.*?)\] and the target\s+([0-9]+) a right answer is (.*)\.$",
        countdown.INSTRUCTION,
    ).groups()
    problem = bare([int(n) for n in numbers.split(",")], int(target))
    assert countdown.score(problem, example).correct


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<reasoning>44+19=63</reasoning>\n<answer>\n44+19+35\n</answer>", 1.0),
        ("<answer>44+19+35=98</answer>", 1.0),
        ("<answer>1</answer><answer>35+(44+19)</answer> and more", 1.0),
        ("<answer>44+19-35</answer>", 0.1),
        ("<answer>44+19+35=97</answer>", 0.1),
        ("<answer>44*35</answer>", 0.1),
        ("<answer></answer>", 0.1),
        ("<answer>44+19+35</answer><answer>0</answer>", 0.1),
        ("<answer>98</answer>", 0.1),
        ("<answer>9**9**9**9</answer>", 0.1),
        ("<answer>44+19+35+0*(1/0)</answer>", 0.1),
        ("<answer>__import__('os')._exit(0)</answer>", 0.1),
        ("<answer>" + "(" * 100_000 + "</answer>", 0.1),
        ("<answer>٤٤+19+35</answer>", 0.1),
        ("44+19+35", 0.0),
        ("<answer>44+19+35", 0.0),
        ("44+19+35</answer>", 0.0),
        ("</answer>44+19+35<answer>", 0.0),
        ("", 0.0),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_chat_reward_reads_the_last_pair_of_tags(text: str, reward: float) -> None:
    score = countdown.score(CHAT, text)
    assert (score.reward, score.correct) == (reward, reward == 1.0)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"numbers": [1, 2]}, "'target' is missing"),
        ({"numbers": "1,2", "target": 3}, "'numbers' is of type str; make it list"),
        ({"numbers": [1, 2], "target": "3"}, "'target' is of type str; make it int"),
        ({"numbers": [1, 2], "target": 3.0}, "'target' is of type float"),
        ({"numbers": [], "target": 3}, "not a list of positive integers"),
        ({"numbers": [1, "2"], "target": 3}, "not a list of positive integers"),
        ({"numbers": [1, True], "target": 3}, "not a list of positive integers"),
        ({"numbers": [3, 0], "target": 3}, "not a list of positive integers"),
        ({"numbers": [1, 2], "target": -1}, "'target' is -1; make it 0 or more"),
        ({"numbers": [1, 2], "target": 3, "solution": "1*2"}, "'solution' '1\\*2' is wrong"),
        ({"numbers": [1, 2], "target": 3, "style": "terse"}, "'style' is 'terse'; use one of"),
        ({"input": "1,x", "output": "3"}, "not of the form"),
        ({"input": [1, 2], "output": "3"}, "not of the form"),
    ],
)
def test_reader_names_the_line_and_what_is_wrong(
    tmp_path: Path, record: dict[str, object], message: str
) -> None:
    path = write(tmp_path / "data.jsonl", {"numbers": [1, 2], "target": 3}, record)
    with pytest.raises(ValueError, match=message) as caught:
        countdown.read(path)
    assert str(caught.value).startswith(f"{path}:2: ")


@pytest.mark.parametrize(("num_numbers", "max_number"), [(3, 50), (2, 9), (5, 20)])
def test_generated_problems_are_solved_by_their_solution(
    tmp_path: Path, num_numbers: int, max_number: int
) -> None:
    records = countdown.generate(20, 0, "train", num_numbers=num_numbers, max_number=max_number)
    examples = countdown.read(write(tmp_path / "data.jsonl", *records))
    for record, example in zip(records, examples, strict=True):
        assert countdown.score(example, record["solution"]).correct
        assert len(record["numbers"]) == num_numbers
        assert all(1 <= number <= max_number for number in record["numbers"])
        assert 1 <= record["target"] <= 100


def test_intermediate_results_of_solutions_are_positive_integers() -> None:
    for record in countdown.generate(300, 0, "train", num_numbers=4):
        for node in ast.walk(ast.parse(record["solution"], mode="eval").body):
            if isinstance(node, ast.BinOp):
                value = evaluate(node)
                assert value > 0
                assert value.denominator == 1


def test_solutions_use_every_operator_and_parentheses() -> None:
    text = "".join(record["solution"] for record in countdown.generate(300, 0, "train"))
    assert set("+-*/()") <= set(text)


def key(record: dict[str, object]) -> str:
    numbers = record["numbers"]
    assert isinstance(numbers, list)
    return f"{','.join(map(str, sorted(numbers)))}={record['target']}"


def test_splits_share_no_problem_in_any_order_over_counts_and_seeds() -> None:
    keys: dict[str, set[str]] = {split: set() for split in SPLITS}
    for split, seed, count in product(SPLITS, range(4), (10, 150)):
        found = {key(record) for record in countdown.generate(count, seed, split)}
        assert len(found) == count
        assert {split_of(problem) for problem in found} == {split}
        keys[split] |= found
    for one, other in combinations(SPLITS, 2):
        assert not keys[one] & keys[other]


def test_seed_decides_the_problems_and_a_smaller_count_is_a_prefix() -> None:
    records = countdown.generate(40, 1, "test")
    assert records == countdown.generate(40, 1, "test")
    assert records[:15] == countdown.generate(15, 1, "test")
    assert records != countdown.generate(40, 2, "test")


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(ValueError, match=r"found only \d+ of 500 distinct test problems"):
        countdown.generate(500, 0, "test", num_numbers=2, max_number=9)
    with pytest.raises(ValueError, match="cannot use 1 numbers from 1 to 9"):
        countdown.generate(1, 0, "test", num_numbers=1, max_number=9)
    with pytest.raises(ValueError, match="cannot use 3 numbers from 1 to 0"):
        countdown.generate(1, 0, "test", max_number=0)


def test_demonstrations_are_solutions_except_a_share_of_well_formed_misses(tmp_path: Path) -> None:
    records = countdown.generate(1000, 0, "train")
    examples = countdown.read(write(tmp_path / "data.jsonl", *records))
    for noise in (0.0, 0.4, 1.0):
        rng = Random(0)
        texts = [countdown.demonstrate(record, rng, noise) for record in records]
        scores = [countdown.score(e, text) for e, text in zip(examples, texts, strict=True)]
        assert all(score.metrics["well_formed"] == 1.0 for score in scores)
        assert sum(s.correct for s in scores) / 1000 == pytest.approx(1 - noise, abs=0.06)
        if noise in (0.0, 1.0):
            assert all(score.correct is (noise == 0.0) for score in scores)


def test_a_hasty_demonstration_adds_all_numbers() -> None:
    record = {"numbers": [9, 2, 1], "target": 6, "solution": "9-2-1", "style": "bare"}
    rng = Random(0)
    assert {countdown.demonstrate(record, rng, 1.0) for _ in range(20)} == {"9+2+1"}


def test_where_the_sum_is_right_operators_change_and_numbers_are_exchanged() -> None:
    record = {"numbers": [9, 2, 1], "target": 12, "solution": "9+2+1", "style": "bare"}
    rng = Random(0)
    texts = {countdown.demonstrate(record, rng, 1.0) for _ in range(200)}
    assert {"9-2+1", "9+2*1", "9+2/1"} <= texts
    assert not {"9+2+1", "2+9+1", "9+1+2"} & texts


@pytest.mark.parametrize("operators", ["+-", "+-*/"])
def test_ordered_solutions_go_from_left_to_right(operators: str) -> None:
    records = countdown.generate(
        200, 3, "train", num_numbers=4, max_number=9, operators=operators, ordered=True
    )
    seen = set()
    for record in records:
        text = record["solution"]
        assert [int(digit) for digit in text[::2]] == record["numbers"]
        value = Fraction(int(text[0]))
        for operator, digit in zip(text[1::2], text[2::2], strict=True):
            seen.add(operator)
            value = {
                "+": value + int(digit), "-": value - int(digit), "*": value * int(digit),
                "/": value / int(digit),
            }[operator]  # fmt: skip
            assert value > 0 and value.denominator == 1
        # From left to right is also what the signs mean.
        assert value == eval(text) == record["target"]
    assert seen == set(operators)


def test_record_without_a_solution_cannot_be_demonstrated() -> None:
    with pytest.raises(ValueError, match="without 'solution'"):
        countdown.demonstrate({"numbers": [1, 2], "target": 3}, Random(0), 0.0)
