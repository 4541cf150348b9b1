"""Invariants of the tools that make tokenizers and pre-training data."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.tokenizers import MegatronTokenizer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tool_loading import load_tool
from transformers import PreTrainedTokenizerFast

from megatron_espo.data import preprocess as data_preprocess
from megatron_espo.data.indexed import build_pretrain_datasets
from megatron_espo.data.preprocess import check_ids, find_files, preprocess
from megatron_espo.data.tokenizer import byte_tokenizer, load_tokenizer, save_tokenizer
from megatron_espo.errors import UserError

TOOLS = Path(__file__).parents[2] / "tools"
EOS = byte_tokenizer().eos_token_id


@pytest.fixture(scope="module")
def tokenizer_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer") / "bytes"
    save_tokenizer(byte_tokenizer(), folder)
    return str(folder)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder whose documents, in order, are DOCUMENTS."""
    folder = tmp_path / "corpus"
    (folder / "b" / ".hidden").mkdir(parents=True)
    (folder / "c.txt").write_bytes("é\r\n\n".encode())
    (folder / "a.md").write_text("# one")
    (folder / "b" / "z.txt").write_text("<|mask|>")
    (folder / "b" / "empty.txt").touch()
    (folder / "b" / "code.py").write_text("left out")
    (folder / "b" / ".hidden" / "x.txt").write_text("left out")
    (folder / "d.jsonl").write_text('{"text": "two"}\n\n{"text": "three"}\n')
    return folder


DOCUMENTS = ["# one", "<|mask|>", "é\r\n\n", "two", "three"]


def read(prefix: Path) -> list[list[int]]:
    return [document.tolist() for document in IndexedDataset(str(prefix))]


def test_documents_come_out_byte_for_byte_and_in_order(
    corpus: Path, tokenizer_model: str, tmp_path: Path
) -> None:
    size = preprocess([corpus], tmp_path / "out", tokenizer_model)
    assert read(tmp_path / "out") == [[*text.encode(), EOS] for text in DOCUMENTS]
    assert (size.documents, size.empty) == (5, 1)
    assert size.tokens == sum(map(len, read(tmp_path / "out")))
    preprocess([corpus], tmp_path / "open", tokenizer_model, append_eod=False)
    assert read(tmp_path / "open") == [list(text.encode()) for text in DOCUMENTS]


def test_training_rows_hold_exactly_the_tokens_of_the_documents(
    corpus: Path, tokenizer_model: str, tmp_path: Path
) -> None:
    preprocess([corpus], tmp_path / "out", tokenizer_model)
    stream = sorted(token for text in DOCUMENTS for token in [*text.encode(), EOS])
    assert len(stream) == 31
    train, _, _ = build_pretrain_datasets(
        tokenizer=MegatronTokenizer.from_pretrained(
            tokenizer_model, metadata_path={"library": "huggingface"}
        ),
        blend=([str(tmp_path / "out")], None),
        split="1",
        seq_length=31,
        seed=0,
        num_samples=(None, 0, 0),
    )
    assert train is not None
    assert sorted(train[0]["tokens"].tolist()) == stream


def test_output_does_not_depend_on_the_number_of_workers(
    corpus: Path, tokenizer_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [json.dumps({"text": "x" * (n % 37 + 1)}) for n in range(100)]
    (corpus / "e.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(data_preprocess, "_BATCH", 3)
    for workers in (1, 2):
        preprocess([corpus], tmp_path / str(workers), tokenizer_model, workers=workers)
    for kind in ("bin", "idx"):
        one, two = ((tmp_path / f"{workers}.{kind}").read_bytes() for workers in (1, 2))
        assert one == two
    assert len(read(tmp_path / "2")) == len(DOCUMENTS) + 100
    (corpus / "f.jsonl").write_text('{"text": 1}\n')
    with pytest.raises(ValueError, match=r"f\.jsonl:1: no text under the key 'text'"):
        preprocess([corpus], tmp_path / "three", tokenizer_model, workers=2)


def test_files_named_are_taken_whatever_their_name_and_once(corpus: Path) -> None:
    code, folder = corpus / "b" / "code.py", corpus / "b"
    assert find_files([code, folder, folder], [".txt", ".py"]) == [
        str(code),
        str(folder / "empty.txt"),
        str(folder / "z.txt"),
    ]


def left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.txt", b"caf\xe9", r"bad\.txt: byte 3 is not UTF-8"),
        ("bad.jsonl", b'{"text": "a"}\n{"body": "b"}\n', r"bad\.jsonl:2: no text under .*'text'"),
        ("bad.jsonl", b'{"text": "a"}\n\n{"text"\n', r"bad\.jsonl:3: not valid JSON"),
    ],
)
def test_a_document_that_cannot_be_read_is_named_and_leaves_no_output(
    tokenizer_model: str, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    corpus = tmp_path / "in"
    corpus.mkdir()
    (corpus / "a.txt").write_text("good")
    (corpus / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        preprocess([corpus], tmp_path / "out", tokenizer_model)
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("moment", ["documents", "index"])
def test_an_interrupted_run_leaves_nothing_that_looks_finished(
    corpus: Path,
    tokenizer_model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
) -> None:
    def interrupt(*arguments: object) -> None:
        assert not {"out.bin", "out.idx"} & set(left_over(tmp_path))
        raise KeyboardInterrupt

    settings: dict[str, Any] = {}
    if moment == "documents":
        settings["progress"] = interrupt
    else:
        monkeypatch.setattr(data_preprocess.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        preprocess([corpus], tmp_path / "out", tokenizer_model, **settings)
    assert left_over(tmp_path) == []


def test_empty_input_is_refused(tokenizer_model: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(ValueError, match=r"--input .*in: holds no file ending in \.txt"):
        preprocess([tmp_path / "in"], tmp_path / "out", tokenizer_model)
    (tmp_path / "in" / "a.txt").touch()
    with pytest.raises(ValueError, match=r"--input: the 1 files hold no text"):
        preprocess([tmp_path / "in"], tmp_path / "out", tokenizer_model)
    with pytest.raises(ValueError, match=r"--input .*missing: no such file or folder"):
        preprocess([tmp_path / "missing"], tmp_path / "out", tokenizer_model)
    assert left_over(tmp_path) == []


def test_an_earlier_output_is_replaced_on_demand_only(
    corpus: Path, tokenizer_model: str, tmp_path: Path
) -> None:
    preprocess([corpus / "a.md"], tmp_path / "out", tokenizer_model)
    with pytest.raises(ValueError, match=r"--output-prefix: .*out\.bin exists"):
        preprocess([corpus / "c.txt"], tmp_path / "out", tokenizer_model)
    assert read(tmp_path / "out") == [[*b"# one", EOS]]
    preprocess([corpus / "c.txt"], tmp_path / "out", tokenizer_model, overwrite=True)
    assert read(tmp_path / "out") == [[*"é\r\n\n".encode(), EOS]]


def test_large_vocabularies_get_wide_tokens(
    corpus: Path, tokenizer_model: str, tmp_path: Path
) -> None:
    wide = load_tokenizer(tokenizer_model)
    wide.add_tokens([f"<{n}>" for n in range(70_000)])
    save_tokenizer(wide, tmp_path / "wide")
    (tmp_path / "a.txt").write_text("<69999>")
    preprocess([tmp_path / "a.txt"], tmp_path / "out", tmp_path / "wide", append_eod=False)
    assert read(tmp_path / "out") == [[262 + 69_999]]
    assert IndexedDataset(str(tmp_path / "out"))[0].dtype == np.int32


def run(name: str, arguments: Sequence[object]) -> None:
    load_tool(name).main([str(argument) for argument in arguments])


def test_tools_make_a_tokenizer_and_data_and_print_the_flags(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, prefix = tmp_path / "tokenizer", tmp_path / "my data" / "out"
    (tmp_path / "text.txt").write_text("aaaa bbbb " * 20)
    run("make_tokenizer", ["--out", made, "--train", tmp_path / "text.txt", "--vocab-size", 264])
    assert len(load_tokenizer(made)) == 264
    assert f"--tokenizer-model {made}" in capsys.readouterr().out
    run(
        "preprocess_data",
        [
            *("--input", corpus, "--ext", ".py", "--tokenizer-model", made),
            *("--output-prefix", prefix, "--no-append-eod"),
        ],
    )
    printed = capsys.readouterr().out
    assert "1 documents, 8 tokens" in printed
    assert f"--data-path '{prefix}' --tokenizer-type HuggingFaceTokenizer" in printed
    assert load_tokenizer(made).decode(read(prefix)[0]) == "left out"


def test_tools_end_with_one_line_on_a_wrong_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"^--tokenizer-model nowhere: no such"):
        run(
            "preprocess_data",
            ["--input", __file__, "--tokenizer-model", "nowhere", "--output-prefix", tmp_path],
        )
    with pytest.raises(UserError, match=r"^--out .* not an empty folder"):
        run("make_tokenizer", ["--out", Path(__file__).parent])
    with pytest.raises(UserError, match="go together"):
        run("make_tokenizer", ["--out", tmp_path / "new", "--vocab-size", 300])


@pytest.mark.parametrize("far", [300, 65499, 65535, 70000])
def test_ids_far_beyond_the_number_of_tokens_are_written_as_they_are(
    far: int, tmp_path: Path
) -> None:
    """Three tokens, one of them with a large id: 70000 is 4464 in 16 bits."""
    vocabulary = {"<|endoftext|>": 0, "cat": 1, "dog": far}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<|endoftext|>"))
    words.pre_tokenizer = Whitespace()
    save_tokenizer(
        PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|endoftext|>"),
        tmp_path / "tokenizer",
    )
    (tmp_path / "text.txt").write_text("dog cat dog")
    preprocess([tmp_path / "text.txt"], tmp_path / "out", tmp_path / "tokenizer")
    assert read(tmp_path / "out") == [[far, 1, far, 0]]


@pytest.mark.parametrize(
    ("ids", "dtype", "named"),
    [([1, 65536], np.uint16, 65536), ([-1, 2], np.uint16, -1), ([0, 2**31], np.int32, 2**31)],
)
def test_an_id_that_would_wrap_around_is_refused(ids: list[int], dtype: type, named: int) -> None:
    with pytest.raises(UserError, match=f"token id {named} does not fit"):
        check_ids(np.array(ids, np.int64), dtype)
    check_ids(np.array([0, np.iinfo(dtype).max]), dtype)
