"""Write synthetic data for a task, or check a file of its format.

train.jsonl, validation.jsonl and test.jsonl never share a problem, whatever their sizes and seeds.
demonstrations.jsonl ({"prompt", "completion"} lines for SFT) comes from the train split as well,
from problems other than those written to train.jsonl. Files appear only when all are complete.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from megatron_espo.tasks import SPLITS, DemonstratingTask, Example, GeneratingTask, Task, load_task


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool.

    Args:
        argv: Command line without the program's name; by default the process's own.

    Returns:
        Exit code: 0, or 2 after one sentence on stderr.
    """
    args = _parse_arguments(argv)
    try:
        task = load_task(args.task, flag="TASK")
        if args.check is None:
            _prepare(task, args)
        else:
            print(f"{args.check}: {len(task.read(args.check))} examples of {task.name}")
    except ValueError as error:
        print(f"prepare_data.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"prepare_data.py: --out {args.out}: {error.strerror}; choose a writable directory",
            file=sys.stderr,
        )
        return 2
    return 0


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("task", help="sudoku, countdown, or the import path of a task")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--out", type=Path, metavar="DIR", help="write the files here")
    action.add_argument("--check", type=Path, metavar="FILE", help="only read FILE and count")
    for split in SPLITS:
        parser.add_argument(f"--{split}", type=int, default=0, metavar="N", help="problems")
    parser.add_argument("--demonstrations", type=int, default=0, metavar="N", help="SFT lines")
    parser.add_argument(
        "--noise", type=float, default=0.5, help="share of corrupted demonstrations, 0 to 1"
    )
    parser.add_argument("--seed", type=int, default=0, help="same seed, same files")
    return parser.parse_args(argv)


def _prepare(task: Task, args: argparse.Namespace) -> None:
    _check_arguments(args)
    counts = {split: getattr(args, split) for split in SPLITS}
    # Demonstrations are the end of a longer draw, so they share no problem with train.jsonl.
    draws = counts | {"train": args.train + args.demonstrations}
    records = {split: _generate(task, count, args.seed, split) for split, count in draws.items()}
    demonstrated = records["train"][args.train :]
    records["train"] = records["train"][: args.train]
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out, prefix=".prepare_data_") as scratch:
        staging = Path(scratch)
        examples = {}
        for stem, part in (records | {"demonstrations": demonstrated}).items():
            if part:
                _write_jsonl(staging / f"{stem}.jsonl", part)
                examples[stem] = task.read(staging / f"{stem}.jsonl")
        if demonstrated:
            lines = _demonstrate(task, examples["demonstrations"], demonstrated, args)
            _write_jsonl(staging / "demonstrations.jsonl", lines)
        for stem, part_examples in examples.items():
            path = args.out / f"{stem}.jsonl"
            os.replace(staging / path.name, path)
            print(f"{path}: {len(part_examples)} lines of {task.name}")


def _check_arguments(args: argparse.Namespace) -> None:
    counts = {flag: getattr(args, flag) for flag in (*SPLITS, "demonstrations")}
    for flag, count in counts.items():
        if count < 0:
            raise ValueError(f"--{flag} is {count}; make it 0 or more")
    if not any(counts.values()):
        raise ValueError(f"nothing to write; give one of {', '.join(f'--{f}' for f in counts)}")
    if not 0 <= args.noise <= 1:
        raise ValueError(f"--noise is {args.noise}; make it a probability from 0 to 1")


def _generate(task: Task, count: int, seed: int, split: str) -> list[dict[str, Any]]:
    if isinstance(task, GeneratingTask):
        return task.generate(count, seed, split) if count else []
    raise ValueError(f"task {task.name} has no generate(); only --check works for it")


def _demonstrate(
    task: Task,
    examples: Sequence[Example],
    records: Sequence[Mapping[str, Any]],
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    rng = Random(f"{task.name}:demonstrations:{args.seed}")
    if isinstance(task, DemonstratingTask):
        return [
            {"prompt": example.prompt, "completion": task.demonstrate(record, rng, args.noise)}
            for example, record in zip(examples, records, strict=True)
        ]
    raise ValueError(f"task {task.name} has no demonstrate(); leave out --demonstrations")


def _write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
