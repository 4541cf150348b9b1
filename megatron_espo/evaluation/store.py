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
            folder: holds the completions; of one evaluation alone.
            settings: what the completions depend on: JSON values. Mappings (``"lengths"``,
                ``"prompts"``) may gain keys from run to run; all else must be what it was.

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
            for name in sorted(before.keys() | settings.keys()):
                differing = _difference(name, before.get(name), settings.get(name))
                if differing:
                    raise UserError(
                        f"--out {self._folder}: holds an evaluation with another {differing}"
                        f"{_both(before, settings, name)}; choose another folder."
                    )
                if isinstance(before.get(name), dict):
                    settings[name] = before[name] | settings[name]
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


# What the keys of a setting are that is a mapping.
_KEYS = {"lengths": "length", "prompts": "problem"}


def _difference(name: str, before: Any, now: Any) -> str | None:
    """Name what of a setting is not what it was."""
    if before == now:
        return None
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return name
    for key in sorted(before.keys() & now.keys(), key=int):
        of = f"of {_KEYS.get(name, name)} {key}"
        if isinstance(before[key], dict):
            fields = sorted(before[key].keys() | now[key].keys())
            changed = [field for field in fields if before[key].get(field) != now[key].get(field)]
            if changed:
                return f"{changed[0]} {of}"
        elif before[key] != now[key]:
            return f"{name.removesuffix('s')} {of}"
    return None


def _both(before: Mapping[str, Any], now: Mapping[str, Any], name: str) -> str:
    plain = all(isinstance(part.get(name), str | int) for part in (before, now))
    return f" ({before[name]} there, {now[name]} here)" if plain else ""
