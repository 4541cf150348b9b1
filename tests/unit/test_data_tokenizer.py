"""Invariants of the tokenizers, the chat format and the decoding of completions."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_espo.data import tokenizer as data_tokenizer
from megatron_espo.data.encoding import decode_completion, encode_prompt
from megatron_espo.data.tokenizer import (
    SPECIAL_TOKENS,
    byte_tokenizer,
    load_tokenizer,
    save_tokenizer,
    special_ids,
    train_tokenizer,
)

MESSAGES = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": " 4 "},
    {"role": "user", "content": "sure?"},
]
CHAT_TEXT = (
    "<|startoftext|>"
    "<|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n 4 <|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nsure?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
BYTES = byte_tokenizer()
PLAIN_TEXT = st.text(st.characters(exclude_categories=["Cs"])).filter(
    lambda text: not any(token in text for token in SPECIAL_TOKENS)
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    words = ["mask", "masked", "masking", "diffusion", "diffuse", "été", "language", "model"]
    path.write_text(" ".join(words[i % 8] for i in range(400)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(corpus: Path) -> PreTrainedTokenizerFast:
    return train_tokenizer([corpus], 290)


@settings(max_examples=200, deadline=None)
@given(PLAIN_TEXT)
def test_byte_tokenizer_round_trips_any_text_as_its_utf8_bytes(text: str) -> None:
    ids = encode_prompt(BYTES, text)
    assert ids == list(text.encode("utf-8"))
    assert decode_completion(BYTES, ids, {BYTES.eos_token_id}) == text


@settings(max_examples=50, deadline=None)
@given(text=PLAIN_TEXT)
def test_trained_tokenizer_round_trips_any_text(
    trained: PreTrainedTokenizerFast, text: str
) -> None:
    assert decode_completion(trained, encode_prompt(trained, text), ()) == text


def test_byte_symbols_are_those_of_the_tokenizers_library() -> None:
    symbols = data_tokenizer._byte_symbols()
    assert len(symbols) == 256
    assert set(symbols) == set(pre_tokenizers.ByteLevel.alphabet())


def test_ids_are_bytes_then_special_tokens_then_merges(trained: PreTrainedTokenizerFast) -> None:
    assert len(BYTES) == 262
    assert len(trained) == 290
    for tokenizer in (BYTES, trained):
        assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(256, 262))
        assert tokenizer.vocab_size == len(tokenizer)
    assert min(trained.convert_tokens_to_ids(["ask", "ffus"])) >= 262


def test_training_again_gives_the_same_tokenizer(
    corpus: Path, trained: PreTrainedTokenizerFast
) -> None:
    again = train_tokenizer([corpus], 290)
    assert again.backend_tokenizer.to_str() == trained.backend_tokenizer.to_str()


def test_training_merges_what_is_frequent(trained: PreTrainedTokenizerFast) -> None:
    assert len(encode_prompt(trained, "mask")) < 4
    assert len(encode_prompt(trained, "XQJZ")) == 4


def test_training_refuses_sizes_it_cannot_reach(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--vocab-size 261: give at least 262"):
        train_tokenizer([corpus], 261)
    with pytest.raises(ValueError, match=r"--vocab-size 5000: the text of --train yields only \d+"):
        train_tokenizer([corpus], 5000)
    broken = tmp_path / "latin.txt"
    broken.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"latin\.txt: byte 3 is not UTF-8"):
        train_tokenizer([broken], 270)


def test_saved_folder_names_what_every_version_of_transformers_knows(tmp_path: Path) -> None:
    # Seen to load in transformers 4.46.3, 4.57.6 and 5.23.0, with equal ids, special tokens and
    # chats. The class and the list's name are transformers 5's own, and 4.46 reads chat templates
    # from this file alone.
    save_tokenizer(BYTES, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "extra_special_tokens" not in config
    assert config["additional_special_tokens"] == list(SPECIAL_TOKENS[3:])
    assert config["chat_template"] == BYTES.chat_template
    # A folder that is loaded and written again keeps them.
    data_tokenizer.copy_tokenizer(tmp_path / "a", tmp_path / "b")
    assert json.loads((tmp_path / "b" / "tokenizer_config.json").read_text()) == config
    loaded = load_tokenizer(tmp_path / "b")
    assert sorted(loaded.all_special_tokens) == sorted(BYTES.all_special_tokens)


def test_saved_folder_loads_with_the_same_ids_tokens_and_template(
    trained: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    save_tokenizer(trained, tmp_path / "new" / "folder")
    loaded = load_tokenizer(tmp_path / "new" / "folder")
    assert loaded.get_vocab() == trained.get_vocab()
    assert loaded.chat_template == trained.chat_template
    assert encode_prompt(loaded, MESSAGES) == encode_prompt(trained, MESSAGES)
    assert (loaded.mask_token, loaded.eos_token, loaded.pad_token) == (
        "<|mask|>",
        "<|endoftext|>",
        "<|endoftext|>",
    )
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["folder"]


def test_saving_does_not_replace_a_folder(tmp_path: Path) -> None:
    (tmp_path / "something").touch()
    with pytest.raises(ValueError, match=r"--out .* is not an empty folder"):
        save_tokenizer(BYTES, tmp_path)


def test_megatron_loads_the_folder_with_the_same_ids(tmp_path: Path) -> None:
    save_tokenizer(BYTES, tmp_path / "bytes")
    not_given = ("chat_template", "vocab_file", "merge_file", "special_tokens", "metadata_path")
    flags = {
        "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": str(tmp_path / "bytes"),
        "tokenizer_hf_no_use_fast": False,
        "tokenizer_hf_no_include_special_tokens": False,
        "trust_remote_code": False,
        "pad_vocab_size": False,
    }
    theirs = build_tokenizer(Namespace(**flags, **dict.fromkeys(not_given)))
    assert theirs.vocab_size == len(BYTES) == 262
    assert theirs.chat_template == BYTES.chat_template
    assert theirs.eod == BYTES.eos_token_id
    assert theirs.mask == BYTES.mask_token_id
    assert theirs.tokenize("hé <|mask|>") == encode_prompt(BYTES, "hé <|mask|>")


@pytest.mark.parametrize("name", ["missing", "empty", "broken"])
def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path, name: str) -> None:
    if name != "missing":
        (tmp_path / name).mkdir()
    if name == "broken":
        (tmp_path / name / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"^--tokenizer-model .*{name}: .*tokenizer"):
        load_tokenizer(tmp_path / name)


def test_code_in_a_folder_is_not_run_and_the_way_out_works(tmp_path: Path) -> None:
    symbols = data_tokenizer._byte_symbols()
    vocab = {symbol: index for index, symbol in enumerate(symbols)}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "code.py").write_text("raise SystemExit")
    config = {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["code.DreamTokenizer", None]},
        "eos_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r'remove "auto_map" .*"Qwen2Tokenizer"'):
        load_tokenizer(tmp_path)
    del config["auto_map"]
    config["tokenizer_class"] = "Qwen2Tokenizer"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(tmp_path)
    assert encode_prompt(loaded, "hi") == [symbols.index("h"), symbols.index("i")]
    assert special_ids(loaded).mask_token_id == loaded.convert_tokens_to_ids("<|mask|>")


# As Dream's published folder lists them: ids follow those of vocab.json.
CHATML_IDS = {
    "<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258, "<|beginoftext|>": 259,
    "<|mask|>": 260,
}  # fmt: skip
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def dream_folder(folder: Path) -> Path:
    """A model folder in the form of Dream's: code of its own, no tokenizer.json."""
    symbols = data_tokenizer._byte_symbols()
    merged = {symbol: index for index, symbol in enumerate(symbols)}
    (folder / "vocab.json").write_text(json.dumps(merged))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "added_tokens.json").write_text(json.dumps(CHATML_IDS))
    decoder = {
        str(number): {
            "content": token, "lstrip": False, "normalized": False, "rstrip": False,
            "single_word": False, "special": True,
        }
        for token, number in CHATML_IDS.items()
    }  # fmt: skip
    config = {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "added_tokens_decoder": decoder,
        "additional_special_tokens": ["<|beginoftext|>", "<|mask|>"],
        "bos_token": "<|beginoftext|>",
        "chat_template": CHATML,
        "eos_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "pad_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text('{"model_type": "Dream", "auto_map": {"AutoConfig": "x"}}')
    (folder / "tokenization_dream.py").write_text("raise SystemExit")
    return folder


def test_a_copied_tokenizer_needs_no_code_and_keeps_ids_and_chat_format(tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    data_tokenizer.copy_tokenizer(dream_folder(source), tmp_path / "copy", "Qwen2Tokenizer")
    copy = load_tokenizer(tmp_path / "copy")
    assert {token: copy.convert_tokens_to_ids(token) for token in CHATML_IDS} == CHATML_IDS
    ids = special_ids(copy)
    assert (ids.mask_token_id, ids.eos_token_id, ids.pad_token_id) == (260, 256, 256)
    assert ids.stop_token_ids == (256, 258)
    prompt = encode_prompt(copy, [{"role": "user", "content": "hi"}])
    assert copy.decode(prompt) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert [prompt[0], prompt.count(258), len(prompt)] == [257, 1, 1 + 5 + 2 + 1 + 1 + 1 + 10]
    assert decode_completion(copy, [*encode_prompt(copy, "yes"), 258, 256], {256, 258}) == "yes"


def test_copying_needs_a_tokenizer_that_loads(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no tokenizer\.json; pass --tokenizer-model"):
        data_tokenizer.copy_tokenizer(tmp_path, tmp_path / "copy")
    # Without the class that stands in for it, code in the folder is asked for.
    with pytest.raises(ValueError, match=r"asks for code of its own"):
        data_tokenizer.copy_tokenizer(dream_folder(tmp_path), tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_chat_is_written_in_the_chat_format_with_the_assistants_header() -> None:
    ids = encode_prompt(BYTES, MESSAGES)
    assert all(type(token) is int for token in ids)
    assert BYTES.decode(ids) == CHAT_TEXT
    assert ids == encode_prompt(BYTES, CHAT_TEXT)
    assert ids[:2] == BYTES.convert_tokens_to_ids(["<|startoftext|>", "<|start_header_id|>"])


def test_chat_needs_a_template_and_whole_messages() -> None:
    plain = byte_tokenizer()
    plain.chat_template = None
    with pytest.raises(ValueError, match=r"has no chat template"):
        encode_prompt(plain, MESSAGES)
    plain.chat_template = "{{ raise_exception('user first') }}"
    with pytest.raises(ValueError, match=r"refuses the conversation \(user first\)"):
        encode_prompt(plain, MESSAGES)
    with pytest.raises(ValueError, match=r'needs a text "role" and "content"'):
        encode_prompt(BYTES, [{"role": "user"}])
    with pytest.raises(ValueError, match=r"no message"):
        encode_prompt(BYTES, [])


def test_decoding_stops_at_the_first_end_and_skips_special_tokens() -> None:
    ids = special_ids(BYTES)
    eot = BYTES.convert_tokens_to_ids("<|eot_id|>")
    tokens = [104, ids.mask_token_id, 105, eot, 106, ids.eos_token_id, 107]
    assert decode_completion(BYTES, tokens, ids.stop_token_ids) == "hi"
    assert decode_completion(BYTES, tokens, (ids.eos_token_id,)) == "hij"
    assert decode_completion(BYTES, tokens, ()) == "hijk"
    assert decode_completion(BYTES, [eot, 104], ids.stop_token_ids) == ""


def test_special_ids_of_a_built_tokenizer() -> None:
    ids = special_ids(BYTES)
    assert (ids.mask_token_id, ids.eos_token_id, ids.pad_token_id) == (256, 257, 257)
    assert ids.stop_token_ids == (257, 261)


def test_special_ids_need_a_mask_token_of_its_own() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.mask_token = None
    with pytest.raises(ValueError, match=r"defines no mask token; pass --mask-token-id"):
        special_ids(tokenizer)
    assert special_ids(tokenizer, 7).mask_token_id == 7
    assert special_ids(BYTES, 7).mask_token_id == 7
    for taken in special_ids(BYTES).stop_token_ids:
        with pytest.raises(ValueError, match=f"--mask-token-id {taken} pads or ends"):
            special_ids(BYTES, taken)


def test_special_ids_need_an_end_of_sequence_and_pad_with_it() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    assert special_ids(tokenizer).pad_token_id == tokenizer.eos_token_id
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"defines no end-of-sequence token"):
        special_ids(tokenizer)
