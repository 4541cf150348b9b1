"""How a training starts: planned or for real, with its log."""

import argparse
from collections.abc import Callable, Sequence

from megatron_espo.console import captured
from megatron_espo.dry_run.command import dry_run
from megatron_espo.dry_run.planned import is_dry_run
from megatron_espo.monitor.training_lines import training_line
from megatron_espo.startup.arguments import initialize_arguments
from megatron_espo.startup.setup import keep_log


def start(
    argv: Sequence[str],
    module: str,
    prepare: Callable[[argparse.Namespace], None],
    run: Callable[[argparse.Namespace], None],
) -> None:
    """Read a training's command line, and plan it or run it.

    Args:
        argv: flags.
        module: name of the entry point.
        prepare: checks and completes the arguments before Megatron does.
        run: gets Megatron's arguments, checked, and trains.

    Raises:
        UserError: naming the flag or the file.
    """
    if is_dry_run(argv):
        dry_run(argv, prepare, module)
        return
    with captured(training_line) as output:
        args = initialize_arguments(argv, prepare)
        keep_log(output, args, argv)
        run(args)
