"""Writes a Hugging Face model folder with random weights, tiny or of the published size.

    megatron-espo make-random-model llada --out random-llada
    megatron-espo make-random-model llada --full-size --dtype bfloat16 --out random-llada-8b

For trying out conversions and jobs; the text such a model writes is noise.
"""

import dataclasses
import re
from collections.abc import Sequence

from megatron_espo.command_line import Parser
from megatron_espo.conversion import (
    dream,
    illada,
    llada,
    llada2,
    llada_moe,
    llama3,
    qwen2,
    qwen3,
    sdar,
)
from megatron_espo.conversion.convert import DTYPES
from megatron_espo.conversion.families import FAMILIES
from megatron_espo.conversion.random_model import write_random_model
from megatron_espo.data.tokenizer import byte_tokenizer
from megatron_espo.errors import UserError
from megatron_espo.model.shape import ModelShape

PUBLISHED = {
    "llada": llada.PUBLISHED,
    "dream": dream.PUBLISHED,
    "illada": illada.PUBLISHED,
    "sdar": sdar.PUBLISHED,
    "llada2": llada2.PUBLISHED,
    "llada_moe": llada_moe.PUBLISHED,
    "qwen3": qwen3.PUBLISHED,
    "qwen2": qwen2.PUBLISHED,
    "llama": llama3.PUBLISHED,
}


def tiny(shape: ModelShape) -> ModelShape:
    """Shrink a shape to what fits the byte tokenizer: 256 is its mask, 257 its end of text."""
    experts = shape.experts
    if experts is not None:
        experts = dataclasses.replace(
            experts,
            num_experts=8,
            topk=4,
            hidden_size=48,
            layers=(experts.layers[0], 1, 1),
            shared_size=None if experts.shared_size is None else 48,
            groups=None if experts.groups is None else 4,
            best_groups=None if experts.groups is None else 2,
        )
    return dataclasses.replace(
        shape,
        num_layers=3,
        hidden_size=64,
        ffn_hidden_size=192,
        num_attention_heads=4,
        num_query_groups=2,
        vocab_size=300,
        max_position_embeddings=512,
        mask_token_id=256,
        eos_token_id=257,
        experts=experts,
    )


def main(argv: Sequence[str]) -> None:
    """Write a folder from the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--out", required=True, help="folder to make; must not exist")
    parser.add_argument("--full-size", action="store_true", help="the published shape, 16 GB")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--std", type=float, default=0.02, help="standard deviation of weights")
    parser.add_argument("--max-shard-size", default="5GB", help="most bytes of a file")
    args = parser.parse_args(argv)
    if not re.fullmatch(r"\d+ ?[KMGT]B", args.max_shard_size):
        raise UserError(f"--max-shard-size {args.max_shard_size}: give a size such as 5GB.")
    shape = PUBLISHED[args.family]
    if not args.full_size:
        shape = tiny(shape)
    tokenizer = byte_tokenizer()
    if tokenizer.mask_token_id != shape.mask_token_id:
        tokenizer.mask_token = None  # LLaDA's published tokenizer names none, either
    write_random_model(
        args.out,
        FAMILIES[args.family],
        shape,
        DTYPES[args.dtype],
        tokenizer,
        seed=args.seed,
        std=args.std,
        max_shard_size=args.max_shard_size,
    )
