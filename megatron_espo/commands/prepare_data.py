"""Write data for a task, synthetic or published, or check a file of its format.

train.jsonl, validation.jsonl and test.jsonl never share a problem, whatever their sizes and seeds.
demonstrations.jsonl ({"prompt", "completion"} lines for SFT) comes from the train split as well,
from problems other than those written to train.jsonl. Files appear only when all are complete.
TASK is a built-in one, FILE.py or an import path. Of a task of your own, problems that generate()
gives to several splits, or twice, stay in one; only `draw_distinct` keeps them apart over seeds.

With --source the problems are those of a file, a folder or a data set of the Hugging Face hub
(--source hub takes the one that d1 and ESPO use); unusable and repeated ones are left out and
counted. --train, --validation and --test are then upper limits.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from inspect import Parameter, signature
from pathlib import Path
from random import Random
from typing import Any

from megatron_espo.command_line import Parser
from megatron_espo.errors import UserError
from megatron_espo.tasks import (
    BUILT_IN,
    SPLITS,
    DemonstratingTask,
    Example,
    GeneratingTask,
    Task,
    load_task,
)
from megatron_espo.tasks.base import STYLES, read_examples
from megatron_espo.tasks.published import HUB, find_files, sort_records, write_splits

_MOST_ASKED = 64  # times as many problems as are needed


def main(argv: Sequence[str]) -> None:
    """Run the tool.

    Args:
        argv: Command line without the program's name.

    Raises:
        UserError: The input is bad.
    """
    args = _parse_arguments(argv)
    task = load_task(args.task, flag="TASK")
    try:
        if args.source is not None:
            _prepare_published(task, args)
        elif args.check is None:
            _prepare(task, args)
        else:
            print(f"{args.check}: {len(read_examples(task, args.check))} examples of {task.name}")
    except OSError as error:
        if args.out is None:
            raise
        raise UserError(
            f"--out {args.out}: {error.strerror}; choose a writable directory."
        ) from error


def _parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("task", help="a built-in task, FILE.py, or an import path")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--out", type=Path, metavar="DIR", help="write the files here")
    action.add_argument("--check", type=Path, metavar="FILE", help="only read FILE and count")
    parser.add_argument("--source", metavar="SOURCE", help="file, folder, owner/name, or hub")
    parser.add_argument(
        "--style", choices=STYLES, default="bare", help="how synthetic problems are put (bare)"
    )
    for split in SPLITS:
        parser.add_argument(f"--{split}", type=int, default=0, metavar="N", help="problems")
    parser.add_argument("--demonstrations", type=int, default=0, metavar="N", help="SFT lines")
    parser.add_argument(
        "--demonstrations-each", type=int, default=1, metavar="K", help="of them on one problem (1)"
    )
    parser.add_argument(
        "--task-args",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="settings of the task's generate(), as max_number=20",
    )
    parser.add_argument(
        "--noise", type=float, default=0.5, help="share of corrupted demonstrations, 0 to 1"
    )
    parser.add_argument("--seed", type=int, default=0, help="same seed, same files")
    return parser.parse_args(argv)


def _prepare(task: Task, args: argparse.Namespace) -> None:
    _check_arguments(args)
    counts = {split: getattr(args, split) for split in SPLITS}
    settings = _settings(task, args)
    problems = -(-args.demonstrations // args.demonstrations_each)
    # Demonstrations are the end of a longer draw, so they share no problem with train.jsonl.
    draws = counts | {"train": args.train + problems}
    records = _generate(task, draws, args.seed, settings)
    demonstrated = records["train"][args.train :] * args.demonstrations_each
    demonstrated = demonstrated[: args.demonstrations]
    records["train"] = records["train"][: args.train]
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out, prefix=".prepare_data_") as scratch:
        staging = Path(scratch)
        examples = {}
        for stem, part in (records | {"demonstrations": demonstrated}).items():
            if part:
                _write_jsonl(staging / f"{stem}.jsonl", part)
                examples[stem] = read_examples(task, staging / f"{stem}.jsonl")
        if demonstrated:
            lines = _demonstrate(task, examples["demonstrations"], demonstrated, args)
            _write_jsonl(staging / "demonstrations.jsonl", lines)
        for stem, part_examples in examples.items():
            path = args.out / f"{stem}.jsonl"
            os.replace(staging / path.name, path)
            print(f"{path}: {len(part_examples)} lines of {task.name}")


def _prepare_published(task: Task, args: argparse.Namespace) -> None:
    parse = getattr(task, "_parse", None)
    if parse is None:
        raise UserError(f"task {task.name} is not built in; --source does not work for it")
    if args.demonstrations or args.out is None:
        raise UserError("--source goes with --out and without --demonstrations; change that")
    source = HUB.get(task.name) if args.source == "hub" else args.source
    if source is None:
        raise UserError(f"--source hub: task {task.name} is not on the hub; give a file")
    splits, left_out = sort_records(find_files(source, print), parse)
    if not any(splits.values()):
        raise UserError(f"--source {source}: holds no problem of {task.name}; give another")
    limits = {split: getattr(args, split) for split in SPLITS}
    for path, count in write_splits(splits, limits, args.out).items():
        print(f"{path}: {count} lines of {task.name}")
    print(", ".join(f"{count} {why}" for why, count in left_out.items()) + " left out")


def _check_arguments(args: argparse.Namespace) -> None:
    counts = {flag: getattr(args, flag) for flag in (*SPLITS, "demonstrations")}
    for flag, count in counts.items():
        if count < 0:
            raise UserError(f"--{flag} is {count}; make it 0 or more")
    if not any(counts.values()):
        raise UserError(f"nothing to write; give one of {', '.join(f'--{f}' for f in counts)}")
    if args.demonstrations_each < 1:
        raise UserError(f"--demonstrations-each is {args.demonstrations_each}; make it 1 or more")
    if not 0 <= args.noise <= 1:
        raise UserError(f"--noise is {args.noise}; make it a probability from 0 to 1")


def _settings(task: Task, args: argparse.Namespace) -> dict[str, Any]:
    """Read what the task's generate() is given besides count, seed and split.

    Values are read as the default's type; a task of a user's own knows nothing of styles.
    """
    if not isinstance(task, GeneratingTask):
        return {}
    known = {
        name: parameter.default
        for name, parameter in signature(task.generate).parameters.items()
        if parameter.kind is Parameter.KEYWORD_ONLY and parameter.default is not Parameter.empty
    }
    settings: dict[str, Any] = {}
    for given in args.task_args:
        name, _, text = given.partition("=")
        if name not in known or name == "style":
            others = ", ".join(sorted(set(known) - {"style"})) or "none"
            raise UserError(f"--task-args {given}: generate() of {task.name} has {others}")
        try:
            settings[name] = _value(text, type(known[name]))
        except ValueError as error:
            kind = type(known[name]).__name__
            raise UserError(f"--task-args {given}: {text!r} is no {kind}; correct it") from error
    if BUILT_IN.get(task.name) is task:
        settings["style"] = args.style
    return settings


def _value(text: str, kind: type) -> Any:
    """Read a setting; of yes and no as Python writes them, in any case."""
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError
        return text.lower() == "true"
    return kind(text)


def _generate(
    task: Task, counts: Mapping[str, int], seed: int, settings: Mapping[str, Any]
) -> dict[str, list[dict[str, Any]]]:
    if not isinstance(task, GeneratingTask):
        raise UserError(f"task {task.name} has no generate(); only --check works for it")
    if BUILT_IN.get(task.name) is task:
        return {s: task.generate(n, seed, s, **settings) if n else [] for s, n in counts.items()}
    records: dict[str, list[dict[str, Any]]] = {}
    seen: set[str] = set()
    for split in reversed(SPLITS):  # where problems run short, it is training that notices
        records[split] = _generate_others(task, counts[split], seed, split, settings, seen)
    return {split: records[split] for split in SPLITS}


def _generate_others(
    task: GeneratingTask,
    count: int,
    seed: int,
    split: str,
    settings: Mapping[str, Any],
    seen: set[str],
) -> list[dict[str, Any]]:
    """Ask a task for problems that no other split has, for more until there are enough."""
    kept: dict[str, dict[str, Any]] = {}
    asked = count
    while len(kept) < count:
        drawn = task.generate(asked, seed, split, **settings)
        if not isinstance(drawn, list) or not all(isinstance(record, dict) for record in drawn):
            raise UserError(f"task {task.name}: generate() gives no list of dicts; correct it")
        fresh = {
            key: r for key, r in zip(_keys(task, drawn), drawn, strict=True) if key not in seen
        }
        if len(fresh) < count and (len(drawn) < asked or asked >= _MOST_ASKED * count):
            raise UserError(
                f"task {task.name}: of {len(drawn)} {split} problems that generate() gave, "
                f"{len(fresh)} are distinct and in no other split, but {count} are asked for; draw "
                "them with megatron_espo.tasks.base.draw_distinct, or ask for fewer"
            )
        kept = dict(list(fresh.items())[:count])
        asked *= 2
    seen.update(kept)
    return list(kept.values())


def _keys(task: Task, records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what tells problems apart: their prompts."""
    if not records:
        return []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "generated.jsonl"
        _write_jsonl(path, records)
        examples = read_examples(task, path)
    if len(examples) != len(records):
        raise UserError(
            f"task {task.name}: read() finds {len(examples)} problems in {len(records)} records of "
            "generate(); make it one a record"
        )
    return [json.dumps(example.prompt, default=dict) for example in examples]


def _demonstrate(
    task: Task,
    examples: Sequence[Example],
    records: Sequence[Mapping[str, Any]],
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    rng = Random(f"{task.name}:demonstrations:{args.seed}")
    if isinstance(task, DemonstratingTask):
        return [
            _line(example, task.demonstrate(record, rng, args.noise))
            for example, record in zip(examples, records, strict=True)
        ]
    raise UserError(f"task {task.name} has no demonstrate(); leave out --demonstrations")


def _line(example: Example, completion: str) -> dict[str, Any]:
    """Write a demonstration for fine-tuning: text, or a chat that ends with the completion."""
    if isinstance(example.prompt, str):
        return {"prompt": example.prompt, "completion": completion}
    answer = {"role": "assistant", "content": completion}
    return {"messages": [*(dict(message) for message in example.prompt), answer]}


def _write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8")
