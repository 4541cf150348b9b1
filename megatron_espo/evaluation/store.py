"""Finished completions on disk: what a killed evaluation takes up again."""

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_espo.errors import UserError
from megatron_espo.evaluation.statistics import Record

COMPLETIONS = "completions.jsonl"
SETTINGS = "settings.json"


class CompletionStore:
    """A folder of an evaluation; one process writes it.

    Attributes:
        records: what is finished, by key.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]) -> None:
        """Open a folder, or make it.

        A last line that was cut short when an earlier run was killed is dropped.

        Args:
            folder: the folder.
            settings: what the completions depend on: JSON values. ``"lengths"`` is a mapping and
                may gain keys from run to run; all else must be what it was.

        Raises:
            UserError: the folder holds another evaluation, a broken line, or is in use.
        """
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / COMPLETIONS
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"--out {folder}: another evaluation is writing there.") from error
        self._keep_settings(dict(settings))
        self.records = {record.key: record for record in self._read(path)}

    def append(self, records: Sequence[Record]) -> None:
        """Write finished completions; they are on the disk when this returns."""
        for record in records:
            line = json.dumps(asdict(record), ensure_ascii=False)
            self._file.write(line.encode("utf-8") + b"\n")
            self.records[record.key] = record
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Give the folder free."""
        self._file.close()

    def _keep_settings(self, settings: dict[str, Any]) -> None:
        path = self._folder / SETTINGS
        # As JSON gives them back: keys are text, tuples are lists.
        settings = json.loads(json.dumps(settings))
        if path.is_file():
            before = json.loads(path.read_text(encoding="utf-8"))
            lengths = before.pop("lengths", {}), settings.pop("lengths", {})
            shared = lengths[0].keys() & lengths[1].keys()
            differing = [
                *(name for name in before.keys() | settings.keys()
                  if before.get(name) != settings.get(name)),
                *(f"{name} of length {length}" for length in sorted(shared, key=int)
                  for name in lengths[0][length].keys() | lengths[1][length].keys()
                  if lengths[0][length].get(name) != lengths[1][length].get(name)),
            ]  # fmt: skip
            if differing:
                name = min(differing)
                raise UserError(
                    f"--out {self._folder}: holds an evaluation with another {name}"
                    f"{_both(before, settings, name)}; choose another folder."
                )
            settings["lengths"] = lengths[0] | lengths[1]
        partial = path.with_suffix(".tmp")
        partial.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)

    def _read(self, path: Path) -> list[Record]:
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            self._file.truncate(whole)
        records = []
        for number, line in enumerate(content[:whole].splitlines(), start=1):
            try:
                records.append(Record(**json.loads(line)))
            except (ValueError, TypeError) as error:
                raise UserError(
                    f"{path}:{number}: is no completion of an evaluation; remove the line or "
                    "choose another --out."
                ) from error
        return records


def _both(before: Mapping[str, Any], now: Mapping[str, Any], name: str) -> str:
    if name not in before or name not in now:
        return ""
    return f" ({before[name]} there, {now[name]} here)"
