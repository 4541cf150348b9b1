"""Runs from a Hugging Face folder: converted once, kept, and loaded in any layout."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

from megatron_espo.checkpoint.fingerprint import folder_fingerprint
from megatron_espo.checkpoint.tracker import has_checkpoint
from megatron_espo.conversion.hugging_face import resolve_folder
from megatron_espo.errors import UserError

# torchrun's variables would make the converter wait for other ranks.
_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_CONVERT = (
    "import sys\n"
    "from megatron_espo.conversion.convert import convert_to_megatron\n"
    "from megatron_espo.startup.setup import run_entry_point\n"
    "run_entry_point(lambda argv: convert_to_megatron(*argv))"
)


def default_cache() -> Path:
    """Where converted checkpoints are kept: ``$XDG_CACHE_HOME/megatron_espo`` or ~/.cache/..."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(root, "megatron_espo")


def converted_checkpoint(hf: str, cache: str | Path | None = None, lora: str | None = None) -> str:
    """Convert a Hugging Face model to a Megatron checkpoint, or find the one made before.

    Every rank may call this at once, before the ranks have met: the first one of a machine
    converts, the others wait for it. A checkpoint in torch_dist form loads into any layout, which
    reading the folder directly would not, without a second copy of Megatron's sharding rules.

    Args:
        hf: folder of the model, or its name on the hub.
        cache: where to keep checkpoints; None takes :func:`default_cache`.
        lora: PEFT adapter to merge, folder or name on the hub.

    Returns:
        A folder for ``--load``. It is named by the files of the model and the adapter: a folder
        that changes is converted anew.

    Raises:
        UserError: the converter's sentence.
    """
    source = resolve_folder(hf, "--hf")
    root = default_cache() if cache is None else Path(cache)
    folders = [source]
    if lora is not None:
        folders.append(resolve_folder(lora, "--lora", "adapter_config.json"))
    target = root / "-".join([source.resolve().name, *map(folder_fingerprint, folders)])
    root.mkdir(parents=True, exist_ok=True)
    with open(f"{target}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not has_checkpoint(str(target)):
            print(f"converting {hf} to {target} (once)", file=sys.stderr, flush=True)
            _convert(source, target, *folders[1:])
    return str(target)


def _convert(source: Path, target: Path, *adapter: Path) -> None:
    """Run the converter in a process of its own: it sets Megatron's global state."""
    environment = {name: value for name, value in os.environ.items() if name not in _RANKS}
    done = subprocess.run(
        [sys.executable, "-c", _CONVERT, str(source), str(target), *map(str, adapter)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.splitlines()
        said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        raise UserError(said[-1] if said else f"--hf {source}: {(lines or ['failed'])[-1]}")
