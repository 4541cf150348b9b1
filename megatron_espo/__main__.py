"""The command ``megatron-espo``: all entry points and tools by name.

``megatron-espo NAME`` and ``python -m megatron_espo NAME`` are one. Several ranks:
``torchrun --nproc-per-node 8 --no-python megatron-espo espo ...``.
"""

import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from megatron_espo.command_line import nearest, run_tool
from megatron_espo.errors import UserError
from megatron_espo.recipes import expand_recipes, last_value


class Command(NamedTuple):
    """One of the commands.

    Attributes:
        module: has its ``main``, which gets the flags.
        what: it does.
        is_job: whether it is a job of ranks with process groups to end; else a tool.
    """

    module: str
    what: str
    is_job: bool = False


TRAININGS = ("pretrain", "sft", "espo", "dpo")
COMMANDS = {
    "pretrain": Command("training.pretrain", "pre-train on .bin/.idx data", True),
    "sft": Command("training.pretrain", "fine-tune on prompts and completions", True),
    "espo": Command("training.espo", "reinforcement learning with ESPO", True),
    "dpo": Command("training.dpo", "preference optimization on pairs of completions", True),
    "evaluate": Command("commands.evaluate", "accuracy and reward of a model on a task", True),
    "generate": Command("commands.generate", "complete prompts, or chat", True),
    "convert": Command("commands.convert", "Hugging Face and PEFT folders, both ways", True),
    "prepare": Command("commands.prepare_data", "data of a task"),
    "preprocess": Command("commands.preprocess", "text to .bin/.idx data"),
    "plot": Command("commands.plot", "curves of runs"),
    "make-tokenizer": Command("commands.make_tokenizer", "of bytes, or trained on text"),
    "make-random-model": Command("commands.make_random_model", "for trying things out", True),
    "doctor": Command("doctor", "what this machine has and lacks"),
}


def main() -> None:
    """Run the command that the command line names."""
    argv = sys.argv[1:]
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        sys.exit(0 if argv else 2)
    try:
        name, rest = _resolve(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    command, sys.argv = COMMANDS[name], [f"megatron-espo {name}", *rest]
    run = importlib.import_module(f"megatron_espo.{command.module}").main
    if not command.is_job:
        run_tool(run)
    # What starts a job imports Megatron: not for tools.
    from megatron_espo.startup.setup import run_entry_point

    run_entry_point(run)


def _resolve(argv: Sequence[str]) -> tuple[str, list[str]]:
    """Find the command that is meant, and its flags.

    Raises:
        UserError: there is none of that name, or it lacks what makes it that command.
    """
    name, *rest = argv
    if name == "plan":
        if not rest or rest[0] not in TRAININGS:
            raise UserError(f"plan: say what to plan, {', '.join(TRAININGS)}, and its flags.")
        name, rest = rest[0], [*rest[1:], "--dry-run"]
    if name not in COMMANDS:
        guess = nearest(name, [*COMMANDS, "plan"])
        said = f"did you mean {guess}?" if guess else "megatron-espo --help lists them."
        raise UserError(f"{name} is no command; {said}")
    is_help = {"-h", "--help", "--help-all"}.intersection(rest)
    if name == "sft" and not is_help and not last_value(expand_recipes(rest), "--sft-train-data"):
        raise UserError("sft: --sft-train-data is missing: prompts and completions as JSONL.")
    return name, rest


def _overview() -> str:
    """List the commands."""
    lines = [f"  {name:18}{command.what}" for name, command in COMMANDS.items()]
    plan = (
        f"  {'plan NAME':18}memory and layout of {', '.join(TRAININGS)} on GPUs, before they start"
    )
    return "\n".join([
        "usage: megatron-espo COMMAND [FLAGS]; megatron-espo COMMAND --help lists its flags",
        *lines,
        plan,
        "several ranks: torchrun --nproc-per-node N --no-python megatron-espo COMMAND [FLAGS]",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
