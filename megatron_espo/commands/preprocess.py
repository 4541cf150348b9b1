r"""Tokenize text into the .bin and .idx files that pre-training reads.

Files ending in .jsonl hold one document a line, all others are one document each.

    megatron-espo preprocess --input corpus/ notes.txt --ext .txt .md \
        --tokenizer-model tokenizers/bytes --output-prefix data/corpus --workers 8
"""

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Sequence

from megatron_espo.command_line import Parser
from megatron_espo.data.preprocess import preprocess


def _progress_line(interval: float = 1.0) -> Callable[[int, int], None]:
    """Return a callback that rewrites one line on the standard error now and then."""
    begin = last = 0.0

    def show(documents: int, tokens: int) -> None:
        nonlocal begin, last
        now = time.monotonic()
        begin, last = begin or now, last or now  # imports and workers' start do not count
        if now - last >= interval:
            last = now
            rate = tokens / (now - begin)
            line = f"\r{documents:,} documents, {tokens:,} tokens, {rate:,.0f} tokens/s"
            print(line, end="  ", file=sys.stderr, flush=True)

    return show


def main(argv: Sequence[str]) -> None:
    """Run the tool.

    Args:
        argv: command line without the program's name; default: the process's.
    """
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="PATH", help="files, and folders to search"
    )
    parser.add_argument(
        "--ext", nargs="+", default=[".txt", ".md", ".jsonl"], help="endings to take from folders"
    )
    parser.add_argument("--json-key", default="text", help="key of the text in JSONL lines")
    parser.add_argument("--tokenizer-model", required=True, metavar="DIR", help="tokenizer folder")
    parser.add_argument(
        "--output-prefix", required=True, metavar="PREFIX", help="makes PREFIX.bin and PREFIX.idx"
    )
    parser.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end every document with the end-of-sequence token",
    )
    parser.add_argument("--workers", type=int, default=1, help="processes that tokenize")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier output")
    args = parser.parse_args(argv)
    size = preprocess(
        args.input,
        args.output_prefix,
        args.tokenizer_model,
        extensions=args.ext,
        json_key=args.json_key,
        append_eod=args.append_eod,
        workers=args.workers,
        overwrite=args.overwrite,
        progress=_progress_line(),
    )
    print(file=sys.stderr)
    left_out = f" ({size.empty} empty ones left out)" if size.empty else ""
    print(f"{size.documents:,} documents{left_out}, {size.tokens:,} tokens; train with")
    print(
        f"--data-path {shlex.quote(args.output_prefix)} --tokenizer-type HuggingFaceTokenizer "
        f"--tokenizer-model {shlex.quote(args.tokenizer_model)}"
    )
