"""The converter as users run it: what it refuses, what a killed run leaves, what follows it."""

import ctypes
import ctypes.util
import dataclasses
import filecmp
import json
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from interpreter import python
from safetensors.torch import save_file
from test_end_to_end import ENVIRONMENT, ROOT, TORCHRUN, run
from test_hugging_face_folder import truncate, write_adapter

from megatron_espo.conversion import convert as conversion
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
from megatron_espo.conversion.convert import convert_to_hugging_face, convert_to_megatron
from megatron_espo.conversion.families import FAMILIES
from megatron_espo.conversion.hugging_face import INDEX, HuggingFaceWeights, read_json
from megatron_espo.conversion.random_model import write_random_model
from megatron_espo.data.tokenizer import byte_tokenizer, load_tokenizer
from megatron_espo.model.shape import ExpertShape
from megatron_espo.startup.stored import stored_arguments

pytestmark = pytest.mark.slow

TINY = {
    "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 8,
    "num_query_groups": 4, "vocab_size": 300, "max_position_embeddings": 128,
    "mask_token_id": 256, "eos_token_id": 257,
}  # fmt: skip
_EXPERTS = {"num_experts": 8, "topk": 4, "hidden_size": 48}
SHAPES = {
    "llada": dataclasses.replace(llada.PUBLISHED, **TINY),
    "dream": dataclasses.replace(dream.PUBLISHED, **TINY),
    "illada": dataclasses.replace(illada.PUBLISHED, **TINY),
    "llada-tied": dataclasses.replace(llada.PUBLISHED, **TINY, tied_embeddings=True),
    "dream-tied": dataclasses.replace(dream.PUBLISHED, **TINY, tied_embeddings=True),
    # Heads of their own size.
    "sdar": dataclasses.replace(sdar.PUBLISHED, **TINY, kv_channels=16),
    "qwen3-tied": dataclasses.replace(
        qwen3.PUBLISHED, **TINY, kv_channels=12, tied_embeddings=True, logit_shift=False
    ),
    "llama": dataclasses.replace(llama3.PUBLISHED, **TINY),
    "llada2": dataclasses.replace(
        llada2.PUBLISHED,
        **TINY,
        experts=ExpertShape(
            **_EXPERTS,
            layers=(0, 1),
            shared_size=48,
            score="sigmoid",
            bias=True,
            groups=4,
            best_groups=2,
            scaling=2.5,
        ),
    ),
    "llada_moe": dataclasses.replace(
        llada_moe.PUBLISHED, **TINY, experts=ExpertShape(**_EXPERTS, layers=(0, 1))
    ),
}
TOOL = "tools/convert_hf.py"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random models in Hugging Face's form."""
    root = tmp_path_factory.mktemp("models")
    for name, shape in SHAPES.items():
        write_random_model(
            root / name, FAMILIES[name.split("-")[0]], shape, torch.float32, byte_tokenizer(),
            std=0.2, max_shard_size="100KB",
        )  # fmt: skip
    shutil.copytree(root / "dream", root / "dream-scaled")
    fields = read_json(root / "dream" / "config.json")
    # As transformers 5 writes it.
    scaled = {"rope_type": "linear", "rope_theta": fields.pop("rope_theta"), "factor": 4.0}
    text = json.dumps({**fields, "rope_parameters": scaled})
    (root / "dream-scaled" / "config.json").write_text(text)
    return root


@pytest.fixture(scope="module")
def checkpoint(models: Path) -> Path:
    """The LLaDA-shaped model, converted."""
    out = models / "llada-megatron"
    printed = run(TOOL, "to-megatron", "--hf", str(models / "llada"), "--out", str(out))
    assert "21 tensors, " in printed and "float32. Pass it with --load" in printed
    return out


WRONG = {
    "llada": """
from megatron_espo.conversion import families as f
names = dataclasses.replace(f.FAMILIES["llada"].names, gate="up_proj", up="ff_proj")
f.FAMILIES["llada"] = dataclasses.replace(f.FAMILIES["llada"], names=names)
""",
    "dream": """
from megatron_espo.conversion import families as f
read = f.FAMILIES["dream"].read_config
unshifted = lambda config: dataclasses.replace(read(config), logit_shift=False)
f.FAMILIES["dream"] = dataclasses.replace(f.FAMILIES["dream"], read_config=unshifted)
""",
    "llada2": """
from megatron.core.transformer.moe import moe_utils
ranked = moe_utils.group_limited_topk
def by_the_best(scores, topk, num_tokens, num_experts, num_groups, group_topk):
    best = scores.view(num_tokens, num_groups, -1).amax(-1).topk(group_topk, dim=-1).indices
    kept = torch.zeros(num_tokens, num_groups).scatter(1, best, 1).bool()
    kept = kept.repeat_interleave(num_experts // num_groups, dim=1)
    return scores.masked_fill(~kept, -torch.inf).topk(topk, dim=-1)
moe_utils.group_limited_topk = by_the_best
""",
    "llada2 ": """
from megatron_espo.model.shape import ExpertShape
flags = ExpertShape.flags
unscaled = lambda shape: flags(dataclasses.replace(shape, scaling=None))
ExpertShape.flags = unscaled
""",
    "llada2  ": """
from megatron_espo.conversion import mapping
pack = mapping.Block.pack
def as_it_is(block, tensors):
    return tensors[0].reshape(block.shape) if block.fused else pack(block, tensors)
mapping.Block.pack = as_it_is
""",
    "dream-scaled": """
from megatron_espo.model.published_config import Config
Config.rotary = lambda config, scaling: (1000000, None)
""",
}


@pytest.mark.parametrize(
    "family",
    WRONG,
    ids=[
        *("gate and up exchanged", "shift missing"),
        *("groups ranked by one score", "weights not scaled", "fused rows not packed"),
        "scaling not read",
    ],
)
def test_verification_refuses_a_wrong_mapping(models: Path, tmp_path: Path, family: str) -> None:
    program = f"""
import dataclasses, sys, torch
sys.path.insert(0, "tools")
{WRONG[family]}
import convert_hf
from megatron_espo.startup.setup import run_entry_point
run_entry_point(convert_hf.main)
"""
    printed = run(
        "-c", program, "to-megatron", "--hf", str(models / family.strip()), "--out",
        str(tmp_path / "out"), "--verify", fails=True,
    )  # fmt: skip
    assert "verify: largest difference" in printed
    assert "the logits of both sides differ by more than rounding" in printed
    assert not list(tmp_path.iterdir())


def spoiled(models: Path, folder: Path, case: str) -> Path:
    shutil.copytree(models / "llada", folder)
    config = folder / "config.json"
    if case == "truncated shard":
        truncate(folder)
    elif case == "missing index entry":
        text = (folder / INDEX).read_text()
        lines = [line for line in text.splitlines() if "blocks.1.ff_norm" not in line]
        (folder / INDEX).write_text("\n".join(lines))
    elif case == "wrong type":
        for path in folder.glob("*.safetensors"):
            path.unlink()
        files = read_json(folder / INDEX)["weight_map"]
        shapes = {n: s.shape for n, s in HuggingFaceWeights(models / "llada").tensors.items()}
        for file in set(files.values()):
            tensors = {
                n: torch.zeros(shapes[n], dtype=torch.int8) for n in files if files[n] == file
            }
            save_file(tensors, folder / file)
    elif case == "wrong architecture":
        config.write_text(config.read_text().replace("LLaDAModelLM", "OlmoeForCausalLM"))
    elif case == "wrong config":
        config.write_text(config.read_text().replace('"n_layers": 2', '"n_layers": 3'))
    elif case == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif case == "another mask":
        config.write_text(config.read_text().replace('"mask_token_id": 256', '"mask_token_id": 9'))
    return folder


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("truncated shard", r"model-\S+ is no complete safetensors file"),
        ("missing index entry", r"has no entry for model\.transformer\.blocks\.1\.ff_norm\.weight"),
        ("wrong type", r"is I8; only F32, BF16, F16 can be converted"),
        ("wrong architecture", r'"architectures" is \[\'OlmoeForCausalLM\'\]'),
        ("wrong config", r"the tensor model\.transformer\.blocks\.2\.\S+ is missing"),
        ("no tokenizer", r"holds no tokenizer\.json; pass --tokenizer-model FOLDER"),
        ("another mask", r"the tokenizer's mask token is 256, config\.json says 9"),
    ],
)
def test_a_broken_source_leaves_nothing(
    models: Path, tmp_path: Path, case: str, message: str
) -> None:
    folder = spoiled(models, tmp_path / "model", case)
    (tmp_path / "outs").mkdir()
    with pytest.raises(ValueError, match=message):
        convert_to_megatron(str(folder), str(tmp_path / "outs" / "out"))
    assert not list((tmp_path / "outs").iterdir())


def test_the_command_ends_with_one_sentence_and_status_2(models: Path, tmp_path: Path) -> None:
    folder = spoiled(models, tmp_path / "model", "truncated shard")
    done = subprocess.run(
        [python(), TOOL, "to-megatron", "--hf", str(folder), "--out", str(tmp_path / "out")],
        cwd=ROOT, env=ENVIRONMENT, text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {folder}")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def spoil_checkpoint(checkpoint: Path, folder: Path, template: Path, case: str) -> None:
    """Copy a checkpoint and its template, and spoil one of them."""
    shutil.copytree(checkpoint, folder)
    config = template / "config.json"
    if case == "no checkpoint":
        (folder / "latest_checkpointed_iteration.txt").unlink()
    elif case == "truncated":
        for path in (folder / "release").glob("*.distcp"):
            os.truncate(path, path.stat().st_size // 2)
    elif case == "no metadata":
        (folder / "release" / ".metadata").unlink()
    elif case == "other base":
        config.write_text(config.read_text().replace("500000.0", "10000.0"))
    elif case == "other vocabulary":
        config.write_text(config.read_text().replace("300", "299"))
    elif case == "index of another model":
        text = (template / INDEX).read_text()
        (template / INDEX).write_text(text.replace("blocks.1.ff_norm", "blocks.1.ff_norn"))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no checkpoint", r"no checkpoint there; it holds no latest_checkpointed_iteration\.txt"),
        ("truncated", r"release: cannot read"),
        ("no metadata", r"release: cannot read this checkpoint"),
        ("other base", r"does not fit .*: rotary_base is 500000 there and 10000 here"),
        ("other vocabulary", r"vocab_size is 300 there and 299 here"),
        ("index of another model", r"its index has .* blocks\.1\.ff_nor"),
    ],
)
def test_a_broken_checkpoint_leaves_nothing(
    models: Path, checkpoint: Path, tmp_path: Path, case: str, message: str
) -> None:
    template = tmp_path / "template"
    shutil.copytree(models / "llada", template)
    spoil_checkpoint(checkpoint, tmp_path / "checkpoint", template, case)
    (tmp_path / "outs").mkdir()
    with pytest.raises(ValueError, match=message.replace(" blocks", r" \S*blocks")):
        convert_to_hugging_face(
            str(tmp_path / "checkpoint"), str(tmp_path / "outs" / "out"), str(template)
        )
    assert not list((tmp_path / "outs").iterdir())


def test_the_iteration_and_the_type_can_be_chosen(
    models: Path, checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copytree(checkpoint / "release", tmp_path / "run" / "iter_0000007")
    template = str(models / "llada")
    with pytest.raises(ValueError, match=r"iter_0000008: no such checkpoint"):
        convert_to_hugging_face(str(tmp_path / "run"), str(tmp_path / "a"), template, iteration=8)
    convert_to_hugging_face(
        str(tmp_path / "run"), str(tmp_path / "b"), template, iteration=7, dtype="bfloat16"
    )
    before, after = HuggingFaceWeights(models / "llada"), HuggingFaceWeights(tmp_path / "b")
    assert after.dtype() == torch.bfloat16
    assert all(torch.equal(before.read(n).bfloat16(), after.read(n)) for n in before.tensors)


def test_a_template_without_weights_is_enough(
    models: Path, checkpoint: Path, tmp_path: Path
) -> None:
    template = tmp_path / "template"
    shutil.copytree(models / "llada", template, ignore=shutil.ignore_patterns("*.safetensors*"))
    convert_to_hugging_face(str(checkpoint), str(tmp_path / "out"), str(template))
    before, after = HuggingFaceWeights(models / "llada"), HuggingFaceWeights(tmp_path / "out")
    assert {stored.file for stored in after.tensors.values()} == {"model.safetensors"}
    assert all(torch.equal(before.read(n), after.read(n)) for n in before.tensors)


@pytest.mark.parametrize("family", SHAPES)
def test_a_model_without_a_template_is_written_from_its_arguments(
    models: Path, tmp_path: Path, family: str
) -> None:
    made, out = ["--out", str(tmp_path / "checkpoint")], tmp_path / "out"
    run(TOOL, "to-megatron", "--hf", str(models / family), *made)
    printed = run(
        TOOL, "to-hf", "--megatron", str(tmp_path / "checkpoint"), "--family",
        family.split("-")[0], "--out", str(out), "--verify",
    )  # fmt: skip
    assert "equal argmax at 100.00%" in printed
    before, after = HuggingFaceWeights(models / family), HuggingFaceWeights(out)
    assert before.tensors.keys() == after.tensors.keys()
    assert all(torch.equal(before.read(n), after.read(n)) for n in before.tensors)
    for name in ("config.json", "generation_config.json"):
        assert read_json(out / name) == read_json(models / family / name)
    tokenizers = [load_tokenizer(folder) for folder in (models / family, out)]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    assert tokenizers[0].chat_template == tokenizers[1].chat_template
    # It can be the template of the next one.
    convert_to_hugging_face(str(tmp_path / "checkpoint"), str(tmp_path / "again"), str(out))


@pytest.mark.parametrize(
    ("change", "family", "message"),
    [
        ({}, "dream", "a DreamModel cannot have qkv_bias False, logit_shift False"),
        ({"logit_shift": True}, "llada", "a LLaDAModelLM cannot have logit_shift True"),
        ({"position_embedding_type": "learned_absolute"}, "llada", "must be rope"),
        ({"kv_channels": 4}, "llada", "a LLaDAModelLM cannot have kv_channels 4"),
        ({"use_rope_scaling": True}, "llada", "cannot have rope_scaling_factor 8"),
        ({"rotary_percent": 0.5}, "llada", "cannot have rotary_percent 0.5"),
        ({"no_rope_freq": 2}, "llada", "--no-rope-freq 2: all layers rotate alike"),
    ],
)
def test_a_model_that_is_none_of_the_family_is_refused(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, object],
    family: str,
    message: str,
) -> None:
    args = stored_arguments(str(checkpoint / "release"))
    vars(args).update(change)
    monkeypatch.setattr(conversion, "stored_arguments", lambda folder: args)
    with pytest.raises(ValueError, match=f"does not fit --family {family}: .*{message}"):
        convert_to_hugging_face(str(checkpoint), str(tmp_path / "out"), family=family)
    assert not list(tmp_path.iterdir())


def autoregressive(folder: Path, tokenizer: Any = None, **changed: Any) -> Path:
    """Write a Qwen2 as it is published: neither config nor tokenizer names a mask token."""
    shape = dataclasses.replace(qwen2.PUBLISHED, **TINY, **changed)
    tokenizer = tokenizer or byte_tokenizer()
    tokenizer.mask_token = None
    write_random_model(folder, FAMILIES["qwen2"], shape, torch.float32, tokenizer, std=0.2)
    fields = read_json(folder / "config.json")
    del fields["mask_token_id"]
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    return folder


def test_an_autoregressive_model_gets_a_mask_token_and_comes_back(tmp_path: Path) -> None:
    source = autoregressive(tmp_path / "qwen2")
    for name, flags, mask, written in (
        # The byte tokenizer has 262 tokens.
        ("chosen", [], 262, "<|MASK|>"),
        ("special token", ["--mask-token-id", "256", "--no-logit-shift"], 256, "<|mask|>"),
    ):
        out, back = tmp_path / name, tmp_path / f"{name} back"
        printed = run(
            TOOL, "to-megatron", "--hf", str(source), "--out", str(out), "--verify", *flags
        )
        assert "equal argmax at 100.00%" in printed
        args = stored_arguments(str(out / "release"))
        assert args.mask_token_id == mask and args.logit_shift == (not flags)
        tokenizer = load_tokenizer(out / "tokenizer")
        assert (tokenizer.mask_token_id, tokenizer.mask_token) == (mask, written)
        assert tokenizer(f"a{written}")["input_ids"] == [97, mask]
        # With the model as template nothing has changed; without one the folder says it all.
        convert_to_hugging_face(str(out), str(back), str(source))
        names = [path.name for path in source.iterdir()]
        assert filecmp.cmpfiles(source, back, names, shallow=False)[0] == names
        convert_to_hugging_face(str(out), str(tmp_path / f"{name} own"), family="qwen2")
        fields = read_json(tmp_path / f"{name} own" / "config.json")
        assert fields["mask_token_id"] == mask and fields.get("logit_shift", True) == (not flags)
        assert load_tokenizer(tmp_path / f"{name} own").mask_token_id == mask


@pytest.mark.parametrize(
    ("mask", "changed", "message"),
    [
        (5, {}, "--mask-token-id 5: must be a special token of .*, or 262, the first row without"),
        (263, {}, "--mask-token-id 263: must be a special token of .*, or 262"),
        (257, {}, "--mask-token-id 257 pads or ends a text"),
        (None, {"vocab_size": 262}, "a token for each of the 262 rows of the vocabulary; pass --m"),
        (262, {"vocab_size": 262}, "--mask-token-id 262 lies outside the vocabulary of 262"),
    ],
)
def test_a_mask_token_that_cannot_be_one_is_refused(
    tmp_path: Path, mask: int | None, changed: dict[str, int], message: str
) -> None:
    shape = {**TINY, **changed}
    folder = tmp_path / "qwen2"
    with mock.patch.dict(TINY, shape):
        autoregressive(folder)
    with pytest.raises(ValueError, match=message):
        convert_to_megatron(str(folder), str(tmp_path / "out"), mask_token_id=mask)
    assert [path.name for path in tmp_path.iterdir()] == ["qwen2"]


def test_flags_of_autoregressive_models_are_refused_elsewhere(models: Path, tmp_path: Path) -> None:
    for given, flag in (({"mask_token_id": 256}, "--mask"), ({"logit_shift": False}, "--no-logit")):
        with pytest.raises(ValueError, match=f"{flag}.* holds a masked-diffusion model"):
            convert_to_megatron(str(models / "llada"), str(tmp_path / "out"), **given)
    config = read_json(models / "qwen3-tied" / "config.json")
    assert config["mask_token_id"] == 256 and config["logit_shift"] is False
    with pytest.raises(ValueError, match=r'--mask-token-id: .* says "mask_token_id" 256; leave'):
        convert_to_megatron(str(models / "qwen3-tied"), str(tmp_path / "out"), mask_token_id=262)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(
    checkpoint: Path, tmp_path: Path
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"word{number}" for number in range(40)])
    tokenizer.save_pretrained(str(tmp_path / "larger"))
    with pytest.raises(ValueError, match=r"larger has 302 tokens, more than the 300"):
        convert_to_hugging_face(
            str(checkpoint), str(tmp_path / "out"), family="llada",
            tokenizer=str(tmp_path / "larger"),
        )  # fmt: skip


def test_a_folder_whose_tokenizer_has_more_tokens_than_the_model_is_refused(
    models: Path, tmp_path: Path
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"word{number}" for number in range(40)])
    shutil.copytree(models / "llada", tmp_path / "model")
    tokenizer.save_pretrained(str(tmp_path / "model"))
    with pytest.raises(ValueError, match=r"model: the tokenizer has 302 tokens, more than the 300"):
        convert_to_megatron(str(tmp_path / "model"), str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def add_head(folder: Path, head: torch.Tensor) -> None:
    """Keep the output head of tied embeddings, as iLLaDA's published folder does."""
    save_file({HEAD: head}, folder / "head.safetensors", metadata={"format": "pt"})
    index = read_json(folder / INDEX)
    index["weight_map"][HEAD] = "head.safetensors"
    index["weight_map"] = dict(sorted(index["weight_map"].items()))
    index["metadata"]["total_size"] += head.nbytes
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def test_a_stored_copy_of_tied_embeddings_comes_back(models: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(models / "illada", source)
    embedding = HuggingFaceWeights(source).read(EMBEDDING).clone()
    add_head(source, embedding)
    # Neither the mask token nor that it is tied stands in the published config.
    fields = read_json(source / "config.json")
    del fields["tie_word_embeddings"]
    (source / "config.json").write_text(json.dumps(fields))
    convert_to_megatron(str(source), str(tmp_path / "checkpoint"))
    args = stored_arguments(str(tmp_path / "checkpoint" / "release"))
    assert not args.untie_embeddings_and_output_weights
    convert_to_hugging_face(str(tmp_path / "checkpoint"), str(tmp_path / "out"), str(source))
    names = sorted(path.name for path in source.iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert filecmp.cmpfiles(source, tmp_path / "out", names, shallow=False)[0] == names
    # A head that is no copy is another model.
    shutil.rmtree(source)
    shutil.copytree(models / "illada", source)
    add_head(source, embedding + 1)
    with pytest.raises(ValueError, match=rf"{HEAD} differs from {EMBEDDING}, which config.json"):
        convert_to_megatron(str(source), str(tmp_path / "other"))


def test_scaled_rotary_embeddings_are_refused_where_transformers_5_writes_them(
    models: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r'"rope_parameters" is .* without scaling'):
        convert_to_megatron(str(models / "dream-scaled"), str(tmp_path / "out"))


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))


@pytest.mark.parametrize("direction", ["to-megatron", "to-hf"])
def test_a_write_that_fails_midway_leaves_nothing(
    models: Path, checkpoint: Path, tmp_path: Path, direction: str
) -> None:
    source = ["--hf", str(models / "llada")]
    if direction == "to-hf":
        source = ["--megatron", str(checkpoint), "--hf-template", str(models / "llada")]
    done = subprocess.run(
        [python(), TOOL, direction, *source, "--out", str(tmp_path / "out")],
        cwd=ROOT, env=ENVIRONMENT, text=True, capture_output=True, check=False,
        preexec_fn=limit_file_size,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "out: the disk is full; make room or choose another disk." in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 424 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    libc = ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True)
    if libc.mount(b"tmpfs", str(disk).encode(), b"tmpfs", 0, b"size=424k"):
        pytest.skip(f"mounting needs root: {os.strerror(ctypes.get_errno())}")
    yield disk
    libc.umount2(str(disk).encode(), 2)


@pytest.mark.parametrize("filled", [100_000, 0], ids=["before it starts", "while it writes"])
def test_a_disk_that_is_full(models: Path, small_disk: Path, filled: int) -> None:
    # The weights alone are 400,640 bytes.
    (small_disk / "filler").write_bytes(bytes(filled))
    printed = run(
        TOOL, "to-megatron", "--hf", str(models / "llada"), "--out", str(small_disk / "out"),
        fails=True,
    )  # fmt: skip
    expected = "MB are needed there and" if filled else "the disk is full; make room"
    assert expected in printed, printed
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_conversion_leaves_no_folder_that_looks_finished(
    models: Path, tmp_path: Path, stop: signal.Signals
) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    command = [TOOL, "to-megatron", "--hf", str(models / "dream"), "--out", str(out)]
    process = subprocess.Popen(
        [python(), *command], cwd=ROOT, env=ENVIRONMENT,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not partial.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(stop)
    assert process.wait(60) == (143 if stop == signal.SIGTERM else -9)
    assert not out.exists()
    assert partial.exists() == (stop == signal.SIGKILL)
    run(*command)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_adapter_is_merged_on_the_way(models: Path, tmp_path: Path) -> None:
    shapes = {
        name.removesuffix(".weight"): stored.shape
        for name, stored in HuggingFaceWeights(models / "llada").tensors.items()
        if name.endswith(("q_proj.weight", "up_proj.weight"))
    }
    adapter = write_adapter(tmp_path / "lora", layers=shapes)
    printed = run(
        TOOL, "to-megatron", "--hf", str(models / "llada"), "--lora", str(adapter),
        "--out", str(tmp_path / "merged"), "--verify",
    )  # fmt: skip
    assert "merging 4 adapted weights" in printed
    assert "was to adapt gate_proj, o_proj too, but no layer of this model is called so" in printed
    assert "equal argmax at 100.00%" in printed
    convert_to_hugging_face(str(tmp_path / "merged"), str(tmp_path / "back"), str(models / "llada"))
    before, after = HuggingFaceWeights(models / "llada"), HuggingFaceWeights(tmp_path / "back")
    changed = {n for n in before.tensors if not torch.equal(before.read(n), after.read(n))}
    assert changed == {f"{path}.weight" for path in shapes}


def test_a_converted_model_is_sampled_trained_and_exported(
    models: Path, checkpoint: Path, tmp_path: Path
) -> None:
    # Everything a run needs is in the checkpoint, even where it was moved.
    moved = tmp_path / "moved"
    shutil.copytree(checkpoint, moved)
    assert load_tokenizer(moved / "tokenizer").chat_template
    sampling = "--rollout-completion-length 8 --rollout-block-length 8 --rollout-denoising-steps 4"
    printed = run(
        "tools/generate.py", "--load", str(moved), "--chat", "--prompt", "a", *sampling.split(),
        "--save-frames", str(tmp_path / "frames"), "--verbose",
    )  # fmt: skip
    assert f"{moved}/tokenizer" in printed
    assert len(list((tmp_path / "frames").iterdir())) == 5
    assert printed.splitlines()[-2] == "a" and "\033" not in printed.splitlines()[-1]
    printed = run(
        "tools/generate.py", "--load", str(moved), "--prompt", "x" * 121, *sampling.split(),
        fails=True,
    )  # fmt: skip
    assert "--prompt 1 has 121 tokens and 120 fit" in printed

    run("tools/prepare_data.py", "sudoku", "--out", str(tmp_path / "data"), "--seed", "1",
        "--train", "8", "--test", "4", "--demonstrations", "4")  # fmt: skip
    run(
        *TORCHRUN, "-m", "megatron_espo.training.espo", "--use-checkpoint-args",
        "--pretrained-checkpoint", str(moved), "--load", str(tmp_path / "espo"),
        "--save", str(tmp_path / "espo"), "--espo-task", "sudoku",
        "--espo-train-data", str(tmp_path / "data/train.jsonl"), "--seq-length", "32",
        "--rollout-completion-length", "16", "--rollout-block-length", "16",
        "--rollout-denoising-steps", "4", "--espo-num-rollouts", "1",
        "--espo-prompts-per-rollout", "2", "--espo-group-size", "4",
        "--espo-updates-per-rollout", "1", "--micro-batch-size", "8", "--lr", "1e-3",
        "--tensor-model-parallel-size", "2",
    )  # fmt: skip
    printed = run(
        TOOL, "to-hf", "--megatron", str(tmp_path / "espo"), "--hf-template",
        str(models / "llada"), "--out", str(tmp_path / "trained"), "--verify",
    )  # fmt: skip
    assert "equal argmax at 100.00%" in printed
    before, after = HuggingFaceWeights(models / "llada"), HuggingFaceWeights(tmp_path / "trained")
    assert not all(torch.equal(before.read(n), after.read(n)) for n in before.tensors)
    same = [path.name for path in (models / "llada").iterdir() if path.suffix != ".safetensors"]
    _, different, unread = filecmp.cmpfiles(
        models / "llada", tmp_path / "trained", same, shallow=False
    )
    assert not different + unread and len(same) > 5


def test_a_hugging_face_folder_is_evaluated_like_its_checkpoint(
    models: Path, checkpoint: Path, tmp_path: Path
) -> None:
    run("tools/prepare_data.py", "sudoku", "--out", str(tmp_path / "data"), "--seed", "1",
        "--train", "1", "--test", "6")  # fmt: skip
    cache = tmp_path / "cache"
    sources = {
        "megatron": ["--load", str(checkpoint)],
        "hf": ["--hf", str(models / "llada"), "--hf-cache", str(cache)],
    }
    tokens, printed = {}, ""
    for name, source in sources.items():
        # The Hugging Face folder on two ranks, which must not both convert it.
        printed = run(
            *(TORCHRUN if name == "hf" else ()), "tools/evaluate.py", *source,
            "--espo-task", "sudoku", "--espo-eval-data", str(tmp_path / "data/test.jsonl"),
            "--eval-lengths", "8", "16", "--eval-num-samples", "2", "--eval-temperature", "1.0",
            "--out", str(tmp_path / name),
        )  # fmt: skip
        lines = (tmp_path / name / "completions.jsonl").read_text().splitlines()
        made = [json.loads(line) for line in lines]
        assert len(made) == 2 * 2 * 6
        tokens[name] = {(c["length"], c["problem"], c["sample"]): c["token_ids"] for c in made}
    assert tokens["megatron"] == tokens["hf"]
    assert len(set(map(tuple, tokens["hf"].values()))) == 24, "two samples are the same"
    assert printed.count("converting") == 1 and "| pass@2 |" in printed
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1


EIGHT_RANKS = """
import sys
from megatron.training import get_args
from megatron.training.checkpointing import save_checkpoint
from megatron_espo.commands.inference import load_model

model, args = load_model(sys.argv[1:])
assert (model.layout.tp_size, model.layout.pp_size) == (4, 2)
args.no_save_optim = args.no_save_rng = True
save_checkpoint(1, list(model.chunks), None, None, 0)
"""


def test_the_same_bits_come_back_from_tp_4_and_pp_2(
    models: Path, checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "resave.py").write_text(EIGHT_RANKS)
    run(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "8",
        str(tmp_path / "resave.py"), "--load", str(checkpoint), "--save", str(tmp_path / "saved"),
        "--tensor-model-parallel-size", "4", "--pipeline-model-parallel-size", "2",
    )  # fmt: skip
    out = tmp_path / "out"
    convert_to_hugging_face(str(tmp_path / "saved"), str(out), str(models / "llada"))
    names = [path.name for path in (models / "llada").iterdir()]
    assert filecmp.cmpfiles(models / "llada", out, names, shallow=False)[0] == names
