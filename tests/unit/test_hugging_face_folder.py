"""Hugging Face folders: what is read, what is written, what is refused; adapters."""

import dataclasses
import json
import shutil
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_espo.conversion import llada
from megatron_espo.conversion.families import FAMILIES
from megatron_espo.conversion.hugging_face import (
    INDEX,
    HuggingFaceWeights,
    copy_other_files,
    resolve_folder,
    weight_map,
    write_weights,
)
from megatron_espo.conversion.lora import MergedWeights
from megatron_espo.conversion.mapping import model_blocks
from megatron_espo.conversion.random_model import write_random_model
from megatron_espo.data.tokenizer import byte_tokenizer

SHAPE = dataclasses.replace(
    llada.PUBLISHED, num_layers=2, hidden_size=16, ffn_hidden_size=24, num_attention_heads=4,
    num_query_groups=2, vocab_size=270, mask_token_id=256, eos_token_id=257,
)  # fmt: skip
BLOCKS = model_blocks(SHAPE, llada.NAMES)
SOURCES = {name: size for block in BLOCKS for name, size in block.sources.items()}
NORM, UP = "model.transformer.ln_f.weight", "model.transformer.blocks.1.up_proj.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "model"
    write_random_model(
        folder, FAMILIES["llada"], SHAPE, torch.float32, byte_tokenizer(), max_shard_size="10KB"
    )
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    shutil.copytree(made, tmp_path / "model")
    return tmp_path / "model"


def checked(folder: Path) -> torch.dtype:
    weights = HuggingFaceWeights(folder)
    weights.check(SOURCES)
    return weights.dtype()


def edit_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def edit_tensor(folder: Path, name: str, change: Callable[[torch.Tensor], Any]) -> None:
    """Replace a tensor in its file; None takes it out."""
    path = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    tensors = load_file(path)
    value = change(tensors.pop(name))
    if value is not None:
        tensors[name] = value
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_written_folder_is_of_the_published_form(made: Path) -> None:
    assert checked(made) == torch.float32
    index = json.loads((made / INDEX).read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert index["metadata"]["total_size"] == 4 * sum(
        torch.Size(s).numel() for s in SOURCES.values()
    )
    assert list(index["weight_map"]) == sorted(SOURCES)
    everyone = stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH
    shards = list(made.glob("*.safetensors"))
    assert all(
        path.stat().st_mode & everyone == (made / INDEX).stat().st_mode & everyone
        for path in shards
    )


def test_a_single_file_needs_no_index(tmp_path: Path) -> None:
    tensors = {name: (size, torch.bfloat16) for name, size in SOURCES.items()}
    write_weights(tmp_path, tensors, lambda name: torch.ones(SOURCES[name]).bfloat16())
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert checked(tmp_path) == torch.bfloat16
    assert weight_map(tmp_path) == dict.fromkeys(sorted(SOURCES), "model.safetensors")


def test_files_are_those_that_are_asked_for(made: Path, tmp_path: Path) -> None:
    weights = HuggingFaceWeights(made)
    # Every tensor somewhere else than a split anew would put it, as in LLaDA's published index.
    files = {name: f"part-{number % 3}.safetensors" for number, name in enumerate(SOURCES)}
    tensors = {name: (size, torch.float32) for name, size in SOURCES.items()}
    write_weights(tmp_path, tensors, weights.read, files)
    assert weight_map(tmp_path) == files
    copy = HuggingFaceWeights(tmp_path)
    assert all(torch.equal(copy.read(name), weights.read(name)) for name in SOURCES)


def test_everything_but_the_weights_is_copied_unchanged(folder: Path, tmp_path: Path) -> None:
    (folder / "modeling_llada.py").write_text("# code\n")
    (folder / "assets").mkdir()
    (folder / "assets" / "template.txt").write_text("x")
    (folder / "pytorch_model-00001-of-00002.bin").write_text("old weights")
    (folder / ".cache").mkdir()
    target = tmp_path / "target"
    target.mkdir()
    copy_other_files(folder, target)
    copied = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert copied == {
        "assets/template.txt", "chat_template.jinja", "config.json", "generation_config.json",
        "modeling_llada.py", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert all((target / name).read_bytes() == (folder / name).read_bytes() for name in copied)


def truncate(folder: Path) -> None:
    path = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)


def cut_header(folder: Path) -> None:
    path = min(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:5])


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, r"model-\S+\.safetensors: is no complete safetensors file"),
    "truncated in the header": (cut_header, r"model-00001-\S+: is no complete safetensors file"),
    "no index entry": (
        lambda folder: edit_index(folder, lambda m: m.pop(UP)),
        rf"{INDEX}: has no entry for {UP} of model-",
    ),
    "no index entry and no tensor": (
        lambda folder: (
            edit_tensor(folder, UP, lambda t: None),
            edit_index(folder, lambda m: m.pop(UP)),
        ),
        rf"the tensor {UP} is missing",
    ),
    "index entry without a tensor": (
        lambda folder: edit_tensor(folder, UP, lambda t: None),
        rf"{INDEX}: says that \S+ holds {UP}; it does not",
    ),
    "file that is not there": (
        lambda folder: edit_index(folder, lambda m: m.update({UP: "model-9.safetensors"})),
        rf"{INDEX}: names model-9\.safetensors, which is not in the folder",
    ),
    "file outside the folder": (
        lambda folder: edit_index(folder, lambda m: m.update({UP: "../model/x.safetensors"})),
        r"which is not in the folder",
    ),
    "left over": (
        lambda folder: (
            save_file({"extra.weight": torch.ones(1)}, folder / "extra.safetensors"),
            edit_index(folder, lambda m: m.update({"extra.weight": "extra.safetensors"})),
        ),
        r"extra\.safetensors: the tensor extra\.weight has no place",
    ),
    "wrong shape": (
        lambda folder: edit_tensor(folder, UP, lambda t: t.T.contiguous()),
        rf"{UP} has the shape \[16, 24\], config\.json asks for \[24, 16\]",
    ),
    "another type": (
        lambda folder: edit_tensor(folder, NORM, lambda t: t.bfloat16()),
        rf"{NORM} is BF16 and \S+ is F32; pass --dtype",
    ),
    "type of no weights": (
        lambda folder: edit_tensor(folder, NORM, lambda t: t.to(torch.int8)),
        rf"{NORM} is I8; only F32, BF16, F16 can be converted",
    ),
    "no weight map": (
        lambda folder: (folder / INDEX).write_text("{}"),
        rf'{INDEX}: has no "weight_map"',
    ),
    "broken index": (
        lambda folder: (folder / INDEX).write_text("{"),
        rf"{INDEX}: cannot be read as JSON",
    ),
    "weights of another format": (
        lambda folder: (
            [path.unlink() for path in folder.glob("model*")],
            (folder / "pytorch_model-00001-of-00002.bin").touch(),
            (folder / "pytorch_model-00002-of-00002.bin").touch(),
        ),
        r"weights are in pytorch_model-00001-of-00002\.bin and 1 more, and only safetensors are",
    ),
    "no weights": (
        lambda folder: [path.unlink() for path in folder.glob("model*")],
        r"holds neither model\.safetensors\.index\.json nor model\.safetensors",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_refused_by_file_and_tensor(folder: Path, case: str) -> None:
    spoil, message = BROKEN[case]
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        checked(folder)


def test_types_may_differ_where_all_are_converted(folder: Path) -> None:
    edit_tensor(folder, NORM, lambda tensor: tensor.bfloat16())
    HuggingFaceWeights(folder).dtype(convert=True)


def test_a_folder_or_a_hub_name_is_resolved(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_folder(str(made), "--hf") == made
    for name in ("/no/such/folder", "no-such-folder", "a/b/c"):
        with pytest.raises(ValueError, match=rf"--hf {name}: no such folder; give one, or a name"):
            resolve_folder(name, "--hf")
    with pytest.raises(ValueError, match=r"--lora .* holds no adapter_config\.json"):
        resolve_folder(str(made), "--lora", "adapter_config.json")
    asked = []

    def download(name: str, ignore_patterns: list[str]) -> str:
        asked.append((name, "*.safetensors" in ignore_patterns, "*.bin" in ignore_patterns))
        return str(made)

    monkeypatch.setattr("megatron_espo.conversion.hugging_face.snapshot_download", download)
    assert resolve_folder("org/model", "--hf") == made
    assert resolve_folder("org/model", "--hf-template", weights=False) == made
    assert asked == [("org/model", False, True), ("org/model", True, True)]


def test_a_hub_that_cannot_be_reached_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, **_: Any) -> str:
        raise OSError("offline\nmore lines")

    monkeypatch.setattr("megatron_espo.conversion.hugging_face.snapshot_download", download)
    with pytest.raises(ValueError, match=r"--hf org/model: .*does not give it \(offline\)\.$"):
        resolve_folder("org/model", "--hf")


ADAPTED = {
    f"model.transformer.blocks.{layer}.{name}": SOURCES[
        f"model.transformer.blocks.{layer}.{name}.weight"
    ]
    for layer in range(2)
    for name in ("q_proj", "v_proj", "up_proj")
}
# The published adapters name Llama's layers, of which LLaDA has four.
LORA_CONFIG = {
    "peft_type": "LORA", "r": 4, "lora_alpha": 6, "bias": "none", "use_rslora": False,
    "fan_in_fan_out": False, "init_lora_weights": True, "modules_to_save": None,
    "target_modules": ["q_proj", "v_proj", "up_proj", "gate_proj", "o_proj"],
}  # fmt: skip


def write_adapter(
    folder: Path,
    infix: str = "",
    change: Callable[[dict[str, Any]], object] = id,
    layers: Mapping[str, tuple[int, ...]] = ADAPTED,
    **config: Any,
) -> Path:
    folder.mkdir()
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for path, (rows, columns) in layers.items():
        prefix = f"base_model.model.{path}"
        tensors[f"{prefix}.lora_A{infix}.weight"] = torch.randn(4, columns, generator=generator)
        tensors[f"{prefix}.lora_B{infix}.weight"] = torch.randn(rows, 4, generator=generator)
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**LORA_CONFIG, **config}))
    return folder


@pytest.mark.parametrize(
    ("infix", "stabilized", "scale"),
    [("", False, 6 / 4), (".default", False, 1.5), ("", True, 3.0)],
)
def test_merged_weights_compute_what_layer_and_adapter_do(
    made: Path, tmp_path: Path, infix: str, stabilized: bool, scale: float
) -> None:
    alphas = {r"blocks\.1\.q_proj": 12, "q_proj": 3}
    adapter = write_adapter(tmp_path / "lora", infix, use_rslora=stabilized, alpha_pattern=alphas)
    plain, merged = HuggingFaceWeights(made), MergedWeights(made, adapter)
    matrices = load_file(adapter / "adapter_model.safetensors")
    assert merged.num_merged == 6 and merged.unused_targets() == ["gate_proj", "o_proj"]
    x = torch.randn(3, 16, dtype=torch.float64)
    for name in SOURCES:
        path = name.removesuffix(".weight")
        before, after = plain.read(name), merged.read(name)
        assert after.dtype == before.dtype
        if path not in ADAPTED:
            assert torch.equal(before, after)
            continue
        a, b = (matrices[f"base_model.model.{path}.lora_{s}{infix}.weight"].double() for s in "AB")
        own = 0.5 if path.endswith("0.q_proj") else 2.0 if path.endswith("1.q_proj") else 1.0
        expected = x @ before.double().T + own * scale * (x @ a.T) @ b.T
        torch.testing.assert_close(x @ after.double().T, expected, rtol=1e-5, atol=1e-5)


def rename(tensors: dict[str, Any], old: str, new: str) -> None:
    for name in [name for name in tensors if old in name]:
        tensors[name.replace(old, new)] = tensors.pop(name)


def drop(tensors: dict[str, Any], part: str) -> None:
    tensors.pop(next(name for name in tensors if part in name))


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (
            lambda t: rename(t, "up_proj", "mlp.up_proj"),
            {},
            r"adapts model\.\S*mlp\.up_proj, which",
        ),
        (
            lambda t: rename(t, "up_proj", "ff_out"),
            {},
            r"fits a weight of \[24, 16\], .*\[16, 24\]",
        ),
        (lambda t: drop(t, "lora_A"), {}, r"LoRA matrices of \S+ do not fit together"),
        (lambda t: rename(t, "lora_A", "lora_embedding_A"), {}, r"is no LoRA matrix"),
        (id, {"peft_type": "IA3"}, '"peft_type"'),
        (id, {"use_dora": True}, '"use_dora"'),
        (id, {"bias": "all"}, '"bias"'),
        (id, {"modules_to_save": ["ff_out"]}, '"modules_to_save"'),
        (id, {"init_lora_weights": "pissa"}, '"init_lora_weights"'),
        (id, {"lora_alpha": None}, '"lora_alpha"'),
        # Variants of plain LoRA, and one that PEFT does not have yet.
        (id, {"alora_invocation_tokens": [1, 2]}, '"alora_invocation_tokens"'),
        (id, {"use_bdlora": {"target_modules_bd_a": ["q_proj"]}}, '"use_bdlora"'),
        (id, {"arrow_config": {"top_k": 2}}, '"arrow_config"'),
        (id, {"kasa_config": {}, "monteclora_config": {"n": 1}}, '"monteclora_config"'),
        (id, {"fan_in_fan_out": True}, '"fan_in_fan_out"'),
        (id, {"layer_replication": [[0, 2]]}, '"layer_replication"'),
        (id, {"trainable_token_indices": [3]}, '"trainable_token_indices"'),
        (id, {"target_parameters": ["q"]}, '"target_parameters"'),
        (id, {"lora_bias": True}, '"lora_bias"'),
        (id, {"use_qalora": True}, '"use_qalora"'),
        (id, {"loftq_config": {"loftq_bits": 4}}, '"loftq_config"'),
        (id, {"use_variant_of_2027": 0.5}, '"use_variant_of_2027"'),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    made: Path, tmp_path: Path, change: Any, config: dict[str, Any], message: str
) -> None:
    adapter = write_adapter(tmp_path / "lora", change=change, **config)
    with pytest.raises(ValueError, match=message):
        MergedWeights(made, adapter)


# What PEFT 0.21 writes for a plain adapter.
PEFT_WRITES = {
    "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None,
    "auto_mapping": None, "base_model_name_or_path": "GSAI-ML/LLaDA-8B-Instruct",
    "corda_config": None, "ensure_weight_tying": False, "eva_config": None,
    "exclude_modules": None, "inference_mode": True, "kasa_config": None,
    "layer_replication": None, "layers_pattern": None, "layers_to_transform": None,
    "loftq_config": {}, "lora_bias": False, "lora_dropout": 0.05, "lora_ga_config": None,
    "megatron_config": None, "megatron_core": "megatron.core", "monteclora_config": None,
    "peft_version": "0.21.2", "qalora_group_size": 16, "rank_pattern": {}, "revision": None,
    "target_parameters": None, "task_type": "CAUSAL_LM", "trainable_token_indices": None,
    "use_bdlora": None, "use_dora": False, "use_qalora": False, "velora_config": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("targets", "unused"),
    [
        (["q_proj", "v_proj", "up_proj"], []),
        (["blocks.1.q_proj", "1.ff_out", "transformer.ff_out"], []),
        (["proj", "blocks.2.q_proj", "q_proj"], ["proj", "blocks.2.q_proj"]),
        ("all-linear", []),
        (r".*\.(q|k|v)_proj", []),
        (None, []),
    ],
)
def test_only_a_named_target_that_no_layer_has_is_told(
    made: Path, tmp_path: Path, targets: Any, unused: list[str]
) -> None:
    adapter = write_adapter(tmp_path / "lora", **PEFT_WRITES, target_modules=targets)
    assert MergedWeights(made, adapter).unused_targets() == unused
