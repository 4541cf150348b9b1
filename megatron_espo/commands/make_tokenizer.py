"""Make a tokenizer folder: bytes only, or byte-level BPE trained on text files.

megatron-espo make-tokenizer --out tokenizers/bytes
megatron-espo make-tokenizer --out tokenizers/bpe --train corpus.txt --vocab-size 4096
"""

from collections.abc import Sequence

from megatron_espo.command_line import Parser
from megatron_espo.data.tokenizer import byte_tokenizer, save_tokenizer, train_tokenizer


def main(argv: Sequence[str]) -> None:
    """Run the tool.

    Args:
        argv: command line without the program's name; default: the process's.
    """
    parser = Parser(description=__doc__)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    parser.add_argument(
        "--train", nargs="+", metavar="FILE", help="text files to learn merges from"
    )
    parser.add_argument("--vocab-size", type=int, help="number of ids, with --train")
    args = parser.parse_args(argv)
    if (args.train is None) != (args.vocab_size is None):
        parser.error("--train and --vocab-size go together; give both or neither")
    if args.train is None:
        tokenizer = byte_tokenizer()
    else:
        tokenizer = train_tokenizer(args.train, args.vocab_size)
    save_tokenizer(tokenizer, args.out)
    print(f"{args.out}: {len(tokenizer)} tokens, mask token {tokenizer.mask_token_id}")
    print(f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {args.out}")
