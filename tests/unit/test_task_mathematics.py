r"""gsm8k and math: answers as people and models write them, readers, hostile text."""

import json
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_espo.tasks import equality, gsm8k, math
from megatron_espo.tasks.answers import MAX_ANSWER, boxed_answer, final_statement, tagged_answer
from megatron_espo.tasks.base import Example
from megatron_espo.tasks.numbers import read_number, stated_number

NUMBER = Example("", {"answer": "1234"})
GROUPED = Example("", {"answer": "1,234"})


@pytest.mark.parametrize(
    "text",
    [
        *["\\boxed{1234}", "so \\boxed{1,234}.", "\\boxed{ 1234 }", "\\fbox{1234}"],
        *["\\boxed{\\$1,234}", "\\boxed{1{,}234}", "\\boxed{1\\,234}", "\\boxed{1,\\!234}"],
        *["\\boxed{1234 \\text{ apples}}", "\\boxed{1234 apples}", "\\boxed{x = 1234}"],
        *["\\boxed{1234.0}", "\\boxed{1,234.00}", "\\boxed{\\frac{2468}{2}}", "\\boxed{2468/2}"],
        *["\\boxed{617 \\cdot 2}", "\\boxed{1234\\%}", "\\boxed{+1234}", "$\\boxed{1234}$"],
        *["first \\boxed{7}, no: \\boxed{1234}", "\\boxed{1234} and \\boxed{never closed"],
        *["<answer>1234</answer>", "<answer>7</answer>\n<answer>\n$1,234\n</answer>"],
        *["#### 1234", "5 + 6\n#### 1,234", "The answer is 1234.", "The answer is: $1,234."],
        *["it costs 1,234 dollars", "7 and 1234", "7-1234 is no sum: 1234", "x=1234", "$1234"],
        *["\\boxed{1234} is 2 more than 1232", "#### 1234 (not 1235)"],
    ],
)
def test_gsm8k_reads_numbers_as_people_write_them(text: str) -> None:
    for example in (NUMBER, GROUPED):
        score = gsm8k.score(example, text)
        assert (score.reward, score.correct) == (1.0, True)


@pytest.mark.parametrize(
    "text",
    [
        *["", " ", "\\boxed{}", "\\boxed{1235}", "\\boxed{12,34}", "\\boxed{-1234}", "#### -1234"],
        *["\\boxed{1234} no, \\boxed{7}", "\\boxed{1234 or 7}", "\\boxed{7, 1234}"],
        *["<answer>7</answer> 1234", "\\boxed{7} 1234"],
        *["\\boxed 1234 or 7", "\\boxed{1234"[:7], "1,23,4"],
        *["\\boxed{1234.5}", "\\boxed{1234e1}", "\\boxed{1/0}", "\\boxed{\\frac{1234}{0}}"],
        *["\\boxed{١٢٣٤}", "\\boxed{\uff11\uff12\uff13\uff14}", "\\boxed{¹²³⁴}", "١٢٣٤", "\ud800"],
        *["\\boxed{\\infty}", "\\boxed{x}", "\\boxed{True}"],
        *["\\boxed{9**9**9**9}", "\\boxed{9^{9^{9^9}}}", "\\boxed{99999!}", "\\boxed{9!!!!}"],
        *["\\boxed{(9^9)^{99999}}", "\\boxed{10^{100000000}}", "\\boxed{" + "9" * 400 + "}"],
        *["\\boxed{" * 50_000, "{" * 200_000, "9" * 200_000, "\\boxed{" + "(" * 400 + "}"],
        *["\\boxed{__import__('os')._exit(0)}", "\\boxed{exec('1')}", "\\boxed{\\input{x}}"],
        *["#" * 100_000, "answer is " * 50_000, "<answer>" * 50_000, "-" * 100_000],
    ],
    ids=lambda text: ascii(text[:30]),
)
def test_gsm8k_gives_nothing_for_what_is_not_the_number_and_returns_at_once(text: str) -> None:
    started = time.monotonic()
    score = gsm8k.score(NUMBER, text)
    assert (score.reward, score.correct) == (0.0, False)
    assert time.monotonic() - started < 20.0


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        *[("\\frac{1}{2}", a) for a in ("\\frac12", "1/2", "0.5", "\\dfrac{2}{4}", "x=1/2")],
        *[("\\left( 3, \\frac{\\pi}{2} \\right)", "(3, \\pi/2)"), ("p - q", "-q+p")],
        *[("\\text{Evelyn}", "Evelyn"), ("\\text{(C)}", "(C)"), ("90^\\circ", "90")],
        *[("2\\sqrt{2}", "\\sqrt{8}"), ("10,080", "10080"), ("\\{1,2\\}", "\\{2, 1\\}")],
        *[("(x-1)^3(x+1)^3", "(x+1)^3 (x-1)^3"), ("e^{-x^2}", "e^{-(x^2)}")],
        *[
            ("(x^3)^2", "x^6"),
            ("2^{100}", "(2^{50})^2"),
            ("2^{100} \\cdot 3^{99}", "3^{99} 2^{100}"),
        ],
        *[("\\cos(6^\\circ)\\sin(12^\\circ)", "\\sin(12^\\circ)\\cos(6^\\circ)")],
        *[("4", "4."), ("p - q", "p - q ."), ("\\text{Evelyn}", "Evelyn.")],
        *[("[0,3)", "[0, 3)"), ("x^2+2x+1", "(x+1)^2"), ("5.4 \\text{ cents}", "5.4")],
        ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
    ],
)
def test_math_accepts_equal_answers(
    reference: str, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(equality, "_SECONDS", 100)  # a busy machine is not to decide
    assert math.score(Example("", {"answer": reference}), f"so \\boxed{{{answer}}}").correct


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        *[("\\frac{1}{2}", a) for a in ("\\frac13", "2", "1/2, 1/3", "\\frac{1}{2", "", "½")],
        *[("[0,3)", "(0,3)"), ("[0,3)", "[0,3]"), ("(1,2)", "(2,1)"), ("\\{1,2\\}", "\\{1\\}")],
        *[("4", "\\{4, 5\\}"), ("4", "4 or 5"), ("4", "4,5"), ("4", "x"), ("p - q", "q - p")],
        *[("4", "٤"), ("4", "4 \\cup 5"), ("4", "4^{9^{9^9}}"), ("\\text{Evelyn}", "Andre")],
        *[("2", "\\begin{pmatrix} 2 \\\\ 2 \\end{pmatrix}"), ("1", "99999!"), ("1", "x" * 500)],
        ("4", "2^{2^{2^{2^{2^{2}}}}}"),
        *[("4", "((((9^{99})^{99})^{99})^{99})"), ("4", "(((9^999)^9)^9)^9"), ("4", "9^{99!}")],
        *[("4", "9^\\frac{9^{9^9}}{1}"), ("4", "9^{(9)^{9}^9}"), ("4", "9 ** 9 ** 9 ** 9")],
        *[("4", "9^{9\\cdot 9^{99}"), ("4", "{9^{9999}}^{9999}"), ("4", "9^9^9^9")],
        ("4", "\\int_0^1" * 40),
    ],
)
def test_math_refuses_other_answers_and_returns_at_once(reference: str, answer: str) -> None:
    started = time.monotonic()
    assert not math.score(Example("", {"answer": reference}), f"so \\boxed{{{answer}}}").correct
    assert time.monotonic() - started < 20.0


# Without one of the checks, sympy would be asked for one of these.
COSTLY = ["10^{100000000}", "9999!", "9!!", "1" * 200, "9**9**9", "9^{9}^{9}", "9^\\sqrt{9^{99}}",
          "9^{9\\cdot 9^{99}}", "2^{(3)^{4}", "((9^{99})^{99})^{99}", "{9^{9999}}^{9999}",
          "(9999^{101})^{100}", "9^{99!}"]  # fmt: skip
CHEAP = ["(x-1)^3(x+1)^3", "e^{-x^2}", "2^{100} \\cdot 3^{150} \\cdot 5^{99}", "x^{n!}", "99!",
         "\\cos(6^\\circ)\\sin(12^\\circ)", "(x^{99})^{100}", "2^{x^2}", "9^{9999}"]  # fmt: skip


@pytest.mark.parametrize("text", COSTLY)
def test_powers_too_large_to_work_out_are_told_by_their_structure(text: str) -> None:
    assert equality._is_costly(text)


@pytest.mark.parametrize("text", CHEAP)
def test_ordinary_powers_are_not_taken_for_towers(text: str) -> None:
    assert not equality._is_costly(text)


def test_score_says_whether_the_answer_is_boxed() -> None:
    for task in (gsm8k, math):
        assert task.score(NUMBER, "\\boxed{1234}").metrics == {"boxed": 1.0}
        assert task.score(NUMBER, "the answer is 1234").metrics == {"boxed": 0.0}
        assert task.score(NUMBER, "the answer is 1234").correct


PIECES = [*"0123456789+-*/^(){}[]\\,.$%=<># abx!", "\\boxed{", "<answer>", "٣", "\\frac"]
HOSTILE = st.lists(st.sampled_from(PIECES), max_size=60).map("".join)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=200) | HOSTILE)
def test_any_text_has_an_answer_or_none_and_never_raises(text: str) -> None:
    for found in (tagged_answer(text), boxed_answer(text)):
        assert found is None or found == found.strip()
    statement = final_statement(text)
    assert statement is None or len(statement.text) <= MAX_ANSWER
    value = read_number(text)
    assert value is None or isinstance(value, Fraction)
    assert gsm8k.score(NUMBER, "#" + text).reward in (0.0, 1.0)


@settings(max_examples=60, deadline=None)
@given(HOSTILE)
def test_math_never_raises_on_hostile_answers(text: str) -> None:
    assert math.score(Example("", {"answer": "x+1"}), "\\boxed{" + text + "}").reward in (0.0, 1.0)


@settings(max_examples=200, deadline=None)
@given(st.integers(-(10**12), 10**12), st.integers(0, 99))
def test_numbers_are_read_exactly_in_every_spelling(whole: int, cents: int) -> None:
    value = Fraction(whole * 100 + (cents if whole >= 0 else -cents), 100)
    for spelling in (f"{whole}.{cents:02}", f"{whole:,}.{cents:02}", f"{whole}.{cents:02} km"):
        assert read_number(spelling) == value
        for text in (f"so \\boxed{{{spelling}}}", f"costs {spelling}", f"#### {spelling}"):
            statement = final_statement(text)
            assert statement is not None and stated_number(statement)[0] == value
    assert read_number(f"\\frac{{{whole}}}{{{cents + 1}}}") == Fraction(whole, cents + 1)


def test_answers_longer_than_the_limit_are_none() -> None:
    longest = "1" * MAX_ANSWER
    assert final_statement(f"<answer>{longest}</answer>") == (longest, "tags")
    assert final_statement(f"<answer>{longest}1</answer>") is None
    assert final_statement(f"#### {longest}1") is None
    assert read_number(longest) == int(longest) and read_number(longest + "1") is None


def test_escaped_braces_do_not_open_or_close_a_box() -> None:
    for content in ("\\{1, 2", "1 \\}", "\\{ \\frac{1}{2} \\}", "\\\\ {x}"):
        assert boxed_answer(f"so \\boxed{{{content}}} it is }}") == content


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_readers_take_the_published_records(tmp_path: Path) -> None:
    short = {"question": "How many?", "answer": "72"}
    worked = {"question": "How many?", "answer": "48/2 = <<48/2=24>>24\n#### 72"}
    ours, theirs = gsm8k.read(write(tmp_path / "g.jsonl", short, worked))
    assert ours == theirs and ours.answer == {"answer": "72"}
    answered = {"problem": "What?", "answer": "\\frac{1}{2}"}
    solved = {"problem": "What?", "solution": "As \\boxed{3} so \\boxed{\\frac{1}{2}}."}
    ours, theirs = math.read(write(tmp_path / "m.jsonl", answered, solved))
    assert ours == theirs and ours.answer == {"answer": "\\frac{1}{2}"}
    (message,) = ours.prompt
    assert message == {"role": "user", "content": f"What?\n{math.INSTRUCTION}"}


@pytest.mark.parametrize(
    ("task", "record", "message"),
    [
        (gsm8k, {"question": "How?"}, "'answer' is missing"),
        (gsm8k, {"question": "How?", "answer": "#### many"}, "'answer' 'many' is no number"),
        (gsm8k, {"question": "How?", "answer": 3}, "'answer' is of type int"),
        (math, {"answer": "3"}, "'problem' is missing"),
        (math, {"problem": "What?", "answer": None}, "'answer' is no text and 'solution' has no"),
        (math, {"problem": "What?", "solution": "so 3"}, "'answer' is no text"),
    ],
)
def test_readers_name_the_line_and_what_is_wrong(tmp_path: Path, task, record, message) -> None:
    path = write(tmp_path / "data.jsonl", {"question": "?", "problem": "?", "answer": "1"}, record)
    with pytest.raises(ValueError, match=message) as caught:
        task.read(path)
    assert str(caught.value).startswith(f"{path}:2: ")


def test_parquet_files_are_read_like_jsonl(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    records = [{"question": "How many?", "answer": "72"}, {"question": "And?", "answer": "#### 5"}]
    parquet.write_table(arrow.Table.from_pylist(records), tmp_path / "data.parquet")
    assert gsm8k.read(tmp_path / "data.parquet") == gsm8k.read(
        write(tmp_path / "x.jsonl", *records)
    )
    parquet.write_table(arrow.Table.from_pylist([{"question": "?"}]), tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match=r"bad\.parquet:1: key 'answer' is missing"):
        gsm8k.read(tmp_path / "bad.parquet")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(ValueError, match=r"torn\.parquet: cannot be read"):
        gsm8k.read(tmp_path / "torn.parquet")
