"""One line of a JSONL file, for every reader of such files."""

import json
from typing import Any

from megatron_espo.errors import UserError


def load_object(line: bytes) -> dict[str, Any]:
    r"""Parse a JSON object.

    Args:
        line: UTF-8.

    Returns:
        The object; its texts can be encoded.

    Raises:
        UserError: it is no JSON object in UTF-8, or spells half of a surrogate pair ("\ud83d"),
            which is no character: no tokenizer and no file takes it.
    """
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"byte {error.start} of the line is not UTF-8; convert the file") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"not valid JSON ({error.msg} at column {error.colno}); write one JSON object a line"
        ) from error
    except (ValueError, RecursionError) as error:  # absurd numbers or nesting
        raise UserError(f"not valid JSON ({error}); write one JSON object a line") from error
    if not isinstance(record, dict):
        raise UserError(f"holds a JSON {type(record).__name__}; write one JSON object a line")
    if b"\\ud" in line.lower() and (half := _lone_surrogate(record)):
        raise UserError(
            f'spells "\\u{ord(half):04x}", half of a surrogate pair and no character; take it '
            'out or write "\\ufffd" for it'
        )
    return record


def _lone_surrogate(record: dict[str, Any]) -> str | None:
    try:
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        return str(error.object[error.start])
    return None
