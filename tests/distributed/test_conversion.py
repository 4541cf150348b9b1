"""Converted checkpoints in every layout: transformers' logits, and the same bits back."""

import dataclasses
import filecmp
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import Built, build_layout
from megatron.training.checkpointing import save_checkpoint
from torch import Tensor

from megatron_espo.conversion import dream, illada, llada, qwen3
from megatron_espo.conversion.convert import convert_to_hugging_face
from megatron_espo.conversion.families import FAMILIES
from megatron_espo.conversion.hf_oracle import HfOracle
from megatron_espo.conversion.hugging_face import HuggingFaceWeights, read_json
from megatron_espo.conversion.random_model import write_random_model
from megatron_espo.data.tokenizer import byte_tokenizer
from megatron_espo.passes.pipeline import RowBatch, forward_only

ROOT = Path(__file__).parents[2]
# Grouped queries, and a vocabulary that every layout pads: 300 to 304 or 320.
TINY = {
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "vocab_size": 300,
    "max_position_embeddings": 128,
    "mask_token_id": 256,
    "eos_token_id": 257,
}
SHAPES = {
    "dream": dataclasses.replace(dream.PUBLISHED, **TINY),
    # Tied embeddings, of which the last pipeline stage has a copy.
    "illada": dataclasses.replace(illada.PUBLISHED, **TINY),
    # Heads of their own size, and norms of queries and keys.
    "qwen3-tied": dataclasses.replace(
        qwen3.PUBLISHED, **TINY, kv_channels=12, tied_embeddings=True
    ),
    # What LLaDA's code can do and its published models do not use.
    "llada-qkv-bias": dataclasses.replace(llada.PUBLISHED, **TINY, qkv_bias=True),
}
SOURCES = {
    "illada, float32": torch.float32,
    "dream, float32": torch.float32,
    "llada-qkv-bias, bfloat16": torch.bfloat16,
    "qwen3-tied, float32": torch.float32,
}
# tp, pp; what is left of the four ranks is data parallel. (4, 2) needs eight: see
# tests/unit/test_conversion.py.
LAYOUTS = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)]
RUN = "--use-checkpoint-args --make-vocab-size-divisible-by 8 --micro-batch-size 2 --train-iters 10"


@dataclass(frozen=True)
class Loaded:
    """A converted model in a layout."""

    built: Built
    source: Path
    saved: str
    dtype: torch.dtype


@pytest.fixture(scope="session")
def converted(shared_folder: str) -> Path:
    """Random models in Hugging Face's form, and each converted by a rank of its own."""
    root = Path(shared_folder)
    name, dtype = list(SOURCES.items())[dist.get_rank()]
    shape = name.split(",")[0]
    write_random_model(
        root / "hf" / name, FAMILIES[shape.split("-")[0]], SHAPES[shape], dtype, byte_tokenizer(),
        # In 16 bits large weights make rounding grow from layer to layer.
        std=0.2 if dtype == torch.float32 else 0.05, max_shard_size="50KB",
    )  # fmt: skip
    launcher = ("RANK", "LOCAL_", "WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC")
    alone = {k: v for k, v in os.environ.items() if not k.startswith(launcher)}
    done = subprocess.run(
        [
            *(sys.executable, "tools/convert_hf.py", "to-megatron", "--verify"),
            *("--hf", str(root / "hf" / name), "--out", str(root / "megatron" / name)),
        ],
        cwd=ROOT, env={**alone, "PYTHONPATH": str(ROOT)}, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    dist.barrier()
    return root


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda layout: "tp{}-pp{}".format(*layout))
def layout(request: Any) -> tuple[int, int]:
    return request.param


@pytest.fixture(scope="module", params=SOURCES, ids=lambda name: name.replace(", ", "-"))
def loaded(request: Any, layout: tuple[int, int], converted: Path) -> Loaded:
    name, dtype = request.param, SOURCES[request.param]
    checkpoint = converted / "megatron" / name
    saved = str(converted / "saved" / name / "tp{}-pp{}".format(*layout))
    flags = ["--load", str(checkpoint), "--save", saved, "--lr", "1e-3"]
    flags += ["--bf16"] if dtype == torch.bfloat16 else []
    tokenizer = str(checkpoint / "tokenizer")
    built = build_layout(tokenizer, *layout, tuple(flags), shape=RUN.split())
    return Loaded(built, converted / "hf" / name, saved, dtype)


def random_rows() -> tuple[Tensor, Tensor]:
    """Rows of different lengths with few, some and many masks."""
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randint(300, (3, 24), generator=generator)
    tokens[torch.rand(3, 24, generator=generator) < torch.tensor([[0.0], [0.3], [0.8]])] = 256
    return tokens, torch.tensor([24, 17, 9])


@torch.no_grad()
def layout_logits(loaded: Loaded, tokens: Tensor, lengths: Tensor) -> Tensor | None:
    """Logits of every position with a prediction, ``[b, s, vocabulary]``; on the last stage."""
    model = loaded.built.model
    b, s = tokens.shape
    first = int(model.logit_shift)
    rows, positions = torch.arange(b).repeat_interleave(s - first), torch.arange(first, s).repeat(b)
    batch = RowBatch(tokens, lengths, rows, positions)
    chunks = [chunk.eval() for chunk in model.chunks]
    results = forward_only(chunks, [batch], lambda x, _: x, model.logit_shift, model.layout)
    if not model.layout.is_last_stage:
        return None
    shards = [torch.empty_like(results[0]) for _ in range(model.layout.tp_size)]
    dist.all_gather(shards, results[0].contiguous(), group=model.layout.tp)
    logits = torch.zeros(b, s, 300)
    logits[rows, positions] = torch.cat(shards, dim=1)[:, :300].float()
    return logits


def test_logits_are_transformers_in_every_layout(loaded: Loaded) -> None:
    tokens, lengths = random_rows()
    ours = layout_logits(loaded, tokens, lengths)
    if ours is None:
        return
    fields = read_json(loaded.source / "config.json")
    theirs = HfOracle(fields, HuggingFaceWeights(loaded.source), loaded.dtype).logits(
        tokens, lengths
    )
    compared = torch.arange(24)[None] < lengths[:, None]
    compared[:, 0] = False
    ours, theirs = ours[compared], theirs[compared]
    if loaded.dtype == torch.float32:
        assert theirs.abs().max() > 5
        assert (ours - theirs).abs().max() <= 1e-4
        assert torch.equal(ours.argmax(-1), theirs.argmax(-1))
    else:
        cosine = torch.nn.functional.cosine_similarity(ours, theirs, dim=-1)
        assert cosine.min() >= 0.9999, cosine.min()


def test_the_same_bits_come_back_from_every_layout(loaded: Loaded) -> None:
    built, source = loaded.built, loaded.source
    for chunk in built.model.chunks:
        assert all(parameter.dtype == loaded.dtype for parameter in chunk.parameters())
    save_checkpoint(1, list(built.model.chunks), built.optimizer, built.scheduler, 0)
    dist.barrier()
    problem = [""]
    if dist.get_rank() == 0:
        out = Path(loaded.saved, "hf")
        convert_to_hugging_face(loaded.saved, str(out), str(source))
        names = sorted(path.name for path in source.iterdir())
        assert sorted(path.name for path in out.iterdir()) == names and len(names) > 8
        _, different, unread = filecmp.cmpfiles(source, out, names, shallow=False)
        problem = [", ".join(different + unread)]
    dist.broadcast_object_list(problem, 0)
    assert problem == [""]
