"""Command lines that cannot be read name the nearest flag; help is short and ours comes first."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_espo.command_line import Parser, nearest
from megatron_espo.errors import UserError
from megatron_espo.startup.arguments import initialize_arguments
from megatron_espo.training import espo


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--tokeniser-model x", "--tokeniser-model is no flag; did you mean --tokenizer-model?"),
        ("--espo_group_size 4", "--espo_group_size is no flag; did you mean --espo-group-size?"),
        ("--rollout-temprature=0", "is no flag; did you mean --rollout-temperature?"),
        ("--zzzz", "--zzzz is no flag; --help lists the flags."),
        ("--lr fast", "Argument --lr: invalid float value: 'fast'; --help lists the flags."),
        ("--lr", "Argument --lr: expected one argument; --help lists the flags."),
        ("--espo-gradient three", "Argument --espo-gradient: invalid choice: 'three'"),
        ("word --lr 1", "word belongs to no flag; --help lists the flags."),
    ],
)
def test_what_cannot_be_read_is_one_sentence_with_the_nearest_flag(argv: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        initialize_arguments(argv.split(), espo.prepare_arguments)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_tools_parser_says_the_same_and_takes_no_abbreviations() -> None:
    parser = Parser()
    parser.add_argument("--output-prefix", required=True)
    with pytest.raises(UserError, match="--outptu-prefix is no flag; did you mean --output-prefix"):
        parser.parse_args(["--output-prefix", "x", "--outptu-prefix", "y"])
    with pytest.raises(UserError, match="required: --output-prefix"):
        parser.parse_args(["--output", "x"])
    assert nearest("--quite-something-else", ["--lr"]) is None


def shown(flag: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        initialize_arguments([flag], espo.prepare_arguments)
    assert end.value.code in (None, 0)
    return capsys.readouterr().out


def test_help_is_short_and_the_projects_flags_come_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = shown("--help", capsys)
    flags = re.findall(r"^  (--[a-z0-9-]+)", text, re.MULTILINE)
    assert text.count("\n") < 290 and len(flags) == len(set(flags)) > 80
    assert flags[0] == "--recipe" and "--help-all" in text
    assert flags.index("--espo-task") < flags.index("--lr") < flags.index("--bf16")
    assert "--moe-router-topk" not in flags
    everything = shown("--help-all", capsys)
    assert set(flags) <= set(re.findall(r"--[a-z0-9-]+", everything))
    assert "--moe-router-topk" in everything and everything.count("\n") > 2000


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("", "--lr is missing"),
        ("--lr -1", "--lr -1.0 must be a positive number"),
        ("--lr nan", "--lr nan must be a positive number"),
        ("--lr 1e-5 --min-lr 1e-4", "--min-lr 0.0001 must lie between 0 and --lr 1e-05"),
    ],
)
def test_a_learning_rate_is_asked_for(flags: str, said: str, tokenizer: str) -> None:
    argv = f"--preset tiny --seq-length 300 --espo-train-data x --tokenizer-model {tokenizer}"
    with pytest.raises(UserError, match=re.escape(said)):
        initialize_arguments([*argv.split(), *flags.split()], espo.prepare_arguments)


TOOL = """
import argparse, sys
from megatron_espo.command_line import run_tool
from megatron_espo.errors import UserError
def main(argv):
    if argv == ["mistake"]: raise UserError("--x 1: use 2.")
    if argv == ["file"]: open("/nowhere/at/all")
    if argv == ["many"]: print("line\\n" * 100000)
    if argv == ["status"]: return 3
    if argv == ["fault"]: raise OSError("no file's")
run_tool(main)
"""


@pytest.mark.parametrize(
    ("argument", "status", "said"),
    [
        ("mistake", 2, "error: --x 1: use 2.\n"),
        ("file", 2, "error: /nowhere/at/all: No such file or directory.\n"),
        ("status", 3, ""),
        ("well", 0, ""),
        ("fault", 1, "OSError: no file's\n"),
    ],
)
def test_a_tool_ends_with_a_sentence_and_a_status(
    argument: str, status: int, said: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", TOOL, argument]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == status and done.stderr.endswith(said)
    assert argument == "fault" or done.stderr == said


def test_a_tool_whose_reader_has_left_ends_quietly() -> None:
    script = f"{sys.executable} -c {shlex.quote(TOOL)} many | head -1"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "line\n" and done.stderr == ""
