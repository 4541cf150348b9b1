"""Adapters against PEFT: the same logits, gradients and merged weights, there and back."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from llada_like import LinearTree, LLaDALike
from megatron.core import mpu
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.training.checkpointing import save_checkpoint
from megatron_state import new_groups
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_conversion import SHAPES as MIXTURE_SHAPES
from test_conversion import TINY
from torch import Tensor

from megatron_espo.conversion import dream, llada, qwen3
from megatron_espo.conversion.convert import convert_to_hugging_face, convert_to_megatron
from megatron_espo.conversion.families import FAMILIES
from megatron_espo.conversion.hf_oracle import _MODELS, _llama_config
from megatron_espo.conversion.hugging_face import HuggingFaceWeights, read_json
from megatron_espo.conversion.lora import CONFIG, WEIGHTS
from megatron_espo.conversion.mixture_oracle import MixtureOracle
from megatron_espo.conversion.peft import convert_from_peft, convert_to_peft
from megatron_espo.conversion.random_model import write_random_model
from megatron_espo.data.tokenizer import byte_tokenizer
from megatron_espo.errors import UserError
from megatron_espo.passes.pipeline import RowBatch, run_model
from megatron_espo.startup.arguments import initialize_arguments
from megatron_espo.startup.setup import build_model, start_anew

SHAPES = {
    "llada": dataclasses.replace(llada.PUBLISHED, **TINY),
    "dream": dataclasses.replace(dream.PUBLISHED, **TINY),
    # Heads of their own size.
    "qwen3": dataclasses.replace(qwen3.PUBLISHED, **TINY, kv_channels=12),
}
MIXED = {name: MIXTURE_SHAPES[name] for name in ("llada2", "llada_moe")}
SEVEN = {
    "llada": ["q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "blocks.0.ff_out"],
    "dream": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
# What PEFT is told to adapt; ff_out is LLaDA's down projection and its head.
CASES = {
    "seven, llada": ("llada", r".*\.blocks\.\d+\.(q_proj|k_proj|v_proj|attn_out|ff_proj|up_proj|"
                     r"ff_out)", False),
    "the four that PEFT finds, llada": ("llada", ["q_proj", "k_proj", "v_proj", "up_proj"], False),
    "seven and the head, rank-stabilized, dream": ("dream", [*SEVEN["dream"], "lm_head"], True),
    "seven, qwen3": ("qwen3", SEVEN["dream"], False),
    "down and head alone, llada": ("llada", ["ff_out"], False),
}  # fmt: skip
RANK, ALPHA = 5, 8


@pytest.fixture(scope="module")
def bases(tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random models in Hugging Face's form and converted."""
    root = tmp_path_factory.mktemp("bases")
    for name, shape in SHAPES.items():
        write_random_model(
            root / name, FAMILIES[name], shape, torch.float32, byte_tokenizer(), std=0.2
        )
        fresh()
        convert_to_megatron(str(root / name), str(root / f"{name}-megatron"))
    return root


def fresh() -> None:
    """Forget Megatron's arguments and groups, as a new process would."""
    start_anew()
    if mpu.model_parallel_is_initialized():
        mpu.destroy_model_parallel()


def published(folder: Path, family: str) -> torch.nn.Module:
    fields, weights = read_json(folder / "config.json"), HuggingFaceWeights(folder)
    if family == "llada":
        model: torch.nn.Module = LLaDALike(fields)
    else:
        config = _llama_config(fields)
        model = _MODELS[type(config)](config)
    model.load_state_dict({name: weights.read(name) for name in weights.tensors})
    return model


def peft_logits(model: torch.nn.Module, tokens: Tensor, family: str) -> Tensor:
    """Logits that predict each position but the first, ``[b, s - 1, n]``."""
    if family == "llada":
        return model(tokens)[:, 1:]
    b, s = tokens.shape
    everything = torch.zeros(b, 1, s, s)
    return model(input_ids=tokens, attention_mask=everything).logits[:, :-1]


@pytest.fixture(scope="module", params=CASES)
def case(request: Any, bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An adapter that PEFT made, with random matrices."""
    family, targets, stabilized = CASES[request.param]
    torch.manual_seed(4)
    model = get_peft_model(
        published(bases / family, family),
        PeftConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, use_rslora=stabilized),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    model.save_pretrained(folder)
    started = folder.parent / "started"
    convert_from_peft(str(folder), str(bases / f"{family}-megatron"), str(started))
    return family, folder, started, model


def with_adapters(bases: Path, family: str, started: Path, *flags: str) -> Any:
    """Megatron's model, as a run builds it that starts from the adapters."""
    fresh()
    initialize_arguments(
        [
            "--use-checkpoint-args", "--pretrained-checkpoint", str(started),
            "--tokenizer-model", str(bases / f"{family}-megatron/tokenizer"),
            *"--micro-batch-size 1 --train-iters 1 --lr 0 --seq-length 32".split(), *flags,
        ],
        lambda args: None,
    )  # fmt: skip
    new_groups()
    model_parallel_cuda_manual_seed(1)
    return build_model()


def megatron_logits(model: Any, tokens: Tensor, shift: bool) -> Tensor:
    b, s = tokens.shape
    rows, positions = torch.arange(b).repeat_interleave(s - 1), torch.arange(1, s).repeat(b)
    batch = RowBatch(tokens, torch.full((b,), s), rows, positions)
    chosen = run_model(model, batch, lambda logits, _: logits, shift)
    return chosen[:, : TINY["vocab_size"]].view(b, s - 1, -1)


def test_logits_and_gradients_are_pefts(bases: Path, case: Any) -> None:
    family, _, started, theirs = case
    ours = with_adapters(bases, family, started)
    tokens = torch.randint(300, (2, 12), generator=torch.Generator().manual_seed(2))
    weights = torch.randn(2, 11, 300, generator=torch.Generator().manual_seed(3))
    expected = peft_logits(theirs, tokens, family)
    actual = megatron_logits(ours, tokens, family != "llada")
    scale = expected.abs().max()
    assert (actual - expected).abs().max() < 1e-5 * scale
    with torch.no_grad(), theirs.disable_adapter():
        assert (peft_logits(theirs, tokens, family) - expected).abs().max() > 1e-2 * scale
    theirs.zero_grad()
    (expected * weights).sum().backward()
    (actual * weights).sum().backward()
    wanted = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    found = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    assert len(found) == len(wanted) and all("adapter" in name for name in found)
    pairs = 0
    for name, gradient in found.items():
        projection, side = name.rsplit(".", 1)[1].rsplit("_", 1)
        field = {
            "q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "attention_output",
            "gate_proj": "gate", "up_proj": "up", "down_proj": "down", "lm_head": "head",
        }[projection]  # fmt: skip
        path = getattr(FAMILIES[family].names, field)
        if projection != "lm_head":
            path = FAMILIES[family].names.layer.format(layer=name.split(".")[2]) + path
        other = wanted[f"base_model.model.{path}.lora_{side.upper()}.default.weight"]
        padding = gradient[len(other) :]  # of the vocabulary
        assert not padding.any() and len(padding) == (84 if name.endswith("lm_head_b") else 0)
        difference = gradient[: len(other)] - other
        assert difference.abs().max() < 1e-4 * other.abs().max(), name
        pairs += 1
    assert pairs == len(wanted)


def test_merged_weights_are_pefts_to_the_bit(bases: Path, case: Any, tmp_path: Path) -> None:
    family, folder, started, _ = case
    fresh()
    convert_to_hugging_face(
        str(started), str(tmp_path / "ours"), template=str(bases / family), check_logits=True
    )
    # The other way to the same: PEFT's folder, merged while the weights are read.
    fresh()
    convert_to_megatron(str(bases / family), str(tmp_path / "read"), lora=str(folder))
    fresh()
    convert_to_hugging_face(
        str(tmp_path / "read"), str(tmp_path / "again"), template=str(bases / family)
    )
    model = PeftModel.from_pretrained(published(bases / family, family), folder)
    merged = model.merge_and_unload(safe_merge=False).state_dict()
    base = HuggingFaceWeights(bases / family)
    changed = 0
    for written in ("ours", "again"):
        weights = HuggingFaceWeights(tmp_path / written)
        assert weights.tensors.keys() == merged.keys()
        for name in merged:
            assert torch.equal(weights.read(name), merged[name]), name
            changed += not torch.equal(base.read(name), merged[name])
    assert changed == 2 * len(adapted(folder))


def adapted(folder: Path) -> list[str]:
    return [name for name in load_file(folder / WEIGHTS) if ".lora_A." in name]


def test_exported_folders_are_what_peft_wrote(bases: Path, case: Any, tmp_path: Path) -> None:
    family, folder, started, theirs = case
    convert_to_peft(str(started), str(tmp_path / "out"), template=str(bases / family))
    ours, before = (load_file(path / WEIGHTS) for path in (tmp_path / "out", folder))
    # Beside the adapter of Qwen's head PEFT saves the head itself, which is the base's.
    more = before.keys() - ours.keys()
    assert ours.keys() <= before.keys() and len(ours) == 2 * len(adapted(folder))
    assert more == ({"base_model.model.lm_head.base_layer.weight"} if family == "dream" else set())
    assert all(torch.equal(ours[name], before[name]) for name in ours)
    # PEFT loads it: the same modules, none missing, none too many.
    loaded = PeftModel.from_pretrained(published(bases / family, family), tmp_path / "out")
    mine, yours = loaded.state_dict(), theirs.state_dict()
    assert mine.keys() == yours.keys()
    assert all(torch.equal(mine[name], yours[name]) for name in yours)
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        same = peft_logits(loaded, tokens, family) == peft_logits(theirs, tokens, family)
    assert same.all()


def spoil(change: Callable[[dict[str, Tensor]], dict[str, Tensor]], folder: Path, out: Path) -> str:
    out.mkdir()
    (out / CONFIG).write_text((folder / CONFIG).read_text())
    save_file(change(load_file(folder / WEIGHTS)), out / WEIGHTS)
    return str(out)


def test_adapters_that_would_not_be_themselves_are_refused(
    bases: Path, case: Any, tmp_path: Path
) -> None:
    family, folder, started, _ = case
    fresh()
    base = str(bases / f"{family}-megatron")

    def first_layer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: t for name, t in tensors.items() if ".1." not in name}

    def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n.replace(".lora_", ".x.lora_"): t for n, t in tensors.items() if ".lora_" in n}

    def wider(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: torch.cat((t, t), 1) if "lora_A" in n else t for n, t in tensors.items()}

    def other_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        name = "base_model.model.lm_head.base_layer.weight"
        return tensors | {name: tensors[name] + 1e-3}

    wrongs = [(first_layer, "layers only"), (renamed, "is no layer of"), (wider, "another model")]
    if family == "dream":
        wrongs.append((other_head, "brings its own weight of lm_head"))
    for number, (change, message) in enumerate(wrongs):
        wrong = spoil(change, folder, tmp_path / str(number))
        with pytest.raises(UserError, match=message):
            convert_from_peft(wrong, base, str(tmp_path / "out"))
    with pytest.raises(UserError, match="holds adapters itself"):
        convert_from_peft(str(folder), str(started), str(tmp_path / "out"))
    with pytest.raises(UserError, match="holds a whole model"):
        convert_to_peft(base, str(tmp_path / "out"), family=family)
    other = str(bases / ("dream-megatron" if family == "llada" else "llada-megatron"))
    with pytest.raises(UserError, match="is not what the adapters in"):
        convert_to_hugging_face(
            str(started), str(tmp_path / "out"), template=str(bases / family), base=other
        )
    assert not (tmp_path / "out").exists()


# Rank-stabilized with q, k and v in one layer of the folder; a part of them; and without one.
MIXTURES = {
    "llada2, seven and the head": ("llada2", ["all-linear", "lm_head"], ["--lora-rslora"]),
    "llada2, two": ("llada2", ["q_proj", "v_proj"], []),
    "llada_moe": ("llada_moe", ["all-linear"], []),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_adapters_of_mixtures_are_pefts_of_the_published_layers(
    name: str, tokenizer: str, tmp_path: Path
) -> None:
    """Attention, dense layers and shared experts, never experts or routers; there and merged."""
    family, targets, flags = MIXTURES[name]
    write_random_model(
        tmp_path / family, FAMILIES[family], MIXED[family], torch.float32, byte_tokenizer(), std=0.2
    )
    fresh()
    base, saved, out = (tmp_path / part for part in (f"{family}-megatron", "saved", "adapter"))
    convert_to_megatron(str(tmp_path / family), str(base))
    ours = with_adapters(
        tmp_path, family, base, "--lora-rank", str(RANK), "--lora-alpha", str(ALPHA),
        "--lora-targets", *targets, "--save", str(saved), "--no-save-optim", "--no-save-rng",
        *flags,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    for parameter in ours.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0.0, 0.1, generator=generator)
    save_checkpoint(1, [ours], None, None, 0)
    convert_to_peft(str(saved), str(out), template=str(tmp_path / family))
    fields, weights = (
        read_json(tmp_path / family / "config.json"),
        HuggingFaceWeights(tmp_path / family),
    )
    tree = LinearTree({name: weights.read(name) for name in weights.tensors})
    loaded = PeftModel.from_pretrained(tree, out)
    adapted_layers = {n.split(".lora_A")[0] for n in load_file(out / WEIGHTS) if ".lora_A" in n}
    assert adapted_layers == {
        n.split(".lora_A")[0] for n, _ in loaded.named_modules() if n.endswith("lora_A")
    }
    merged = loaded.merge_and_unload().state_dict()
    tokens = torch.randint(256, (2, 12), generator=generator)
    lengths = torch.full((2,), 12)
    expected, plain = (
        MixtureOracle(fields, read, torch.float32).logits(tokens, lengths)[:, 1:]
        for read in (merged.__getitem__, weights.read)
    )
    with torch.no_grad():
        actual = megatron_logits(ours, tokens, False)
    scale = expected.abs().max()
    assert (actual - expected).abs().max() < 1e-5 * scale
    assert (plain - expected).abs().max() > 1e-2 * scale
    convert_to_hugging_face(str(saved), str(tmp_path / "ours"), template=str(tmp_path / family))
    fresh()
    convert_to_megatron(str(tmp_path / family), str(tmp_path / "read"), lora=str(out))
    convert_to_hugging_face(
        str(tmp_path / "read"), str(tmp_path / "again"), template=str(tmp_path / family)
    )
    for written in ("ours", "again"):
        found = HuggingFaceWeights(tmp_path / written)
        assert all(torch.equal(found.read(name), merged[name]) for name in weights.tensors)
    if family == "llada2":
        with pytest.raises(UserError, match=r"query_key_value.*merge it instead"):
            convert_from_peft(str(out), str(base), str(tmp_path / "wrong"))
