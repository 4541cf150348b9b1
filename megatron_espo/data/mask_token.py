"""A mask token for the tokenizer of a model that was trained without one."""

from typing import TYPE_CHECKING

from megatron_espo.errors import UserError

if TYPE_CHECKING:
    from megatron_espo.data.tokenizer import FastTokenizer

MASK = "<|MASK|>"
"""How the token is written where it takes a free row; SDAR's spelling."""


def first_free_id(tokenizer: "FastTokenizer") -> int:
    """Return the id after the last one of a tokenizer."""
    return max(tokenizer.get_vocab().values()) + 1


def choose_mask_token(
    tokenizer: "FastTokenizer", vocab_size: int, wanted: int | None, source: str
) -> int:
    """Choose the row of the vocabulary that stands for a token that is not known yet.

    Published vocabularies have more rows than their tokenizers have tokens: the first free row is
    taken (Qwen3: 151669, which SDAR's models took, too), unless the tokenizer names a mask token.

    Args:
        tokenizer: the model's tokenizer.
        vocab_size: rows of its embedding.
        wanted: an id that was asked for: the first free row, or a special token that no text uses.
        source: the model, for messages.

    Returns:
        The id.

    Raises:
        UserError: there is no free row, or the wanted id is another one.
    """
    named, free = tokenizer.mask_token_id, first_free_id(tokenizer)
    if wanted is None and named is None and free >= vocab_size:
        raise UserError(
            f"{source}: the tokenizer has a token for each of the {vocab_size} rows of the "
            "vocabulary; pass --mask-token-id with a special token that no text uses (Llama 3: "
            "128002, <|reserved_special_token_0|>)."
        )
    if wanted is None:
        return int(free if named is None else named)
    if named is not None and wanted != named:
        raise UserError(
            f"--mask-token-id {wanted}: the tokenizer of {source} names {named} as its mask token; "
            "leave the flag out."
        )
    special = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
    if wanted != free and wanted not in special:
        raise UserError(
            f"--mask-token-id {wanted}: must be a special token of {source}"
            + (f", or {free}, the first row without a token." if free < vocab_size else ".")
        )
    if wanted >= vocab_size:
        raise UserError(
            f"--mask-token-id {wanted} lies outside the vocabulary of {vocab_size}; pass a special "
            f"token of {source}."
        )
    return wanted


def add_mask_token(tokenizer: "FastTokenizer", mask_token_id: int) -> None:
    """Make an id from :func:`choose_mask_token` the mask token of a tokenizer.

    Args:
        tokenizer: the tokenizer; changed in place.
        mask_token_id: a row of the vocabulary without a token, or a token that no text uses.
    """
    if tokenizer.mask_token_id is not None:
        return
    if mask_token_id == first_free_id(tokenizer):
        tokenizer.add_special_tokens({"mask_token": MASK})
    else:
        tokenizer.mask_token = tokenizer.convert_ids_to_tokens(mask_token_id)
    if tokenizer.mask_token_id != mask_token_id:
        raise UserError(
            f"the tokenizer gives {MASK} the id {tokenizer.mask_token_id}, not {mask_token_id}; "
            "pass --mask-token-id with a special token that no text uses."
        )
