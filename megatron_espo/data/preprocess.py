"""Text files and JSONL to the .bin/.idx files that Megatron-Core's data sets read.

The worker processes need only the tokenizers library, so this module imports nothing heavier at
its top: a spawned worker starts in a fraction of a second.
"""

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike, NDArray
from tokenizers import Tokenizer

from megatron_espo.data.jsonl import parse_line, read_lines, read_text
from megatron_espo.errors import UserError

_BATCH = 64  # documents handed to a worker at a time
_QUEUED = 4  # batches waiting per worker; bounds the memory for any size of corpus


@dataclass(frozen=True)
class Source:
    """One document to tokenize: a whole file, or one line of a JSONL file."""

    path: str
    line_number: int = 0
    line: bytes | None = None


@dataclass(frozen=True)
class CorpusSize:
    """What `preprocess` wrote."""

    documents: int
    tokens: int
    empty: int
    """Documents without text, left out."""


def find_files(inputs: Sequence[str | Path], extensions: Sequence[str]) -> list[str]:
    """List the input files in a fixed order.

    Args:
        inputs: files, taken whatever their name, and folders, searched through except for hidden
            files and folders.
        extensions: endings of the files to take from folders, with the dot.

    Returns:
        Paths without repetition, in the order of the inputs and sorted within a folder.

    Raises:
        UserError: an input is missing or a folder holds no such file.
    """
    files: dict[str, None] = {}
    for given in map(Path, inputs):
        if given.is_dir():
            inside = sorted(path.relative_to(given).as_posix() for path in given.rglob("*"))
            found = [
                str(given / name)
                for name in inside
                if name.endswith(tuple(extensions))
                and not any(part.startswith(".") for part in name.split("/"))
                and (given / name).is_file()
            ]
            if not found:
                raise UserError(
                    f"--input {given}: holds no file ending in {' '.join(extensions)}; "
                    "change the folder or --ext"
                )
            files.update(dict.fromkeys(found))
        elif given.is_file():
            files[str(given)] = None
        else:
            raise UserError(f"--input {given}: no such file or folder; correct the path")
    return list(files)


def read_sources(files: Sequence[str]) -> Iterator[Source]:
    """Yield the documents of files in order: the lines of .jsonl files, all others whole."""
    for path in files:
        if path.endswith(".jsonl"):
            yield from (Source(path, number, line) for number, line in read_lines(path))
        else:
            yield Source(path)


def document_text(source: Source, json_key: str) -> str:
    """Return the text of a document.

    Args:
        source: the document.
        json_key: key of the text in a JSONL line.

    Returns:
        The text, unchanged.

    Raises:
        UserError: the file cannot be read or decoded, or the line has no text under the key.
    """
    if source.line is None:
        return read_text(source.path)
    text = parse_line(source.path, source.line_number, source.line).get(json_key)
    if not isinstance(text, str):
        raise UserError(
            f"{source.path}:{source.line_number}: no text under the key {json_key!r}; "
            "add it or change --json-key"
        )
    return text


class _Encoder:
    """Tokenizes documents; a class so that a worker process builds its tokenizer once."""

    def __init__(self, serialized: str, json_key: str, end: int | None) -> None:
        self.tokenizer = Tokenizer.from_str(serialized)
        # A document that spells a special token (a mask!) must not smuggle it into the data.
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.json_key = json_key
        self.end = [] if end is None else [end]

    def __call__(self, sources: Sequence[Source]) -> list[NDArray[np.int32]]:
        """Return the ids of each document; an empty array for a document without text."""
        rows = []
        for source in sources:
            text = document_text(source, self.json_key)
            ids = self.tokenizer.encode(text, add_special_tokens=False).ids
            rows.append(np.array(ids + self.end if ids else [], dtype=np.int32))
        return rows


_worker: _Encoder | None = None


def _start_worker(serialized: str, json_key: str, end: int | None) -> None:
    global _worker
    _worker = _Encoder(serialized, json_key, end)


def _work(sources: Sequence[Source]) -> list[NDArray[np.int32]]:
    assert _worker is not None
    return _worker(sources)


def _encode_all(
    sources: Iterator[Source], encoder: tuple[str, str, int | None], workers: int
) -> Iterator[NDArray[np.int32]]:
    """Yield the ids of all documents in order, whatever the number of workers."""
    batches = itertools.batched(sources, _BATCH)
    if workers == 1:
        encode = _Encoder(*encoder)
        for batch in batches:
            yield from encode(batch)
        return
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_start_worker, initargs=encoder
    )
    try:
        pending: deque[Future[list[NDArray[np.int32]]]] = deque()
        for batch in batches:
            pending.append(pool.submit(_work, batch))
            if len(pending) >= _QUEUED * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def check_ids(ids: NDArray[np.integer], dtype: DTypeLike) -> None:
    """Check that token ids survive the type that they are written in, before they are.

    Megatron's builder casts, and an id that does not fit wraps around to another one.

    Args:
        ids: token ids of a document.
        dtype: what they are written in.

    Raises:
        UserError: naming the id.
    """
    limits = np.iinfo(np.dtype(dtype))
    for found in (int(ids.min()), int(ids.max())):
        if not limits.min <= found <= limits.max:
            raise UserError(
                f"--tokenizer-model: token id {found} does not fit {limits.dtype}, in which "
                "its vocabulary's ids are written; mend the ids in its tokenizer.json"
            )


def preprocess(
    inputs: Sequence[str | Path],
    output_prefix: str | Path,
    tokenizer_model: str | Path,
    *,
    extensions: Sequence[str] = (".txt", ".md", ".jsonl"),
    json_key: str = "text",
    append_eod: bool = True,
    workers: int = 1,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda documents, tokens: None,
) -> CorpusSize:
    """Tokenize a corpus into PREFIX.bin and PREFIX.idx; the files appear when complete.

    Args:
        inputs: files and folders, see `find_files`.
        output_prefix: path of the output without .bin or .idx.
        tokenizer_model: tokenizer folder.
        extensions: endings of the files to take from folders.
        json_key: key of the text in the lines of .jsonl files.
        append_eod: whether to end every document with the end-of-sequence token.
        workers: processes that tokenize; the output does not depend on it.
        overwrite: whether to replace an earlier output.
        progress: called with the documents and tokens written so far.

    Returns:
        What was written.

    Raises:
        UserError: the input, the output or an option cannot be used.
    """
    # Here and not at the top for the sake of the workers: seconds of imports.
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    from megatron_espo.data.tokenizer import load_tokenizer

    final = {kind: Path(f"{output_prefix}.{kind}") for kind in ("bin", "idx")}
    if workers < 1:
        raise UserError(f"--workers {workers}: give at least 1")
    for path in final.values():
        if path.exists() and not overwrite:
            raise UserError(f"--output-prefix: {path} exists; choose another or pass --overwrite")
    files = find_files(inputs, extensions)
    tokenizer = load_tokenizer(tokenizer_model)
    end = tokenizer.eos_token_id if append_eod else None
    if append_eod and end is None:
        raise UserError(
            f"--tokenizer-model {tokenizer_model} defines no end-of-sequence token; "
            "set it there or pass --no-append-eod"
        )
    encoder = (tokenizer.backend_tokenizer.to_str(), json_key, end)

    final["bin"].parent.mkdir(parents=True, exist_ok=True)
    made = {kind: path.with_name(f".{path.name}.{os.getpid()}.tmp") for kind, path in final.items()}
    try:
        # Ids need not be dense: an added token may lie far beyond the number of tokens.
        largest = max(tokenizer.get_vocab().values())
        dtype = DType.optimal_dtype(largest + 1)
        builder = IndexedDatasetBuilder(str(made["bin"]), dtype=dtype)
        try:
            documents, tokens, empty = 0, 0, 0
            for ids in _encode_all(read_sources(files), encoder, workers):
                if len(ids):
                    check_ids(ids, dtype)
                    builder.add_document(ids, [len(ids)])
                documents, empty = documents + (len(ids) > 0), empty + (len(ids) == 0)
                tokens += len(ids)
                progress(documents, tokens)
        finally:
            builder.data_file.close()
        if documents == 0:
            raise UserError(f"--input: the {len(files)} files hold no text; give other files")
        builder.finalize(str(made["idx"]))
        # The index is what makes a data set: gone first, back last.
        final["idx"].unlink(missing_ok=True)
        os.replace(made["bin"], final["bin"])
        os.replace(made["idx"], final["idx"])
    finally:
        for path in made.values():
            path.unlink(missing_ok=True)
    return CorpusSize(documents, tokens, empty)
