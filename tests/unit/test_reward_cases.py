r"""tests/data/reward_cases.jsonl: completions as models write them, right and wrong, by task.

Each line has the task, a record of its data, a completion, and whether it deserves full reward.
"""

import json
from pathlib import Path
from types import ModuleType

import pytest
from tool_loading import load_tool

from megatron_espo.errors import UserError
from megatron_espo.tasks import BUILT_IN, equality
from megatron_espo.tasks.equality import equivalent
from megatron_espo.tasks.units import read_unit, split_unit

ROOT = Path(__file__).parents[2]
CASES = ROOT / "tests" / "data" / "reward_cases.jsonl"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("check_rewards")


@pytest.mark.parametrize("task", ["gsm8k", "math", "countdown", "sudoku"])
def test_completions_as_models_write_them_are_judged_right(
    task: str, tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(equality, "_SECONDS", 100)  # a busy machine is not to decide
    lines = [line for line in CASES.read_text().splitlines() if json.loads(line)["task"] == task]
    verdicts = [json.loads(line)["expect"] for line in lines]
    assert verdicts.count(True) > 10 and verdicts.count(False) > 10
    path = tmp_path / "cases.jsonl"
    path.write_text("\n".join(lines))
    failed = tool.main(["--cases", str(path)])
    out = capsys.readouterr().out
    assert not failed, out
    assert f"{task}: {len(lines)} of {len(lines)} cases as expected" in out


def test_a_wrong_verdict_and_a_refused_record_are_listed(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = {"task": "gsm8k", "record": {"question": "?", "answer": "3"}, "completion": "#### 4"}
    refused = {**case, "record": {"question": "?", "answer": "many"}, "expect": False}
    path = tmp_path / "cases.jsonl"
    cases = [{**case, "expect": False}, {**case, "expect": True}, refused]
    path.write_text("\n".join(map(json.dumps, cases)))
    assert tool.main(["--cases", str(path)]) == 1
    out = capsys.readouterr().out
    assert "cases.jsonl:2: gsm8k pays 0, but full reward is expected for '#### 4'" in out
    assert "cases.jsonl:3: gsm8k refuses the record ('answer' 'many' is no number" in out
    assert "gsm8k: 1 of 3 cases as expected" in out
    path.write_text(json.dumps({**case, "expect": "yes"}))
    with pytest.raises(UserError, match=r"cases\.jsonl:1: lacks 'task', 'completion' or 'expect'"):
        tool.main(["--cases", str(path)])


@pytest.mark.parametrize(
    ("task", "record"),
    [
        ("countdown", {"numbers": [3, 4], "target": 7, "solution": None, "style": None}),
        ("countdown", {"numbers": [3, 4], "target": 7, "input": None, "output": None}),
        ("countdown", {"numbers": None, "nums": [3, 4], "target": 7}),
        ("countdown", {"input": "3,4", "output": "7", "numbers": None, "target": None}),
        ("math", {"problem": "?", "answer": "3", "solution": None, "level": None}),
        ("math", {"problem": "?", "answer": None, "solution": "so \\boxed{3}"}),
        ("gsm8k", {"question": "?", "answer": "#### 3", "style": None}),
        ("sudoku", {"puzzle": "3102200002100320", "solution": "3142243142131324", "style": None}),
        ("code", {"question": None, "prompt": "?", "test_cases": None, "tests": ["assert f()"],
                  "test_setup_code": None, "entry_point": None}),
    ],
)  # fmt: skip
def test_null_in_a_field_is_a_field_that_is_absent(task: str, record: dict[str, object]) -> None:
    filled = {key: value for key, value in record.items() if value is not None}
    parse = BUILT_IN[task]._parse  # type: ignore[attr-defined]
    assert parse(record) == parse(filled)


@pytest.mark.parametrize(
    ("words", "same"),
    [
        ("cm", "centimeters"), ("sq. ft", "square feet"), ("cm^2", "square cm"), ("in", "inches"),
        ("mph", "miles per hour"), ("km/h", "kilometers per hour"), ("m^3", "cubic meters"),
        ("hr", "hours"), ("lbs", "pounds"), ("$", "dollars"), ("p.m.", "PM"), ("ml", "cm^3"),
    ],
)  # fmt: skip
def test_units_have_many_names(words: str, same: str) -> None:
    unit = read_unit(words)
    assert unit is not None and unit == read_unit(same)


def test_units_are_converted_exactly_and_unlike_ones_differ() -> None:
    inch, foot, meter = (read_unit(name) for name in ("inch", "foot", "meter"))
    assert inch and foot and meter and inch.powers == foot.powers == meter.powers
    assert foot.factor == 12 * inch.factor and inch.factor * 10_000 == 254
    assert read_unit("marbles") is None and read_unit("") is None and read_unit("per") is None
    for left, right in (("m", "m^2"), ("m", "s"), ("km/h", "km"), ("am", "pm")):
        assert read_unit(left).powers != read_unit(right).powers  # type: ignore[union-attr]
    assert split_unit("5 \\text{ cm}^2") == ("5", "cm^2") and split_unit("2x") == ("2x", "")
    assert split_unit("3 \\text{ or } 4") == ("3 \\text{ or } 4", "")


@pytest.mark.parametrize(
    ("text", "other"),
    [("2**3", "23"), ("3", "2 + 1 = 4"), ("x^2", "x^3"), ("1", "0.9999"), ("10", "1010_2 = 11")],
)
def test_what_only_looks_alike_is_not_equal(text: str, other: str) -> None:
    assert not equivalent(text, other) and not equivalent(other, text)
