"""Invariants of fine-tuning rows: layout, length checks, order of the epochs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from megatron_espo.data.encoding import encode_prompt
from megatron_espo.data.jsonl import read_jsonl
from megatron_espo.data.sft import read_examples, read_rows
from megatron_espo.data.sft_dataset import SftDataset, epoch_order
from megatron_espo.data.tokenizer import byte_tokenizer, special_ids

TOKENIZER = byte_tokenizer()
IDS = special_ids(TOKENIZER)
EOS, EOT = IDS.eos_token_id, TOKENIZER.convert_tokens_to_ids("<|eot_id|>")
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
]


def write(path: Path, records: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def pair(prompt: str, completion: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


READ = ("seq_length", "completion_length", "skip_long")


def rows(path: Path, **settings: Any) -> SftDataset:
    settings = {"seq_length": 12, **settings}
    read = {name: settings.pop(name) for name in READ if name in settings}
    return SftDataset(read_rows(path, TOKENIZER, IDS, **read), **settings)


def test_a_row_is_prompt_completion_end_of_sequence_padding(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = "<|startoftext|>"
    ids = special_ids(tokenizer)
    path = write(tmp_path / "a.jsonl", [pair("ab", "xyz")])
    row = SftDataset(read_rows(path, tokenizer, ids, seq_length=12, completion_length=6))[0]
    assert row["tokens"].tolist() == [97, 98, 120, 121, 122, EOS, EOS, EOS, 258, 258, 258, 258]
    assert (row["prompt_length"], row["completion_length"], row["sample_id"]) == (2, 6, 0)


def test_rows_that_are_filled_up_are_all_as_long_as_the_sequence(tmp_path: Path) -> None:
    row = rows(write(tmp_path / "a.jsonl", [pair("ab", "xyz")]), seq_length=8)[0]
    assert row["tokens"].tolist() == [97, 98, 120, 121, 122, EOS, EOS, EOS]
    assert (row["prompt_length"], row["completion_length"]) == (2, 6)


def test_rows_collate_to_int64_tensors(tmp_path: Path) -> None:
    data = rows(write(tmp_path / "a.jsonl", [pair("a" * n, "b") for n in range(5)]))
    batch = next(iter(DataLoader(data, batch_size=5)))
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        "tokens": (5, 12),
        "prompt_length": (5,),
        "completion_length": (5,),
        "sample_id": (5,),
    }
    assert {value.dtype for value in batch.values()} == {torch.int64}
    assert (batch["prompt_length"] + batch["completion_length"] == 12).all()


def test_a_written_end_of_sequence_is_not_doubled(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [pair("a", "b<|endoftext|>"), pair("a", "b")])
    assert [e.completion for e in read_examples(path, TOKENIZER, IDS)] == [[98, EOS]] * 2


def test_a_chat_is_prompted_as_in_generation_and_keeps_its_end_of_turn(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"messages": CHAT}])
    (example,) = read_examples(path, TOKENIZER, IDS)
    assert example.prompt == encode_prompt(TOKENIZER, CHAT[:-1])
    assert example.completion == [ord("4"), EOT, EOS]


def test_a_line_end_of_the_chat_format_is_not_part_of_the_answer(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<|eot_id|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    )
    path = write(tmp_path / "a.jsonl", [{"messages": CHAT}])
    (example,) = read_examples(path, tokenizer, IDS)
    assert example.completion == [ord("4"), EOT, EOS]


def test_a_header_that_is_always_written_is_not_part_of_the_answer(tmp_path: Path) -> None:
    # As LLaDA's published template does.
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% set content = '<|start_header_id|>' + m['role'] + "
        "'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
        "{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    )
    path = write(tmp_path / "a.jsonl", [{"messages": CHAT}])
    (example,) = read_examples(path, tokenizer, IDS)
    assert example.prompt == encode_prompt(tokenizer, CHAT[:-1])
    assert example.completion == [ord("4"), EOT, EOS]


def test_a_template_that_rewrites_the_prompt_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}"
    path = write(tmp_path / "a.jsonl", [{"messages": CHAT}])
    with pytest.raises(ValueError, match=r"a\.jsonl:1: the chat template writes the prompt"):
        list(read_examples(path, tokenizer, IDS))


LONG = [pair("ab", "xyz"), pair("ab", "x" * 6), pair("a" * 9, "xyz")]


@pytest.mark.parametrize(
    ("line", "settings", "message"),
    [
        (2, {"seq_length": 8}, r"prompt \(2 tokens\) and completion \(7\) .* --seq-length 8"),
        (
            2,
            {"completion_length": 5},
            "completion has 7 tokens, end of sequence included, .*--sft-completion-length 5",
        ),
        (3, {"completion_length": 7}, r"prompt \(9 tokens\) and completion \(7\) .*-length 12"),
    ],
)
def test_what_does_not_fit_is_refused_by_line_or_left_out_and_counted(
    tmp_path: Path, line: int, settings: dict[str, int], message: str
) -> None:
    path = write(tmp_path / "a.jsonl", LONG)
    with pytest.raises(ValueError, match=rf"a\.jsonl:{line}: .*{message}"):
        rows(path, **settings)
    data = rows(path, **settings, skip_long=True, shuffle=False)
    assert data.rows.num_skipped + len(data.rows) == 3
    assert data.rows.num_skipped == (1 if line == 3 else 2)
    assert data[0]["tokens"][:6].tolist() == [97, 98, 120, 121, 122, EOS]


def test_an_example_that_fits_exactly_is_kept(tmp_path: Path) -> None:
    data = rows(write(tmp_path / "a.jsonl", [pair("ab", "xyz")]), seq_length=6, completion_length=4)
    assert data[0]["tokens"].tolist() == [97, 98, 120, 121, 122, EOS]


def test_a_completion_that_fills_its_fixed_length_needs_no_end_of_sequence(tmp_path: Path) -> None:
    data = rows(write(tmp_path / "a.jsonl", [pair("ab", "xyz")]), seq_length=5, completion_length=3)
    assert data[0]["tokens"].tolist() == [97, 98, 120, 121, 122]
    assert data[0]["completion_length"] == 3


def test_a_file_of_which_nothing_fits_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", LONG)
    with pytest.raises(ValueError, match=r"none of the 3 examples fits; raise --seq-length 2"):
        rows(path, seq_length=2, skip_long=True)
    with pytest.raises(ValueError, match=r"--sft-completion-length 13 must lie between 1 and"):
        rows(path, completion_length=13)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a"}, 'needs the texts "prompt" and "completion"'),
        ({"prompt": "a", "completion": 4}, 'needs the texts "prompt" and "completion"'),
        (pair("a", ""), "the completion is empty"),
        (pair("a", "b<|mask|>"), "spells the mask token"),
        (pair("a<|mask|>", "b"), "spells the mask token"),
        ({"messages": "hi"}, '"messages" must be a list'),
        ({"messages": CHAT[:-1]}, "end with an assistant message"),
        ({"messages": CHAT[-1:]}, "must hold a prompt"),
        ({"messages": [{"role": "user"}, CHAT[-1]]}, 'needs a text "role" and "content"'),
        (["a"], "holds a JSON list"),
    ],
)
def test_a_line_that_is_no_example_is_named(tmp_path: Path, record: object, message: str) -> None:
    path = write(tmp_path / "a.jsonl", [pair("a", "b"), {"messages": CHAT}, record])
    with pytest.raises(ValueError, match=rf"a\.jsonl:3: .*{message}"):
        list(read_examples(path, TOKENIZER, IDS))


@pytest.mark.parametrize("count", [1, 2, 50])
def test_every_epoch_is_a_permutation_of_its_own(tmp_path: Path, count: int) -> None:
    path = write(tmp_path / "a.jsonl", [pair(f"{n:02}", "x") for n in range(count)])
    data = rows(path, num_samples=3 * count, seed=5)
    assert len(data) == 3 * count
    seen = [(int(row["sample_id"]), bytes(row["tokens"][:2].tolist())) for row in data]
    assert [index for index, _ in seen] == list(range(3 * count))
    epochs = [[text for _, text in seen[e * count : (e + 1) * count]] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == [b"%02d" % n for n in range(count)]
    if count == 50:
        assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    with pytest.raises(IndexError):
        data[3 * count]
    with pytest.raises(IndexError):
        data[-1]


def test_a_row_does_not_depend_on_how_many_rows_are_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [pair(f"{n:02}", "x") for n in range(20)])
    short, long = rows(path, num_samples=25, seed=1), rows(path, num_samples=60, seed=1)
    assert [r["tokens"].tolist() for r in short] == [long[i]["tokens"].tolist() for i in range(25)]
    assert len(rows(path)) == 20


def test_order_is_that_of_the_seed_or_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [pair(f"{n:02}", "x") for n in range(20)])

    def prompts(**settings: Any) -> list[bytes]:
        return [bytes(row["tokens"][:2].tolist()) for row in rows(path, **settings)]

    assert prompts(seed=1) == prompts(seed=1) != prompts(seed=2)
    in_file = [b"%02d" % n for n in range(20)]
    assert prompts(shuffle=False, num_samples=40, seed=1) == in_file * 2


def test_epoch_order_never_changes() -> None:
    # Resumed runs rely on it, whatever the version of numpy.
    assert epoch_order(8, 1234, 0).tolist() == [7, 3, 0, 1, 4, 2, 5, 6]
    assert epoch_order(8, 1234, 1).tolist() == [0, 5, 6, 4, 2, 1, 7, 3]


def test_jsonl_is_read_by_line_and_errors_name_it(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\r\n\n{"b": "\xe2\x80\xa8"}')
    assert list(read_jsonl(path)) == [(1, {"a": 1}), (3, {"b": "\u2028"})]
    for content, where in (
        (b"", ":1: the file is empty"),
        (b"\n\n", ":1: the file is empty"),
        (b'{}\n\n{"a": }\n', ":3: not valid JSON"),
        (b"{}\n[1]\n", ":2: holds a JSON list"),
        (b'{"a": "\xe9"}\n', ":1: byte 7 of the line is not UTF-8"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"a\.jsonl{where}"):
            list(read_jsonl(path))
    with pytest.raises(ValueError, match=r"missing\.jsonl: cannot be read \(No such file"):
        list(read_jsonl(tmp_path / "missing.jsonl"))
