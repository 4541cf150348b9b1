"""Which base a run of the comparison started from, and that runs which are compared share it.

Machines round differently: a base that was fine-tuned with the same seed on two of them is two
bases, and their accuracies differ (sudoku's seed 1: 18.6 and 17.6%). A result therefore holds a
digest of the weights it started from and the processor that made them.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import machine
from megatron_espo.checkpoint.compare import checkpoint_tensors
from megatron_espo.errors import UserError

_RECORD = "made.json"


def weights_digest(root: Path) -> str:
    """Digest a checkpoint's weights: names, types, shapes and every bit, in any layout.

    Args:
        root: a --save folder.

    Returns:
        32 hexadecimal digits. The optimizer's state does not count.

    Raises:
        UserError: there is no checkpoint.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(checkpoint_tensors(str(root)).items()):
        if not name.lstrip("/").startswith("optimizer"):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def record_base(base: Path) -> None:
    """Note beside a base that was trained just now what it is and which processor made it."""
    made = {"weights": weights_digest(base / "base"), "cpu": machine()["cpu"]}
    (base / _RECORD).write_text(json.dumps(made) + "\n")


def base_record(base: Path) -> dict[str, Any]:
    """Say what a result keeps of its base.

    Returns:
        ``weights``: their digest; ``cpu``: of the machine that trained them, None where the folder
        has no record of just these weights.
    """
    weights, path = weights_digest(base / "base"), base / _RECORD
    made = json.loads(path.read_text()) if path.exists() else {}
    return {"weights": weights, "cpu": made["cpu"] if made.get("weights") == weights else None}


def same_base(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two results started from the same weights.

    Results from before there were digests are known by the base's accuracy on the test split.
    """
    if "base" in one and "base" in other:
        return bool(one["base"]["weights"] == other["base"]["weights"])
    return bool(one["test"][0] == other["test"][0])


def check_bases(results: Iterable[dict[str, Any]]) -> None:
    """Refuse results of one seed that started from different bases.

    Raises:
        UserError: there are such; it names one of each base.
    """
    first: dict[int, dict[str, Any]] = {}
    for result in results:
        known = first.setdefault(result["run"]["seed"], result)
        if not same_base(known, result):
            raise UserError(
                f"Seed {result['run']['seed']}: {_text(known)} and {_text(result)} started from "
                "different bases, and their difference would be that of the bases. Remove one of "
                "the two, or keep them in other --results."
            )


def results_of_seed(folder: Path, task: str, seed: int) -> list[dict[str, Any]]:
    """Read the results of a seed that are there, of any objective and rate."""
    return [json.loads(p.read_text()) for p in sorted(folder.glob(f"{task}-*-{seed}.json"))]


def made_elsewhere(known: Sequence[dict[str, Any]]) -> bool:
    """Whether another processor than this machine's made the base of these results.

    A base that is trained here would then be another one. Of a base without a record the processor
    of its runs is taken.
    """
    made = {(r.get("base") or {}).get("cpu") or r["machine"]["cpu"] for r in known}
    return bool(made) and machine()["cpu"] not in made


def _text(result: dict[str, Any]) -> str:
    run, base = result["run"], result.get("base")
    text = base["weights"][:8] if base else f"{100 * result['test'][0]:.1f}% on the test split"
    return f"{run['objective']} at {run['rate']:g} ({text})"
