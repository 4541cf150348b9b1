"""Whether this machine's PyTorch can simulate GPUs."""

import importlib.util
import platform
import re
import sys
from pathlib import Path

import torch

from megatron_espo.errors import UserError

SEEN_WITH = "2.15"
# Where `make te` puts Transformer Engine's Python layer.
FOLDER = Path(sys.prefix) / "transformer_engine_python"
_HOOKS = "include/ATen/detail/AcceleratorHooksInterface.h"


def check() -> str | None:
    """Say in one sentence why this machine's PyTorch cannot simulate GPUs, or None."""
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        return (
            "--simulate runs on Linux on x86-64; this machine is "
            f"{platform.system()} on {platform.machine()}."
        )
    if torch.version.cuda is None:
        return "--simulate needs a build of PyTorch for CUDA (no GPU); this one is for CPUs."
    try:
        primary_context_slot()
    except (OSError, ValueError) as error:
        return f"--simulate was made for PyTorch {SEEN_WITH}; {torch.__version__} differs: {error}"
    return None


def primary_context_slot() -> int:
    """Find the place of ``hasPrimaryContext`` among the virtual functions of the CUDA hooks."""
    header = Path(torch.__file__).parent / _HOOKS
    place = 0
    for line in header.read_text("utf-8").splitlines():
        if re.match(r"\s*//", line) or "virtual " not in line:
            continue
        if "hasPrimaryContext" in line:
            return place
        place += 2 if "~" in line else 1  # a destructor has two
    raise UserError(f"{header} names no hasPrimaryContext")


def transformer_engine_folder() -> Path | None:
    """Return the folder that holds the package ``transformer_engine``, or None."""
    if (FOLDER / "transformer_engine" / "pytorch").is_dir():
        return FOLDER
    found = importlib.util.find_spec("transformer_engine")
    places = list(found.submodule_search_locations or ()) if found is not None else []
    return next((Path(p).parent for p in places if (Path(p) / "pytorch").is_dir()), None)
