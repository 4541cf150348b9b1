"""Evaluation from the command line: checkpoint, task, protocol, files."""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megatron_espo.checkpoint.fingerprint import folder_fingerprint
from megatron_espo.checkpoint.tracker import checkpoint_folder
from megatron_espo.command_line import Parser, parse_own
from megatron_espo.commands.inference import (
    add_checkpoint_arguments,
    checkpoint_flags,
    load_eval_problems,
    load_model,
    prepare_arguments,
    validate_sampling,
)
from megatron_espo.config import EspoConfig, RolloutConfig
from megatron_espo.data.tokenizer import vocabulary_digest
from megatron_espo.dry_run.planned import is_dry_run
from megatron_espo.dry_run.simulation import simulate_inference
from megatron_espo.evaluation.protocol import Protocol, add_protocol_arguments, read_protocol
from megatron_espo.evaluation.run import evaluate
from megatron_espo.evaluation.statistics import Summary, markdown_table
from megatron_espo.evaluation.store import CompletionStore
from megatron_espo.startup.arguments import config_from_args
from megatron_espo.startup.setup import few_shapes

# Of the sampling settings, what only decides how fast completions come.
_SPEED = ("micro_batch_size",)


def main(argv: Sequence[str]) -> None:
    """Evaluate; prints a table and one JSON object per completion length.

    Args:
        argv: flags.
    """
    parser = Parser(add_help=False)
    add_checkpoint_arguments(parser)
    add_protocol_arguments(parser)
    parser.add_argument("--out", help="folder for completions and results; resumes what it holds")
    if "--help" in argv or "-h" in argv:
        parser.print_help()
        print("\nand the flags of training, the --rollout-* and --espo-* groups among them:\n")
    options, rest = parse_own(parser, argv)
    protocol: Protocol | None = None

    def prepare(args: argparse.Namespace) -> None:
        nonlocal protocol
        protocol = read_protocol(options, config_from_args(RolloutConfig, args), rest)
        for config in protocol.configs.values():
            validate_sampling(config, args)
        # The longest decides how long a prompt may be.
        longest = protocol.configs[max(protocol.configs)]
        for name, value in asdict(longest).items():
            setattr(args, f"rollout_{name}", value)
        prepare_arguments(args)

    if is_dry_run(rest):
        simulate_inference("megatron_espo.commands.evaluate", argv, rest, prepare)
        return
    model, args = load_model([*checkpoint_flags(options), *rest], prepare)
    task, tokenizer, data = load_eval_problems(args)
    assert protocol is not None
    model = replace(model, widths=few_shapes(args, data.encoded, [*protocol.configs]))
    settings = _settings(options, args, protocol) | {
        "tokenizer": vocabulary_digest(tokenizer),
        "prompts": {
            number: hashlib.sha256(repr(ids).encode()).hexdigest()[:12]
            for number, ids in enumerate(data.encoded)
        },
    }
    summaries = evaluate(
        model,
        task,
        data,
        tokenizer,
        protocol,
        args.seed,
        (lambda: CompletionStore(options.out, settings)) if options.out else None,
        lambda line: print(line, file=sys.stderr, flush=True),
    )
    if summaries:
        _report(summaries, options.out)


def _settings(
    options: argparse.Namespace, args: argparse.Namespace, protocol: Protocol
) -> dict[str, Any]:
    """What completions depend on, as far as it can be told."""
    espo = config_from_args(EspoConfig, args)
    lengths = {
        str(length): {k: v for k, v in asdict(config).items() if k not in _SPEED}
        for length, config in protocol.configs.items()
    }
    if options.hf:
        path = os.path.realpath(options.hf) if os.path.isdir(options.hf) else options.hf
        model = Path(args.load).name  # it has the folder's fingerprint in it
    else:
        path = os.path.realpath(checkpoint_folder(args.load, args.ckpt_step))
        model = folder_fingerprint(path)
    return {
        "checkpoint": path,
        "model": model,
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "float32",
        "fp8": args.fp8 and f"{args.fp8} {args.fp8_recipe}",
        "stop_token_ids": args.stop_token_ids,
        "task": espo.task,
        "data": hashlib.sha256(Path(str(espo.eval_data)).read_bytes()).hexdigest(),
        "seed": args.seed,
        "lengths": lengths,
    }


def _report(summaries: Sequence[Summary], out: str | None) -> None:
    """Print the results and write them beside the completions."""
    table = markdown_table(summaries)
    print(table)
    for summary in summaries:
        print(json.dumps(summary.as_json()), flush=True)
    if out is not None:
        results = json.dumps([summary.as_json() for summary in summaries], indent=1)
        Path(out, "results.json").write_text(results + "\n", encoding="utf-8")
        Path(out, "table.md").write_text(table + "\n", encoding="utf-8")
