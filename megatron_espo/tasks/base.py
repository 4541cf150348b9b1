"""The interface between a task and the rest: examples, scores, data files and splits.

A task is a module (or any object) with the attributes of `Task`; nothing registers it and nothing
is inherited. A task whose problems can be made up also has `generate`, and `demonstrate` for SFT
data.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from random import Random
from typing import Any, Protocol, runtime_checkable

from megatron_espo.errors import UserError
from megatron_espo.json_lines import load_object

SPLITS = ("train", "validation", "test")
STYLES = ("chat", "bare")
"""How a problem is put: in words and answered between tags, or as bare as can be."""
# Upper ends of the splits' shares of the hash range.
_SPLIT_ENDS = (0.8, 0.9, 1.0)
# Draws in a row without a new problem after which a split counts as exhausted.
_MAX_MISSES = 10_000


type ChatMessage = Mapping[str, str]
"""One message of a chat prompt: its "role" and its "content"."""


@dataclass(frozen=True)
class Example:
    """A problem: the text (or chat) the model sees, and what the reward needs.

    Attributes:
        prompt: Text, or chat messages that the tokenizer's chat template renders.
        answer: Whatever `Task.score` needs; JSON-able, so that it can travel to reward workers.
    """

    prompt: str | tuple[ChatMessage, ...]
    answer: Mapping[str, Any]


@dataclass(frozen=True)
class Score:
    """The judgement of one completion.

    Attributes:
        reward: What RL maximises; a finite number.
        correct: Exact success; held-out accuracy counts this.
        metrics: Extra finite numbers to log, by name; the mean over the completions that have one
            is reported, as reward/NAME. Names of `checking.RESERVED_METRICS` are taken.
        task: Which of several tasks judged (see `tasks.blend`); None with one.
        parts: What the parts of the completion are worth (`tasks.parts`), each with its first
            character and the one after its last; None where nobody asked. A task leaves it out.
    """

    reward: float
    correct: bool
    metrics: Mapping[str, float]
    task: str | None = None
    parts: tuple[tuple[int, int, float], ...] | None = None


class Task(Protocol):
    """What the trainer asks of a task."""

    name: str

    def read(self, path: str | PathLike[str]) -> list[Example]:
        """Read a file of problems; raises ValueError "path:line: ..." on a malformed line."""
        ...

    def score(self, example: Example, completion: str) -> Score:
        """Judge a completion: the generated text up to the first end-of-sequence token.

        Must not raise on any text, and must return in bounded time.
        """
        ...


@runtime_checkable
class GeneratingTask(Task, Protocol):
    """A task that makes up its own problems."""

    def generate(self, count: int, seed: int, split: str) -> list[dict[str, Any]]:
        """Return `count` distinct records that `read` accepts, from one of `SPLITS`."""
        ...


@runtime_checkable
class DemonstratingTask(GeneratingTask, Protocol):
    """A task that also writes completions of mixed quality to fine-tune on before RL."""

    def demonstrate(self, record: Mapping[str, Any], rng: Random, noise: float) -> str:
        """Return a completion for a generated record, corrupted with probability `noise`."""
        ...


def tagged_prompt(instruction: str, problem: str) -> tuple[ChatMessage, ...]:
    """Write a chat prompt that asks for the answer between tags, the form of d1 and ESPO.

    Args:
        instruction: What the task is.
        problem: What is asked, in words.

    Returns:
        One message of the user.
    """
    form = (
        "Respond in this form:\n<reasoning>\nyour steps\n</reasoning>\n"
        "<answer>\nyour answer\n</answer>"
    )
    return ({"role": "user", "content": f"{instruction}\n\n{form}\n\n{problem}"},)


def is_bare(record: Mapping[str, Any]) -> bool:
    """Return whether a record or answer is of the bare style, without chat and tags.

    Raises:
        UserError: Its "style" is unknown.
    """
    style = "chat" if record.get("style") is None else record["style"]
    if style not in STYLES:
        raise UserError(f"'style' is {style!r}; use one of {', '.join(STYLES)}")
    return bool(style == "bare")


def dressed_answer(record: Mapping[str, Any], answer: str) -> str:
    """Write an answer as a completion of the record's style: between tags unless it is bare."""
    return answer if is_bare(record) else f"<answer>\n{answer}\n</answer>"


def read_jsonl(
    path: str | PathLike[str],
    fields: Mapping[str, type],
    parse: Callable[[Mapping[str, Any]], Example],
) -> list[Example]:
    """Read a JSONL file, one example per line; lines of white space are skipped.

    Args:
        path: The file.
        fields: Required keys and the exact type of each value (so `true` is not an `int`).
        parse: Turns a record whose fields were checked into an example; raises ValueError with
            what is wrong and what to change, to which the file and line are added.

    Returns:
        The examples, in the order of the file; at least one.

    Raises:
        UserError: The file cannot be read or holds no example, or a line is malformed.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); give the path of a JSONL file"
        ) from error
    examples = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            examples.append(parse(_checked(load_object(line), fields)))
        except ValueError as error:
            raise UserError(f"{path}:{number}: {error}") from error
    if not examples:
        raise UserError(f"{path}: holds no example; write one JSON object per line")
    return examples


def read_examples(task: Task, path: str | PathLike[str]) -> list[Example]:
    """Read a task's file of problems, whoever wrote the task.

    Args:
        task: Built-in or anybody's; its ValueError is a user's mistake.
        path: The file.

    Returns:
        Its examples.

    Raises:
        UserError: What the task raises for a malformed line.
    """
    try:
        return task.read(path)
    except ValueError as error:
        raise UserError(str(error)) from error


def read_records(
    path: str | PathLike[str],
    fields: Mapping[str, type],
    parse: Callable[[Mapping[str, Any]], Example],
) -> list[Example]:
    """Read a JSONL file as `read_jsonl` does, or a parquet file (its name ends with ".parquet").

    Args:
        path: The file.
        fields: See `read_jsonl`.
        parse: See `read_jsonl`.

    Returns:
        The examples, in the order of the file; at least one.

    Raises:
        UserError: See `read_jsonl`; a parquet file needs pyarrow.
    """
    if Path(path).suffix != ".parquet":
        return read_jsonl(path, fields, parse)
    examples = []
    for number, record in enumerate(read_parquet(path), start=1):
        try:
            examples.append(parse(_checked(record, fields)))
        except ValueError as error:
            raise UserError(f"{path}:{number}: {error}") from error
    if not examples:
        raise UserError(f"{path}: holds no example; give another file")
    return examples


def read_parquet(path: str | PathLike[str]) -> list[dict[str, Any]]:
    """Read the rows of a parquet file.

    Args:
        path: The file.

    Returns:
        One dictionary per row.

    Raises:
        UserError: The file cannot be read, or pyarrow is not installed.
    """
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise UserError(
            f"{path}: a parquet file needs pyarrow; pip install 'megatron-espo[data]'"
        ) from error
    try:
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    except (OSError, arrow.ArrowException) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"{path}: cannot be read ({reason}); give the path of a parquet file"
        ) from error
    return rows


def present(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a record that have a value.

    Data-set libraries write every field of a file into every record, null where it was absent.
    """
    return {key: value for key, value in record.items() if value is not None}


def _checked(record: dict[str, Any], fields: Mapping[str, type]) -> dict[str, Any]:
    for key, kind in fields.items():
        if key not in record:
            raise UserError(f"key {key!r} is missing; add it")
        if type(record[key]) is not kind:
            found = type(record[key]).__name__
            raise UserError(f"{key!r} is of type {found}; make it {kind.__name__}")
    return record


def split_of(key: str) -> str:
    """Return the split a problem belongs to: train 80%, validation 10%, test 10%.

    A hash of the problem itself decides, so splits never overlap, whatever their sizes and seeds.

    Args:
        key: Canonical text of the problem: equal for problems that must not part.
    """
    digest = hashlib.blake2b(key.encode("utf-8"), digest_size=8).digest()
    share = int.from_bytes(digest, "big") / 2**64
    return next(split for split, end in zip(SPLITS, _SPLIT_ENDS, strict=True) if share < end)


def draw_distinct(
    draw: Callable[[], tuple[str, dict[str, Any]] | None], count: int, split: str
) -> list[dict[str, Any]]:
    """Draw problems until `count` distinct ones of a split are found.

    Args:
        draw: Returns the key of a random problem (see `split_of`) and its record, or None for a
            draw that came to nothing.
        count: Number of records.
        split: One of `SPLITS`.

    Returns:
        The records in the order drawn: a smaller count gives a prefix.

    Raises:
        UserError: `split` is unknown, `count` is negative, or the split has too few problems.
    """
    if split not in SPLITS:
        raise UserError(f"split {split!r} is unknown; use one of {', '.join(SPLITS)}")
    if count < 0:
        raise UserError(f"cannot draw {count} {split} problems; ask for 0 or more")
    records: dict[str, dict[str, Any]] = {}
    misses = 0
    while len(records) < count:
        drawn = draw()
        if drawn is None or drawn[0] in records or split_of(drawn[0]) != split:
            misses += 1
            if misses == _MAX_MISSES:
                raise UserError(
                    f"found only {len(records)} of {count} distinct {split} problems; ask for fewer"
                )
        else:
            records[drawn[0]] = drawn[1]
            misses = 0
    return list(records.values())


def start_line(task: Task) -> str | None:
    """Return what a task has to say when a run starts: its optional `start_line`, a function."""
    say = getattr(task, "start_line", None)
    line: str | None = say() if callable(say) else None
    return line
