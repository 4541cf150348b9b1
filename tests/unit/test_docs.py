"""Every bash and Python block of README.md and docs/*.md: run, parsed, or listed with a reason."""

import argparse
import ast
import importlib
import os
import re
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from interpreter import python
from tool_loading import load_tool

from megatron_espo.__main__ import COMMANDS, _resolve
from megatron_espo.commands import inference
from megatron_espo.commands.launch import complete_flags
from megatron_espo.commands.make_random_model import PUBLISHED, tiny
from megatron_espo.conversion.convert import convert_to_megatron
from megatron_espo.conversion.families import FAMILIES
from megatron_espo.conversion.random_model import write_random_model
from megatron_espo.data.tokenizer import byte_tokenizer, save_tokenizer
from megatron_espo.startup.setup import start_anew

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# What stands in the documents, and what the tests put in its place.
SUBSTITUTIONS = {"GSAI-ML/LLaDA-8B-Instruct": "tiny-llada", "TOKENIZER": "tokenizer"}
# Names that a command may read: all are tiny. What a block writes itself is not there before.
MODELS = ("checkpoints/llada-8b", "runs/espo", "runs/own-model", "runs/random-llada")

# Commands that are not run and have no flags of ours, by their beginning.
LISTED = {
    r"make test-gpu": "needs a GPU",
    r"make (demo|test|setup|te\b)": "minutes; CI and tests/unit/test_demo.py run what they call",
    r"git clone|cd megatron_espo": "the reader's copy of this project",
    r"\S*pip install|\S*pip wheel": "downloads; test_commands.py builds and installs the wheel",
    r"python3\.12 -m venv": "the reader's environment",
    r"\S*jupyter": "opens a browser; test_notebooks.py runs the notebook",
    r"docker": "needs Docker and a GPU",
    r"export ": "settings of torchrun alone",
    r"examples/pretrain_tiny\.sh": "minutes; test_demo.py runs it at its smallest",
}
# Commands that run here, by a part of them. Others of ours have their flags parsed.
RUN = (
    "python -m megatron_espo.doctor",
    "examples/run_espo_8b.sh --dry-run --recipe countdown ",
    "convert_hf.py to-megatron --hf GSAI-ML",
    "convert_hf.py to-hf --megatron runs/espo",
    "convert_hf.py to-hf --megatron runs/own-model",
    "generate.py --load checkpoints/llada-8b",
    "generate.py --load runs/espo",
    "make_random_model.py llada --out",
    "make_tokenizer.py",
    "preprocess_data.py",
    "megatron-espo ",
)
# A doctor finds what is missing on a machine without a GPU.
STATUS = {"python -m megatron_espo.doctor": (0, 1)}
# Python blocks that are not run, by their page and a part of them.
LISTED_PYTHON = {
    ("api.md", ""): "signatures",
    ("python.md", "lm_eval.simple_evaluate"): "downloads tasks; test_harness.py runs local ones",
}
# Said after a block has run: what it defines must work.
AFTERWARDS = {
    'name = "echo"': 'assert score(Example("", {"text": "a"}), "a").correct',
    "def generate(count, seed, split)": 'assert len(generate(5, 0, "train")) == 5',
}


class Block(NamedTuple):
    page: str
    line: int
    text: str


def blocks(language: str, pages: Sequence[Path] = PAGES) -> Iterator[Block]:
    for page in pages:
        text = page.read_text("utf-8")
        for found in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.M | re.S):
            yield Block(page.name, text[: found.start()].count("\n") + 2, found[1])


def commands(block: Block) -> list[str]:
    """Cut a block into commands, each in a line without its comment."""
    found = []
    for line in re.sub(r"\\\n\s*", "", block.text).splitlines():
        line = re.sub(r"(^|\s)# .*", "", line).strip()
        if line:
            found.append(line)
    return found


BASH = list(blocks("bash"))
COMMAND_LINES = {
    command: f"{block.page}:{block.line}" for block in BASH for command in commands(block)
}


def reason(command: str) -> str | None:
    return next((why for part, why in LISTED.items() if re.match(part, command)), None)


def is_run(command: str) -> bool:
    return reason(command) is None and any(part in f"{command} " for part in RUN)


def entry_of(command: str) -> tuple[str, list[str]]:
    """Find what a command starts: the name of a command or script of ours, and its flags."""
    # A value that another program prints; what the reader is to fill in.
    plain = re.sub(r"\$\(.*\)", "12", command.partition("|")[2] or command).partition(" > ")[0]
    words = shlex.split(plain)
    words = words[:-1] if words[-1] == "..." else words
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    starts = [
        i for i, word in enumerate(words)
        if re.fullmatch(r"(\S*/)?megatron-espo|(megatron_espo|benchmarks)\.\S+", word)
        or re.fullmatch(r"(tools/\S+\.py|examples/\S+\.(sh|sbatch))", word)
    ]  # fmt: skip
    assert starts, f"{command}: is no command of this project; list it with its reason"
    name, flags = words[starts[0]], words[starts[0] + 1 :]
    if name.endswith("megatron-espo"):
        return f"command {flags[0]}", flags[1:]
    return name, flags


def run_entry(name: str, flags: list[str]) -> None:
    """Call what a name stands for, as its program does."""
    if name.startswith("command "):
        resolved, flags = _resolve([name.removeprefix("command "), *flags])
        module = importlib.import_module(f"megatron_espo.{COMMANDS[resolved].module}")
    elif name.startswith("examples/"):
        script = ROOT / name
        if script.suffix == ".sbatch":
            script = ROOT / "examples/run_espo_8b.sh"
        start = re.search(r'start\(.*?"(\w+)", (\[.*?\]|\(.*?\))\)', script.read_text(), re.S)
        assert start, f"{script} starts no training"
        module = importlib.import_module(f"megatron_espo.training.{start[1]}")
        flags = complete_flags(ast.literal_eval(start[2]), flags)
    elif name.startswith("tools/"):
        module = load_tool(Path(name).stem)
    else:
        module = importlib.import_module(name)
    module.main(flags)


class Parsed(Exception):
    """The command line has been parsed."""


@pytest.fixture
def parse_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parsers do their work, and nothing comes after it, or from the hub before it."""
    whole = argparse.ArgumentParser.parse_args

    def parse(self: argparse.ArgumentParser, *given: object, **more: object) -> None:
        whole(self, *given, **more)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(inference, "converted_checkpoint", lambda *_: "converted")


@pytest.mark.parametrize(
    "command", [c for c in COMMAND_LINES if reason(c) is None and not is_run(c)]
)
def test_flags_are_those_of_the_command(
    command: str, parse_only: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    name, flags = entry_of(command)
    try:
        run_entry(name, flags)
    except Parsed:
        return
    pytest.fail(f"{COMMAND_LINES[command]}: {command} was not parsed")


def test_a_flag_that_there_is_not_is_found(parse_only: None) -> None:
    for command in (
        "python tools/convert_hf.py to-megatron --hf x --out y --outt z",
        "torchrun --nproc-per-node 8 -m megatron_espo.training.espo --espo-no-such 1",
        "examples/run_espo_8b.sh --recipe no-such",
        "megatron-espo evalute",
    ):
        with pytest.raises(ValueError, match=r"outt|espo-no-such|no-such|evalute"):
            run_entry(*entry_of(command))


def test_what_is_listed_is_in_the_documents() -> None:
    """A table that has lost its command says so."""
    for part in LISTED:
        assert any(re.match(part, command) for command in COMMAND_LINES), part
    for part in RUN:
        assert any(part in f"{command} " for command in COMMAND_LINES), part
    python_blocks = list(blocks("python"))
    for page, part in LISTED_PYTHON:
        assert any(b.page == page and part in b.text for b in python_blocks), (page, part)
    for part in AFTERWARDS:
        assert any(part in block.text for block in python_blocks), part
    assert len(COMMAND_LINES) > 60 and len(python_blocks) > 30


@pytest.fixture(scope="module")
def prepared(one_rank: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands read: tiny models by the documents' names, a tokenizer, a text."""
    folder = tmp_path_factory.mktemp("prepared")
    tokenizer = byte_tokenizer()
    save_tokenizer(tokenizer, folder / "tokenizer")
    write_random_model(
        folder / "tiny-llada", FAMILIES["llada"], tiny(PUBLISHED["llada"]), torch.float32,
        tokenizer, std=0.2,
    )  # fmt: skip
    converted = folder / MODELS[0]
    converted.parent.mkdir()
    convert_to_megatron(str(folder / "tiny-llada"), str(converted))
    start_anew()
    (folder / "runs").mkdir()
    for name in MODELS[1:]:
        (folder / name).symlink_to(converted if name != MODELS[3] else folder / "tiny-llada")
    (folder / "corpus").mkdir()
    (folder / "corpus/text.txt").write_text("Masked diffusion fills in what is masked.\n" * 20)
    (folder / "prompts.txt").write_text("Once\nThere was\n")
    for name in ("tools", "examples", "tests"):
        (folder / name).symlink_to(ROOT / name)
    programs = folder / ".venv/bin"
    programs.mkdir(parents=True)
    for name, words in (("python", ""), ("megatron-espo", "-m megatron_espo ")):
        (programs / name).write_text(f'#!/bin/sh\nexec {python()} {words}"$@"\n')
        (programs / name).chmod(0o755)
    return folder


def reader_folder(prepared: Path, folder: Path, text: str) -> None:
    """Lay out what a block may read; what it writes is not there yet."""
    written = {Path(out).parts for out in re.findall(r"--(?:out|save) (\S+)", text)}
    for name in (
        *MODELS, "tokenizer", "tiny-llada", "corpus", "prompts.txt", "tools", "examples", "tests",
        ".venv",
    ):  # fmt: skip
        if Path(name).parts not in written:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to((prepared / name).resolve())
    for block in blocks("python"):
        if block.page == "first_steps.md" and 'name = "sums"' in block.text:
            (folder / "sums.py").write_text(block.text)


def substituted(text: str) -> str:
    for name, value in SUBSTITUTIONS.items():
        text = re.sub(rf"\b{name}\b", value, text)
    return text


_done: set[str] = set()


@pytest.mark.parametrize(
    "block",
    [block for block in BASH if any(map(is_run, commands(block)))],
    ids=lambda block: f"{block.page}:{block.line}",
)
def test_commands_run_as_written(block: Block, prepared: Path, tmp_path: Path) -> None:
    text = substituted(block.text)
    reader_folder(prepared, tmp_path, text)
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "PYTHON": python(), "OMP_NUM_THREADS": "1",
        "HOME": str(prepared), "PATH": f"{tmp_path}/.venv/bin:{os.environ['PATH']}",
    }  # fmt: skip
    # Of several pages that show the same one, it runs in the first.
    for command in filter(is_run, commands(block)):
        if command in _done and block.page != "first_steps.md":
            continue
        _done.add(command)
        done = subprocess.run(
            ["bash", "-c", substituted(command)], cwd=tmp_path, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=500, check=False,
        )  # fmt: skip
        assert done.returncode in STATUS.get(command, (0,)), f"{command}\n{done.stdout[-3000:]}"
        assert "Traceback" not in done.stdout, done.stdout[-3000:]


@pytest.mark.parametrize(
    "block", list(blocks("python")), ids=lambda block: f"{block.page}:{block.line}"
)
def test_python_runs_as_written(
    block: Block, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if any(block.page == page and part in block.text for page, part in LISTED_PYTHON):
        return
    reader_folder(prepared, tmp_path, "")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(prepared))  # converted once
    names: dict[str, object] = {}
    where = f"{block.page}, line {block.line}"
    exec(compile(substituted(block.text), where, "exec"), names)
    for part, then in AFTERWARDS.items():
        if part in block.text:
            exec(then, names)
    start_anew()


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    heads = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.M)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", head).strip().lower() for head in heads]
    return {re.sub(r"[^\w\- ]", "", head).replace(" ", "-") for head in plain}


def test_links_lead_somewhere() -> None:
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "findings/README.md"):
        text = page.read_text("utf-8")
        for link in re.findall(r'\]\(([^)\s]+)\)|src="([^"]+)"', text):
            path, _, anchor = "".join(link).partition("#")
            target = page.parent / path if path else page
            if path.startswith("http"):
                continue
            assert target.exists(), f"{page.name}: {path}"
            assert not anchor or anchor in anchors(target), f"{page.name}: {path}#{anchor}"


def test_newcomers_need_ten_commands_at_most() -> None:
    ways = [b for b in BASH if b.page == "first_steps.md"]
    assert len(ways) == 3
    assert all(len(commands(way)) <= 10 for way in ways)
