"""Published data sets as files of a task: found on disk or downloaded, checked, split, written."""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_espo.errors import UserError
from megatron_espo.tasks.base import SPLITS, Example, read_jsonl, read_parquet, split_of

HUB = {
    "gsm8k": "openai/gsm8k",
    "math": "ankner/math-500",
    "countdown": "Jiayi-Pan/Countdown-Tasks-3to4",
    "code": "TIGER-Lab/AceCode-87K",
}
"""Where d1 and ESPO take a task's problems from, on the Hugging Face hub."""
_SUFFIXES = (".jsonl", ".parquet")


def find_files(source: str, say: Callable[[str], None]) -> list[Path]:
    """Find the files of a source.

    Args:
        source: a file, a folder, or the id of a data set on the hub ("owner/name"), which is
            downloaded, or taken from the cache where the hub cannot be reached.
        say: takes a line for the user.

    Returns:
        JSONL and parquet files, in the order of their names.

    Raises:
        UserError: there is nothing of the kind.
    """
    path = Path(source)
    if path.is_file():
        return [path]
    if not path.is_dir():
        path = _download(source, say)
    files = sorted(p for p in path.rglob("*") if p.suffix in _SUFFIXES)
    if not files:
        raise UserError(f"--source {source}: holds no .jsonl or .parquet file; give another")
    return files


def _download(source: str, say: Callable[[str], None]) -> Path:
    if source.count("/") != 1 or source.startswith((".", "/")):
        raise UserError(f"--source {source}: no such file or folder, and no owner/name of the hub")
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError as error:
        raise UserError(
            f"--source {source}: a download needs huggingface_hub; install the extra [data]"
        ) from error
    patterns = [f"*{suffix}" for suffix in _SUFFIXES]
    try:
        return Path(snapshot_download(source, repo_type="dataset", allow_patterns=patterns))
    except Exception as error:  # the hub's client and its transports have many
        reason = next(iter(str(error).splitlines()), type(error).__name__)
    try:
        found = snapshot_download(
            source, repo_type="dataset", allow_patterns=patterns, local_files_only=True
        )
    except Exception as error:
        raise UserError(
            f"--source {source}: cannot be downloaded ({reason}) and is not in the cache; pass "
            "--source FILE with a copy"
        ) from error
    say(f"the hub cannot be reached ({reason}); using the copy in {found}")
    return Path(found)


def sort_records(
    files: list[Path], parse: Callable[[Mapping[str, Any]], Example]
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, int]]:
    """Read files, check every record and sort the usable ones into splits.

    A file whose name says "train", "valid" or "test" keeps its split; other records are split by
    a hash of the problem, so that equal problems never part.

    Args:
        files: JSONL and parquet files.
        parse: turns a record into an example or raises ValueError.

    Returns:
        Records by split, and how many were left out, by reason.
    """
    splits: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    left_out = {"unusable": 0, "repeated": 0}
    seen: set[str] = set()
    for file in sorted(files, key=_rank):
        for record in _records(file):
            try:
                example = parse(record)
            except (ValueError, KeyError, TypeError, AttributeError):
                left_out["unusable"] += 1
                continue
            key = json.dumps(example.prompt, ensure_ascii=True)
            if key in seen:
                left_out["repeated"] += 1
                continue
            seen.add(key)
            splits[_split_of_file(file) or split_of(key)].append(record)
    return splits, left_out


def _records(file: Path) -> list[dict[str, Any]]:
    if file.suffix == ".parquet":
        return read_parquet(file)
    kept: list[dict[str, Any]] = []

    def keep(record: Mapping[str, Any]) -> Example:
        kept.append(dict(record))
        return Example("", {})

    read_jsonl(file, {}, keep)
    return kept


def _split_of_file(file: Path) -> str | None:
    name = file.name.lower()
    return next((s for s, word in zip(SPLITS, ("train", "valid", "test"), strict=True)
                 if word in name), None)  # fmt: skip


def _rank(file: Path) -> tuple[int, str]:
    """Test files first: a problem that is in both stays out of the training set."""
    order = {"test": 0, "validation": 1, "train": 2}
    return order.get(_split_of_file(file) or "train", 2), str(file)


def write_splits(
    splits: Mapping[str, list[dict[str, Any]]], limits: Mapping[str, int], out: Path
) -> dict[Path, int]:
    """Write train.jsonl, validation.jsonl and test.jsonl, each in one step.

    Args:
        splits: records.
        limits: most records of a split; 0 takes all.
        out: the folder.

    Returns:
        Lines by file; a split without records writes none.
    """
    out.mkdir(parents=True, exist_ok=True)
    written = {}
    with tempfile.TemporaryDirectory(dir=out, prefix=".prepare_data_") as scratch:
        for split, records in splits.items():
            part = records[: limits[split]] if limits[split] else records
            if part:
                lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in part)
                staged = Path(scratch) / f"{split}.jsonl"
                staged.write_text("".join(lines), encoding="utf-8")
                written[out / staged.name] = len(part)
        for path in written:
            os.replace(Path(scratch) / path.name, path)
    return written
