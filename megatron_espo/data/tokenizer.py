"""One tokenizer path for a tiny model and an 8B one: a local Hugging Face tokenizer folder.

Published checkpoints bring such a folder. For a model of one's own, `byte_tokenizer` and
`train_tokenizer` build one with LLaDA's chat tokens. Ids are laid out as 256 bytes (id = byte
value), then the special tokens, then merges, so a byte tokenizer is the beginning of every
trained one.
"""

import hashlib
import itertools
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_espo.data.atomic_folder import atomic_folder
from megatron_espo.data.jsonl import read_text
from megatron_espo.data.mask_token import add_mask_token
from megatron_espo.errors import UserError

# Imported where they are used: they take half a second, which --help need not wait for.
if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

type FastTokenizer = PreTrainedTokenizerFast
"""A tokenizer of the Rust library, as transformers wraps it."""

MASK, END_OF_TEXT, START_OF_TEXT = "<|mask|>", "<|endoftext|>", "<|startoftext|>"
START_HEADER, END_HEADER, END_OF_TURN = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
SPECIAL_TOKENS = (MASK, END_OF_TEXT, START_OF_TEXT, START_HEADER, END_HEADER, END_OF_TURN)
"""The special tokens of a tokenizer built here, in the order of their ids, from 256."""

CHAT_TEMPLATE = (
    "{{ '" + START_OF_TEXT + "' }}"
    "{% for message in messages %}"
    "{{ '" + START_HEADER + "' + message['role'] + '" + END_HEADER + "\n\n' }}"
    "{{ message['content'] + '" + END_OF_TURN + "' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '" + START_HEADER + "assistant" + END_HEADER + "\n\n' }}"
    "{% endif %}"
)
"""LLaDA's chat format."""

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
TURN_ENDS = (END_OF_TURN, "<|im_end|>")
"""What ends a turn: LLaDA; ChatML (Dream)."""

_NUM_BYTES = 256


@dataclass(frozen=True)
class SpecialIds:
    """The token ids that masked diffusion needs to know."""

    mask_token_id: int
    """Stands for a token that is not known yet."""
    eos_token_id: int
    """Ends a text and fills a completion up to its length."""
    pad_token_id: int
    """Fills a row after the completion."""
    stop_token_ids: tuple[int, ...]
    """Every id that ends a completion: end of sequence, end of turn."""


def load_tokenizer(path: str | Path) -> FastTokenizer:
    """Load a tokenizer folder; never goes to the network and never runs code from the folder.

    Args:
        path: a folder with tokenizer.json, or with vocab.json and merges.txt.

    Returns:
        The tokenizer.

    Raises:
        UserError: the folder is missing or holds no tokenizer that transformers can load.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = Path(path)
    if not folder.is_dir():
        raise UserError(
            f"--tokenizer-model {path}: no such folder; give a local Hugging Face tokenizer "
            "folder, for example one made by tools/make_tokenizer.py"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    # Whatever a broken folder makes transformers raise means the same to the user.
    except Exception as error:
        raise UserError(f"--tokenizer-model {path}: {_why_not_loaded(folder)}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"--tokenizer-model {path}: not a fast tokenizer; add its tokenizer.json")
    return tokenizer


def _why_not_loaded(folder: Path) -> str:
    config = folder / "tokenizer_config.json"
    if config.is_file() and b'"auto_map"' in config.read_bytes():
        return (
            'its tokenizer_config.json asks for code of its own; remove "auto_map" there and set '
            '"tokenizer_class" to a class of transformers ("Qwen2Tokenizer" for Dream)'
        )
    return "transformers finds no tokenizer in it; the folder needs a valid tokenizer.json"


def byte_tokenizer() -> FastTokenizer:
    """Return the smallest tokenizer: 256 bytes (id = value), the special tokens, no merges."""
    return _build([])


def train_tokenizer(files: Sequence[str | Path], vocab_size: int) -> FastTokenizer:
    """Train a byte-level BPE tokenizer; equal files give equal ids.

    Args:
        files: UTF-8 text files.
        vocab_size: number of ids, the bytes and the special tokens included.

    Returns:
        A tokenizer of exactly ``vocab_size`` ids.

    Raises:
        UserError: the text or the size does not allow that, or a file cannot be read.
    """
    smallest = _NUM_BYTES + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise UserError(f"--vocab-size {vocab_size}: give at least {smallest}")
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=_byte_symbols(),
        show_progress=False,
    )
    learner.train_from_iterator(map(read_text, files), trainer)
    tokenizer = _build(json.loads(learner.to_str())["model"]["merges"])
    if len(tokenizer) != vocab_size:
        raise UserError(
            f"--vocab-size {vocab_size}: the text of --train yields only {len(tokenizer)} ids; "
            "lower the size or give more text"
        )
    return tokenizer


def save_tokenizer(tokenizer: FastTokenizer, folder: str | Path) -> None:
    """Write a tokenizer folder in one step, so that an interrupted run leaves none.

    Raises:
        UserError: the folder holds something already.
    """
    with atomic_folder(folder) as partial:
        write_tokenizer(tokenizer, partial)


def write_tokenizer(tokenizer: FastTokenizer, folder: str | Path) -> None:
    """Write a tokenizer's files so that transformers 4.46 and later load them.

    transformers 5 names a class that version 4 does not have, and lists tokens under a name of
    which version 4 wants a mapping; versions before 4.49 do not look for chat_template.jinja.
    Version 5 reads the older names, too.

    Args:
        tokenizer: what is written; it stays as it is.
        folder: an existing folder.
    """
    tokenizer.save_pretrained(str(folder))
    path = Path(folder, "tokenizer_config.json")
    config = json.loads(read_text(path))
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    for name in ("is_local", "local_files_only"):  # how it was loaded, not what it is
        config.pop(name, None)
    if isinstance(tokenizer.chat_template, str):
        config["chat_template"] = tokenizer.chat_template
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_tokenizer(
    source: Path,
    target: Path,
    tokenizer_class: str | None = None,
    mask_token_id: int | None = None,
) -> None:
    """Write the tokenizer of a model folder in a form that needs no code of its own.

    Args:
        source: the model folder.
        target: the tokenizer folder to make.
        tokenizer_class: transformers' class that does the work of the folder's own code.
        mask_token_id: becomes the mask token where the tokenizer names none.

    Raises:
        UserError: the folder has no tokenizer, or it cannot be loaded.
    """
    found = [source / name for name in _FILES if (source / name).is_file()]
    if not {"tokenizer.json", "vocab.json"} & {path.name for path in found}:
        raise UserError(f"{source}: holds no tokenizer.json; pass --tokenizer-model FOLDER.")
    with tempfile.TemporaryDirectory() as scratch:
        # Without the model's config.json, which asks for code of its own, too.
        for path in found:
            shutil.copy(path, scratch)
        config = Path(scratch, "tokenizer_config.json")
        if tokenizer_class is not None and config.is_file():
            settings = json.loads(read_text(config))
            if settings.pop("auto_map", None) is not None:
                config.write_text(json.dumps({**settings, "tokenizer_class": tokenizer_class}))
        try:
            tokenizer = load_tokenizer(scratch)
        except UserError as error:
            raise UserError(f"{source}: {_why_not_loaded(Path(scratch))}") from error
        if mask_token_id is not None:
            add_mask_token(tokenizer, mask_token_id)
        save_tokenizer(tokenizer, target)


def _byte_symbols() -> list[str]:
    """Return the printable character that byte-level BPE writes for each byte (GPT-2's map)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = itertools.count(_NUM_BYTES)
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(_NUM_BYTES)]


def _build(merges: Sequence[Sequence[str]]) -> FastTokenizer:
    """Build a tokenizer from pairs of symbols to merge, in the order of their rank."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pairs = [(left, right) for left, right in merges]
    tokens = [*_byte_symbols(), *SPECIAL_TOKENS, *(left + right for left, right in pairs)]
    # Two pairs may spell the same token: dict.fromkeys keeps its first place.
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        mask_token=MASK,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        bos_token=START_OF_TEXT,
        extra_special_tokens=[START_HEADER, END_HEADER, END_OF_TURN],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def special_ids(tokenizer: FastTokenizer, mask_token_id: int | None = None) -> SpecialIds:
    """Collect the special token ids of a tokenizer.

    Args:
        tokenizer: names its mask, end and padding token, or some of them.
        mask_token_id: the mask token, where the tokenizer names none (LLaDA's published folder).

    Returns:
        The ids; without a padding token, padding is the end of sequence.

    Raises:
        UserError: there is no mask or end-of-sequence token, or the mask token cannot be one.
    """
    name = tokenizer.name_or_path or "the tokenizer"
    mask = tokenizer.mask_token_id if mask_token_id is None else mask_token_id
    eos = tokenizer.eos_token_id
    if eos is None:
        raise UserError(
            f'{name} defines no end-of-sequence token; set "eos_token" in its tokenizer_config.json'
        )
    if mask is None:
        raise UserError(
            f"{name} defines no mask token; pass --mask-token-id (LLaDA 126336, Dream 151666)"
        )
    added = tokenizer.get_added_vocab()
    pad = eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    stops = tuple(dict.fromkeys([eos, *(added[end] for end in TURN_ENDS if end in added)]))
    if mask in (pad, *stops):
        raise UserError(
            f"--mask-token-id {mask} pads or ends a text of {name}; give an id of its own"
        )
    return SpecialIds(mask, eos, pad, stops)


def vocabulary_digest(tokenizer: FastTokenizer) -> str:
    """Recognise a vocabulary, added tokens included, by a digest of which text has which id."""
    entries = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    return hashlib.sha256(repr(entries).encode()).hexdigest()
