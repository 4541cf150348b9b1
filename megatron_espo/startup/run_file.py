"""``SAVE/run.json``: what a run was started with, for people and for scripts."""

import argparse
import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

RUN_FILE = "run.json"

_PACKAGES = ("megatron-espo", "torch", "megatron-core", "transformer-engine", "transformers")


def write_run_file(args: argparse.Namespace) -> None:
    """Write the command, the versions and every effective setting of the latest start.

    Args:
        args: Megatron's arguments, complete; ``save`` is a folder.

    Raises:
        OSError: The file cannot be written.
    """
    known = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": [*sys.orig_argv[:1], *sys.argv],
        "world_size": args.world_size,
        "versions": _versions(),
        "settings": {name: _plain(value) for name, value in sorted(vars(args).items())},
    }
    path = Path(args.save, RUN_FILE)
    partial = path.with_name(f".{RUN_FILE}.{os.getpid()}")
    partial.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def _versions() -> dict[str, str | None]:
    """Return the versions of what decides what a run computes; None where it is not installed."""
    found: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _plain(value: Any) -> Any:
    """Make a value one of JSON's."""
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {str(name): _plain(one) for name, one in value.items()}
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
