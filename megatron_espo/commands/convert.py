"""Converts checkpoints between Hugging Face and Megatron: LLaDA, Dream, SDAR, Qwen, Llama.

    megatron-espo convert to-megatron --hf GSAI-ML/LLaDA-8B-Instruct --out llada-8b
    megatron-espo convert to-hf --megatron runs/espo --hf-template GSAI-ML/LLaDA-8B-Instruct \
        --out llada-8b-espo
    megatron-espo convert to-hf --megatron runs/own-model --family llada --out own-model
    megatron-espo convert to-peft --megatron runs/lora --hf-template GSAI-ML/LLaDA-1.5 \
        --out adapter
    megatron-espo convert from-peft --lora adapter --base llada-8b --out adapter-to-train

One process, no GPU, a few gigabytes of memory.
"""

import signal
import sys
from collections.abc import Sequence

from megatron_espo.command_line import Parser
from megatron_espo.conversion.convert import (
    DTYPES,
    convert_to_hugging_face,
    convert_to_megatron,
)
from megatron_espo.conversion.families import FAMILIES
from megatron_espo.conversion.peft import convert_from_peft, convert_to_peft


def main(argv: Sequence[str]) -> None:
    """Convert from the command line."""
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(required=True, dest="command")
    forward = commands.add_parser("to-megatron", help="Hugging Face folder -> torch_dist")
    forward.add_argument("--hf", required=True, help="model folder, or its name on the hub")
    forward.add_argument("--lora", help="PEFT adapter to merge: folder, or its name on the hub")
    forward.add_argument(
        "--tokenizer-model", help="tokenizer folder, where the model folder has none"
    )
    forward.add_argument(
        "--mask-token-id",
        type=int,
        help="mask token of an autoregressive model (default: the first row without a token)",
    )
    forward.add_argument(
        "--no-logit-shift",
        action="store_true",
        help="let an autoregressive model predict in place, not the next position",
    )
    back = commands.add_parser(
        "to-hf", help="torch_dist -> Hugging Face folder; LoRA adapters are merged into their base"
    )
    peft = commands.add_parser("to-peft", help="LoRA adapters of a run -> PEFT folder")
    for command in (back, peft):
        command.add_argument("--megatron", required=True, help="--save folder of a run")
        command.add_argument(
            "--iteration", type=int, help="which checkpoint of it (default: the latest)"
        )
        form = command.add_mutually_exclusive_group(required=True)
        form.add_argument("--hf-template", help="model whose config, tokenizer and code are copied")
        form.add_argument("--family", choices=FAMILIES, help="write the config of such a model")
    back.add_argument(
        "--base", help="where the base of LoRA adapters is now (default: where it was)"
    )
    peft.add_argument(
        "--base-name", help="what the adapter's config calls its model (default: the template)"
    )
    again = commands.add_parser("from-peft", help="PEFT folder -> LoRA adapters to train on")
    again.add_argument("--lora", required=True, help="adapter: folder, or its name on the hub")
    again.add_argument("--base", required=True, help="--save folder of the model it belongs to")
    for command in (peft, again):
        command.add_argument("--out", required=True, help="folder to make; must not exist")
    back.add_argument(
        "--tokenizer-model", help="tokenizer folder, with --family (default: the checkpoint's)"
    )
    for command in (forward, back):
        command.add_argument("--out", required=True, help="folder to make; must not exist")
        command.add_argument("--dtype", choices=DTYPES, help="convert the weights (default: keep)")
        command.add_argument(
            "--verify", action="store_true", help="compare the logits of both sides at the end"
        )
    args = parser.parse_args(argv)
    if args.command == "to-hf" and args.hf_template and args.tokenizer_model:
        parser.error("--tokenizer-model goes with --family; a template brings its own tokenizer")
    # A scheduler's stop signal cleans up like Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if args.command == "to-megatron":
        convert_to_megatron(
            args.hf,
            args.out,
            args.lora,
            args.tokenizer_model,
            args.dtype,
            args.verify,
            args.mask_token_id,
            False if args.no_logit_shift else None,
        )
    elif args.command == "to-peft":
        convert_to_peft(
            args.megatron, args.out, args.hf_template, args.family, args.iteration, args.base_name
        )
    elif args.command == "from-peft":
        convert_from_peft(args.lora, args.base, args.out)
    else:
        convert_to_hugging_face(
            args.megatron,
            args.out,
            args.hf_template,
            args.family,
            args.tokenizer_model,
            args.iteration,
            args.dtype,
            args.verify,
            args.base,
        )
