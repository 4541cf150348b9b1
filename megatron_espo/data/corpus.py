"""Checks on Megatron's .bin/.idx files that are cheap for any size of corpus.

They run on every rank before the first collective: a file that is missing or broken must not show
as a hang or as a failed look-up in the embedding.
"""

import hashlib
import itertools
import os
import re
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import DType

from megatron_espo.errors import UserError

_FINGERPRINT_BYTES = 2**20
_CHECKED_TOKENS = 2**20
_NUM_SPLITS = 3  # train, valid, test


def split_spans(split: str | None) -> list[tuple[float, float] | None]:
    """Turn Megatron's --split into a share of the documents for each set.

    Args:
        split: up to three numbers, for training, validation and test, for example "99,1,0".

    Returns:
        For each set where its share begins and ends, from 0 to 1; None where it is empty.

    Raises:
        UserError: these are not such numbers.
    """
    number = r"\s*(\d+\.?\d*|\.\d+)\s*"
    if split is None or not re.fullmatch(rf"{number}(,{number}){{0,2}}", split):
        raise UserError(f'--split {split}: give up to three numbers, for example "99,1,0"')
    shares = [float(share) for share in split.split(",")] + [0.0, 0.0]
    total = sum(shares)
    if total == 0.0:
        raise UserError(f'--split {split}: leaves nothing for any set; use for example "99,1,0"')
    edges = [sum(shares[:count]) / total for count in range(_NUM_SPLITS + 1)]
    return [(a, b) if b > a else None for a, b in itertools.pairwise(edges)]


@dataclass(frozen=True)
class Corpus:
    """The outline of a .bin/.idx pair."""

    prefix: str
    starts: np.memmap[Any, Any]  # int64 [documents], first byte of each in the .bin file
    num_bytes: int
    token_size: int
    fingerprint: str

    def tokens_in(self, span: tuple[float, float]) -> int:
        """Count the tokens in a share of the documents, cut as Megatron's builder cuts."""
        places = [round(edge * float(len(self.starts))) for edge in span]
        begin, end = (
            int(self.starts[place]) if place < len(self.starts) else self.num_bytes
            for place in places
        )
        return (end - begin) // self.token_size


def inspect_corpus(prefix: str, flag: str, vocab_size: int) -> Corpus:
    """Check a .bin/.idx pair: sizes, header and the first million tokens.

    Args:
        prefix: path of the files without .bin and .idx.
        flag: the flag that names the prefix, for the errors.
        vocab_size: number of token ids of the tokenizer.

    Returns:
        The outline of the pair.

    Raises:
        UserError: a file is missing or broken, or holds tokens beyond the vocabulary.
    """
    idx, data = f"{prefix}.idx", f"{prefix}.bin"
    for path in (idx, data):
        if not os.path.isfile(path):
            raise UserError(
                f"{flag} {prefix}: {path} is missing; give the path without .bin or .idx, or make "
                "the files with tools/preprocess_data.py"
            )
    with open(idx, "rb") as file:
        beginning = file.read(_FINGERPRINT_BYTES)
    idx_bytes, num_bytes = os.path.getsize(idx), os.path.getsize(data)
    # Megatron's index: magic, version, token type, number of sequences and of documents + 1; then
    # length (int32) and first byte (int64) of the sequences and the documents' ends (int64).
    header = struct.Struct("<9sQBQQ")
    broken = f"{flag} {prefix}: the .bin and .idx files are broken or not a pair; make them again"
    if len(beginning) < header.size:
        raise UserError(broken)
    magic, version, code, rows, ends = header.unpack_from(beginning)
    expected = header.size + 12 * rows + 8 * ends
    if magic != b"MMIDIDX\0\0" or version != 1 or expected != idx_bytes or rows == 0:
        raise UserError(broken)
    token_type = np.dtype(DType.dtype_from_code(code))
    lengths = np.memmap(idx, np.int32, "r", header.size, (rows,))
    starts = np.memmap(idx, np.int64, "r", header.size + 4 * rows, (rows,))
    if num_bytes != int(starts[-1]) + int(lengths[-1]) * token_type.itemsize:
        raise UserError(broken)
    largest = int(np.fromfile(data, token_type, _CHECKED_TOKENS).max(initial=0))
    if largest >= vocab_size:
        raise UserError(
            f"{flag} {prefix}: holds token {largest}, --tokenizer-model has only {vocab_size}; "
            "make the data with the same tokenizer"
        )
    outline = f"{idx_bytes} {num_bytes} ".encode() + beginning
    return Corpus(
        prefix, starts, num_bytes, token_type.itemsize, hashlib.sha256(outline).hexdigest()
    )
