"""What planning and simulating share: the size of the run, and quiet while Megatron checks it."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, get_args

from megatron_espo.errors import UserError
from megatron_espo.recipes import expand_recipes, last_value

EntryPoint = Literal["espo", "dpo", "pretrain", "evaluate", "generate"]


def entry_point(module: str) -> EntryPoint:
    """Say which of the entry points that can be planned a module is.

    Args:
        module: its full name.

    Raises:
        ValueError: none of them.
    """
    name = module.rpartition(".")[2]
    for known in get_args(EntryPoint):
        if name == known:
            return known
    raise ValueError(f"{module} is no entry point that can be planned")


def is_dry_run(argv: Sequence[str]) -> bool:
    """Whether the command line, recipes included, asks for a dry run.

    Raises:
        UserError: a recipe does not exist.
    """
    return "--dry-run" in expand_recipes(argv)


def planned_world_size(flags: Sequence[str], environment: Mapping[str, str]) -> int:
    """How many GPUs to plan for.

    Args:
        flags: the command line with recipes expanded.
        environment: WORLD_SIZE as torchrun sets it; NNODES and GPUS_PER_NODE as for launch.sh.

    Returns:
        --dry-run-world-size; else the ranks that torchrun has started, where it was told a number;
        else NNODES (1) x GPUS_PER_NODE (8).

    Raises:
        UserError: a value is no number.
    """
    given = last_value(flags, "--dry-run-world-size")
    if given is not None:
        if not given.isdigit():
            raise UserError(f"--dry-run-world-size {given} is no number of GPUs.")
        return int(given)
    if environment.get("WORLD_SIZE", "1") != "1":
        return positive_number(environment, "WORLD_SIZE", 1)
    return positive_number(environment, "NNODES", 1) * positive_number(
        environment, "GPUS_PER_NODE", 8
    )


def positive_number(environment: Mapping[str, str], name: str, default: int) -> int:
    """Read a positive number from the environment.

    Args:
        environment: the process's.
        name: of the variable.
        default: where it is not set.

    Raises:
        UserError: it is something else.
    """
    value = environment.get(name) or str(default)
    if not value.isdigit() or int(value) < 1:
        raise UserError(f"the environment's {name} is {value!r}; set a positive number.")
    return int(value)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Megatron's list of arguments and its notes from the plan."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(nowhere),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
