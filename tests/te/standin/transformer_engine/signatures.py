"""Checks calls against the recorded parameters of the real Transformer Engine."""

import inspect
import json
from pathlib import Path
from typing import Any

RECORD: dict[str, Any] = json.loads((Path(__file__).parents[2] / "signatures.json").read_text())
VERSION: str = RECORD.pop("version")


def bound(name: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The given arguments by name; TypeError for a name or number that does not fit."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    required = [p for p, must in RECORD[name].items() if must]
    optional = [p for p, must in RECORD[name].items() if not must]
    signature = inspect.Signature(
        [
            *(inspect.Parameter(p, kind) for p in required),
            *(inspect.Parameter(p, kind, default=None) for p in optional),
        ]
    )
    try:
        return dict(signature.bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise TypeError(f"transformer_engine {name}: {error}") from error
