"""Invariants of the pre-training data: every token, in order, under a key of its own."""

import argparse
import itertools
import pickle
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.datasets.utils import Split
from megatron.core.tokenizers import MegatronTokenizer
from torch.utils.data import DataLoader

from megatron_espo.data.corpus import split_spans
from megatron_espo.data.indexed import (
    Blend,
    PretrainDataset,
    build_pretrain_datasets,
    pretrain_datasets_from_args,
)
from megatron_espo.data.tokenizer import byte_tokenizer, save_tokenizer

SEQ = 8


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer") / "bytes"
    save_tokenizer(byte_tokenizer(), folder)
    return MegatronTokenizer.from_pretrained(str(folder), metadata_path={"library": "huggingface"})


def write(prefix: Path, documents: Sequence[Sequence[int]]) -> str:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for document in documents:
        builder.add_document(np.array(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def documents_of(lengths: Sequence[int], start: int = 0) -> list[list[int]]:
    """Return documents in which every token differs from all others."""
    ends = np.cumsum([start, *lengths])
    return [list(range(a, b)) for a, b in itertools.pairwise(ends)]


def build(tokenizer: Any, tmp_path: Path, blend: Blend | None, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "blend": blend,
        "split": "1,0,0",
        "num_samples": (None, 0, 0),
        "seq_length": SEQ,
        "seed": 3,
        "cache_path": str(tmp_path / "cache"),
    }
    return build_pretrain_datasets(tokenizer=tokenizer, **settings | changes)


def tokens_of(dataset: Any) -> list[list[int]]:
    return [row["tokens"].tolist() for row in dataset]


def flat(rows: list[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(rows))


# The last corpus has documents that end where a row ends, and one of a single token.
@pytest.mark.parametrize("lengths", [[40], [3, 5, 8, 1, 23], [16, 8, 8, 24], [8, 1, 7, 8, 20]])
def test_rows_are_the_shuffled_documents_token_by_token(
    tokenizer: Any, tmp_path: Path, lengths: list[int]
) -> None:
    documents = documents_of(lengths)
    train, _, _ = build(tokenizer, tmp_path, ([write(tmp_path / "a", documents)], None))
    rows = tokens_of(train)
    in_order = [row for _, row in sorted(zip(train.shuffle_index.tolist(), rows, strict=True))]
    stream = [token for place in train.document_index for token in documents[place]]
    kept = len(stream) // SEQ * SEQ
    assert sorted(train.document_index.tolist()) == list(range(len(lengths)))
    assert flat(in_order) == stream[:kept]


def test_every_token_comes_once_an_epoch(tokenizer: Any, tmp_path: Path) -> None:
    documents = documents_of([3, 5, 8, 1, 23])  # five rows an epoch, none cut
    train, _, _ = build(
        tokenizer, tmp_path, ([write(tmp_path / "a", documents)], None), num_samples=(15, 0, 0)
    )
    assert len(train) == 15
    assert Counter(flat(tokens_of(train))) == Counter(dict.fromkeys(range(40), 3))


def test_a_row_holds_tokens_and_its_key_only(tokenizer: Any, tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", documents_of([40]))
    train, valid, test = build(tokenizer, tmp_path, ([prefix], None), num_samples=(12, 0, 0))
    assert valid is None
    assert test is None
    batch = next(iter(DataLoader(train, batch_size=4)))
    assert set(batch) == {"tokens", "sample_id"}
    assert batch["tokens"].shape == (4, SEQ)
    assert batch["tokens"].dtype == batch["sample_id"].dtype == torch.int64
    assert [int(row["sample_id"]) for row in train] == list(range(len(train)))
    for outside in (-1, len(train)):
        with pytest.raises(IndexError):
            train[outside]


def test_padding_and_end_tokens_in_the_data_stay_as_they_are(tmp_path: Path) -> None:
    plain = byte_tokenizer()
    plain.pad_token = plain.bos_token  # not the end of sequence, so Megatron would blank it out
    save_tokenizer(plain, tmp_path / "tokenizer")
    tokenizer = MegatronTokenizer.from_pretrained(
        str(tmp_path / "tokenizer"), metadata_path={"library": "huggingface"}
    )
    document = [tokenizer.pad, tokenizer.eod, 7, tokenizer.mask] * 2
    train, _, _ = build(tokenizer, tmp_path, ([write(tmp_path / "a", [document])], None))
    assert tokens_of(train) == [document]


def test_order_depends_on_the_seed_alone(tokenizer: Any, tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", documents_of([5] * 40))

    def rows(cache: str, seed: int) -> list[list[int]]:
        path = str(tmp_path / cache)
        return tokens_of(
            build(tokenizer, tmp_path, ([prefix], None), cache_path=path, seed=seed)[0]
        )

    assert rows("one", 3) == rows("two", 3) == rows("one", 3)
    assert rows("one", 3) != rows("one", 4)


def test_a_new_corpus_at_the_same_path_does_not_use_the_old_indices(
    tokenizer: Any, tmp_path: Path
) -> None:
    blend = ([str(tmp_path / "a")], None)
    write(tmp_path / "a", documents_of([30, 10]))
    assert len(build(tokenizer, tmp_path, blend)[0]) == 5
    replacement = [list(range(39, 0, -1)), [0]]  # as many documents and tokens as before
    write(tmp_path / "a", replacement)
    train, _, _ = build(tokenizer, tmp_path, blend)
    assert sorted(flat(tokens_of(train))) == list(range(40))


def test_splits_share_no_document(tokenizer: Any, tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", documents_of([8] * 20))
    sets = build(
        tokenizer, tmp_path, ([prefix], None), split="70,20,10", num_samples=(None, None, None)
    )
    seen = [set(flat(tokens_of(dataset))) for dataset in sets]
    assert [len(tokens) for tokens in seen] == [112, 32, 16]
    assert len(set.union(*seen)) == 160
    assert [dataset.index_split for dataset in sets] == list(Split)


def test_each_split_may_have_files_of_its_own(tokenizer: Any, tmp_path: Path) -> None:
    one, two = (write(tmp_path / n, documents_of([16], s)) for n, s in (("a", 0), ("b", 100)))
    train, valid, test = build(
        tokenizer,
        tmp_path,
        None,
        split=None,
        blend_per_split=[([one], None), ([two], None), None],
        num_samples=(2, None, 5),
    )
    assert sorted(flat(tokens_of(train))) == list(range(16))
    assert sorted(flat(tokens_of(valid))) == list(range(100, 116))
    assert not isinstance(valid, list)
    assert test is None


def blended(tokenizer: Any, tmp_path: Path, weights: list[float] | None, count: int | None) -> Any:
    one = write(tmp_path / "a", documents_of([8] * 3))
    two = write(tmp_path / "b", documents_of([8] * 9, start=100))
    return build(tokenizer, tmp_path, ([one, two], weights), num_samples=(count, 0, 0))[0]


def test_rows_of_a_blend_have_keys_of_their_own(tokenizer: Any, tmp_path: Path) -> None:
    train = blended(tokenizer, tmp_path, [1.0, 1.0], 40)
    ids = [int(row["sample_id"]) for row in train]
    assert ids == list(range(len(train)))
    assert set(train[0]) == {"tokens", "sample_id"}
    assert train.split is Split.train
    with pytest.raises(IndexError):
        train[len(train)]


@pytest.mark.parametrize(("weights", "share"), [([1.0, 1.0], 0.5), (None, 0.25)])
def test_a_blend_follows_its_weights_and_else_the_tokens(
    tokenizer: Any, tmp_path: Path, weights: list[float] | None, share: float
) -> None:
    train = blended(tokenizer, tmp_path, weights, 40)  # more than one epoch of either
    assert len(train) >= 40
    of_first = sum(max(row) < 100 for row in tokens_of(train)[:40])
    assert of_first == pytest.approx(40 * share, abs=1)


@pytest.mark.parametrize("weights", [[3.0, 1.0], None])
def test_one_epoch_of_a_blend_is_every_row_once(
    tokenizer: Any, tmp_path: Path, weights: list[float] | None
) -> None:
    train = blended(tokenizer, tmp_path, weights, None)
    assert sorted(flat(tokens_of(train))) == [*range(24), *range(100, 172)]


def test_datasets_can_be_sent_to_loader_processes(tokenizer: Any, tmp_path: Path) -> None:
    train = blended(tokenizer, tmp_path, None, 20)
    assert tokens_of(pickle.loads(pickle.dumps(train))) == tokens_of(train)


@pytest.mark.parametrize("gone", ["bin", "idx"])
def test_missing_files_are_named_with_the_flag(tokenizer: Any, tmp_path: Path, gone: str) -> None:
    prefix = write(tmp_path / "a", documents_of([40]))
    (tmp_path / f"a.{gone}").unlink()
    with pytest.raises(ValueError, match=rf"^--data-path .*a: .*a\.{gone} is missing"):
        build(tokenizer, tmp_path, ([prefix], None))
    with pytest.raises(ValueError, match=r"^--valid-data-path"):
        build(
            tokenizer,
            tmp_path,
            None,
            blend_per_split=[None, ([prefix], None), None],
            num_samples=(0, 1, 0),
        )
    with pytest.raises(ValueError, match=r"^--data-path is missing"):
        build(tokenizer, tmp_path, None)


@pytest.mark.parametrize("file", ["bin", "idx"])
@pytest.mark.parametrize("keep", [0, 20, -2])
def test_files_cut_short_are_refused(tokenizer: Any, tmp_path: Path, file: str, keep: int) -> None:
    prefix = write(tmp_path / "a", documents_of([40]))
    path = tmp_path / f"a.{file}"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"^--data-path .* are broken or not a pair"):
        build(tokenizer, tmp_path, ([prefix], None))


def test_data_of_another_tokenizer_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", [[1] * 40, [262]])
    with pytest.raises(ValueError, match=r"holds token 262, --tokenizer-model has only 262"):
        build(tokenizer, tmp_path, ([prefix], None))


def test_a_set_without_documents_is_refused_only_when_it_is_asked_for(
    tokenizer: Any, tmp_path: Path
) -> None:
    blend = ([write(tmp_path / "a", documents_of([20, 20]))], None)
    train, valid, _ = build(tokenizer, tmp_path, blend, split="99,1,0", num_samples=(7, 0, 0))
    assert len(train) >= 7
    assert valid is None
    assert {path.name.split("-")[2] for path in (tmp_path / "cache").iterdir()} == {"train"}
    with pytest.raises(
        ValueError, match=r"2 documents leave 0 tokens for the valid set of --split"
    ):
        build(tokenizer, tmp_path, blend, split="99,1,0", num_samples=(7, 1, 0))
    with pytest.raises(ValueError, match=r"20 tokens for the valid set .* --seq-length 32"):
        build(tokenizer, tmp_path, blend, split="1,1", num_samples=(7, None, 0), seq_length=32)


def test_weights_must_be_positive(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--data-path: the weights \[1.0, 0.0\]"):
        blended(tokenizer, tmp_path, [1.0, 0.0], 4)


def test_split_is_shares_of_the_documents() -> None:
    assert split_spans("98, 1,1") == [(0.0, 0.98), (0.98, 0.99), (0.99, 1.0)]
    assert split_spans("1") == [(0.0, 1.0), None, None]
    assert split_spans("0,.5,1.5") == [None, (0.0, 0.25), (0.25, 1.0)]
    for wrong in (None, "", "a,b", "1,1,1,1", "-1,2", "0,0,0", "1,,2"):
        with pytest.raises(ValueError, match=r"--split"):
            split_spans(wrong)


def arguments(prefix: str, cache: Path, **changes: Any) -> argparse.Namespace:
    names = ("data_args_path", "train_data_path", "valid_data_path", "test_data_path")
    values: dict[str, Any] = dict.fromkeys([*names, "per_split_data_args_path"])
    values |= {"data_path": [prefix], "split": "50,50,0", "seq_length": SEQ, "seed": 3}
    values |= {"data_cache_path": str(cache), "mmap_bin_files": False}
    values |= {"num_dataset_builder_threads": 1, "mid_level_dataset_surplus": 0.005}
    return argparse.Namespace(**values | changes)


def test_megatrons_flags_describe_the_data(tokenizer: Any, tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", documents_of([8] * 8))
    args = arguments(prefix, tmp_path / "cache")
    train, valid, test = pretrain_datasets_from_args(args, (6, None, 0), tokenizer)
    assert isinstance(train, PretrainDataset)
    assert isinstance(valid, PretrainDataset)
    assert (len(train), len(valid), test) == (8, 4, None)
    assert not train.dataset.mmap
    assert max(flat(tokens_of(train))) < 32 <= min(flat(tokens_of(valid)))
    assert train.config.random_seed == 3
    assert list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("flag", ["mock_data", "reset_attention_mask", "multiple_validation_sets"])
def test_flags_without_meaning_here_are_refused(tokenizer: Any, tmp_path: Path, flag: str) -> None:
    args = arguments("unused", tmp_path, **{flag: True})
    with pytest.raises(ValueError, match=f"^--{flag.replace('_', '-')} is not supported"):
        pretrain_datasets_from_args(args, (1, 1, 1), tokenizer)
