"""The command by its names, from a checkout and from an installed wheel."""

import importlib
import json
import os
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from interpreter import python

from megatron_espo.__main__ import COMMANDS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


# Runs commands of the wheel in a folder, each in a fork.
FROM_A_WHEEL = """
import json, os, sys
import megatron_espo, megatron_espo.__main__ as program
import megatron_espo.commands.generate, megatron_espo.conversion.convert
assert megatron_espo.__file__.startswith(sys.argv[1]), megatron_espo.__file__
for words in json.loads(sys.argv[2]):
    process = os.fork()
    if process == 0:
        sys.argv = ["megatron-espo", *words]
        status = 0
        try:
            program.main()
        except SystemExit as end:
            status = end.code or 0
        sys.stdout.flush()
        os._exit(status)
    _, status = os.waitpid(process, 0)
    if status:
        sys.exit(f"{words} ended with {os.waitstatus_to_exitcode(status)}")
"""


def call(*words: str, status: int = 0) -> str:
    done = subprocess.run(
        [python(), "-m", "megatron_espo", *words], env=ENVIRONMENT, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300,
    )  # fmt: skip
    assert done.returncode == status, done.stdout[-3000:]
    return done.stdout


def test_the_list_of_commands_is_whole() -> None:
    printed = call("--help")
    for name, command in COMMANDS.items():
        assert f"  {name} " in printed and command.what in printed
        assert callable(importlib.import_module(f"megatron_espo.{command.module}").main)
    assert call(status=2) == printed


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_list_their_flags(name: str) -> None:
    printed = call(name, "--help")
    assert "usage: " in printed and "--help" in printed and "Traceback" not in printed


def test_tools_of_a_checkout_are_the_commands() -> None:
    for tool in sorted((ROOT / "tools").glob("*.py")):
        text = tool.read_text()
        if "import main\n" in text:
            module = text.split("from megatron_espo.commands.")[1].split()[0]
            assert f"commands.{module}" in {command.module for command in COMMANDS.values()}, tool


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["evalute"], "evalute is no command; did you mean evaluate?"),
        (["xyzzy"], "xyzzy is no command; megatron-espo --help lists them."),
        (["plan"], "plan: say what to plan, pretrain, sft, espo"),
        (["plan", "generate"], "plan: say what to plan"),
        (["sft", "--lr", "1"], "sft: --sft-train-data is missing"),
        (["convert", "to-mega"], "invalid choice: 'to-mega'"),
    ],
)
def test_what_is_no_command_is_said_in_a_sentence(words: list[str], said: str) -> None:
    printed = call(*words, status=2)
    assert said in printed and "Traceback" not in printed


def test_an_installed_wheel_has_its_recipes_and_leads_to_a_first_result(tmp_path: Path) -> None:
    """In a folder that holds nothing of the checkout."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    copy = tmp_path / "source"
    names = ["megatron_espo", "pyproject.toml", "setup.py", "README.md", "LICENSE"]
    copy.mkdir()
    for name in names:
        # Building writes beside the sources.
        subprocess.run(["cp", "-r", str(ROOT / name), str(copy / name)], check=True)
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(copy)],
        check=True, timeout=300,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    recipes = {
        f"megatron_espo/recipes/{p.name}" for p in ROOT.glob("megatron_espo/recipes/*.flags")
    }
    assert len(recipes) > 9 and recipes | {"megatron_espo/py.typed"} <= inside
    assert not [name for name in inside if name.startswith(("tests", "tools", "benchmarks"))]
    site = tmp_path / "site"
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)],
        check=True, timeout=300,
    )  # fmt: skip
    program = site / "bin" / "megatron-espo"
    assert program.exists()
    # The first steps of docs/first_steps.md, as written there; its imports are made once.
    page = (ROOT / "docs/first_steps.md").read_text()
    lines = page.split("## From a wheel")[1].split("```")[1].splitlines()
    steps = [shlex.split(line)[1:] for line in lines if "bin/megatron-espo " in line]
    assert [words[0] for words in steps] == [
        "plan", "make-random-model", "convert", "generate", "prepare",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", FROM_A_WHEEL, str(site), json.dumps(steps)], cwd=tmp_path,
        text=True, check=False, env={**ENVIRONMENT, "PYTHONPATH": str(site)},
        capture_output=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0 and "8 GPUs" in done.stdout, done.stdout + done.stderr
    assert (tmp_path / "checkpoint/latest_checkpointed_iteration.txt").exists()
    assert len((tmp_path / "data/train.jsonl").read_text().splitlines()) == 100
