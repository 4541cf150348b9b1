"""``--help``: the project's flags and the first of Megatron's; ``--help-all``: every flag."""

import argparse
from collections.abc import Iterable
from functools import partial
from typing import Any

from megatron_espo.command_line import refuse
from megatron_espo.console import say

# What nearly every run names, of Megatron's several hundred flags.
_FIRST = """
    tokenizer_model data_path split seq_length train_iters micro_batch_size global_batch_size
    lr min_lr lr_decay_style lr_warmup_iters weight_decay clip_grad seed bf16
    load save save_interval pretrained_checkpoint use_checkpoint_args tensorboard_dir log_interval
    eval_interval eval_iters tensor_model_parallel_size pipeline_model_parallel_size
    context_parallel_size sequence_parallel use_distributed_optimizer recompute_granularity
""".split()
_METAVARS: dict[Any, str] = {int: "N", float: "R", str: "TEXT"}


class _HelpAll(argparse.Action):
    """Prints every flag and ends."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        say(argparse.ArgumentParser.format_help(parser).rstrip())
        parser.exit()


def arrange_help(parser: argparse.ArgumentParser, own: Iterable[Any]) -> None:
    """Let a parser of Megatron's show the project's flags, and refuse in one sentence.

    Args:
        parser: with all flags.
        own: the project's groups of flags.
    """
    groups = list(own)
    parser.add_argument(
        "--help-all", action=_HelpAll, nargs=0, help="every flag, Megatron's among them"
    )
    parser.usage = "%(prog)s [flags]"
    parser.error = partial(_refuse, parser)  # type: ignore[method-assign,assignment]
    parser.print_help = partial(_print_help, parser, groups)  # type: ignore[method-assign]


def _refuse(parser: argparse.ArgumentParser, message: str) -> None:
    refuse(message, parser._option_string_actions)


def _print_help(parser: argparse.ArgumentParser, groups: list[Any], file: object = None) -> None:
    formatter = argparse.HelpFormatter(parser.prog, max_help_position=38)
    formatter.add_usage(parser.usage, (), ())
    for group in groups:
        formatter.start_section(str(group.title).partition("\n")[0].rstrip("."))
        formatter.add_arguments([_brief(action) for action in group._group_actions])
        formatter.end_section()
    known = {action.dest: action for action in parser._actions}
    formatter.start_section("Megatron's flags that most runs name; --help-all lists all of them")
    formatter.add_arguments([_brief(known[name]) for name in _FIRST])
    formatter.end_section()
    say(formatter.format_help().rstrip())


def _brief(action: argparse.Action) -> argparse.Action:
    """A flag with the first sentence of its text and its default."""
    text = " ".join((action.help or "").split())
    first = text.partition(". ")[0].rstrip(".")
    default = action.default
    if default not in (None, False, argparse.SUPPRESS) and "%(default)s" not in first:
        first += f" ({default})".replace("%", "%%")
    return argparse.Action(
        action.option_strings[:1] if len(action.option_strings) > 2 else action.option_strings,
        action.dest,
        action.nargs,
        choices=action.choices,
        help=first,
        metavar=action.metavar or (None if action.choices else _METAVARS.get(action.type)),
    )
