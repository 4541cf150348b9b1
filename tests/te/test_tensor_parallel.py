"""Transformer Engine's layers and FP8 on two ranks that share a model.

The ranks are tensor-parallel, with and without sequence parallelism, or context-parallel. The file
starts itself again under torchrun.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import FP8, TE, Build, Built
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.utils import unwrap_model
from megatron.training.checkpointing import save_checkpoint
from test_fp8 import FULL, RECIPES, completions_of, elbo, gradient

from megatron_espo import device

WORLD = int(os.environ.get("WORLD_SIZE", "1"))
TP = ("--tensor-model-parallel-size", "2")
SPLITS = {
    "tp": TP,
    "tp, sequence parallel": (*TP, "--sequence-parallel"),
    "cp": ("--context-parallel-size", "2"),
}
# Blocks of mxfp8 fill both ranks' parts of every layer.
EVEN = ("--ffn-hidden-size", "128")
# Odd: micro-batches of one and of seven rows do not fill what FP8 wants.
SEQUENCES = 7
on_two_ranks = pytest.mark.skipif(WORLD != 2, reason="runs inside test_two_ranks_share_a_model")


@pytest.mark.skipif(WORLD != 1, reason="starts the others")
def test_two_ranks_share_a_model() -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            "--no-python", sys.executable, "-m", "pytest", __file__, "-q", "-x", "--timeout", "500",
            "-p", "no:cacheprovider", "--show-capture", "no",
        ],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=560, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    assert done.stdout.count(" passed") == 2, done.stdout[-2000:]


@pytest.fixture(scope="module", autouse=True)
def end() -> Iterator[None]:
    yield
    if WORLD == 2 and dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One folder of both ranks."""
    box = [str(tmp_path_factory.mktemp("weights"))]
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    dist.broadcast_object_list(box, 0)
    return box[0]


@pytest.fixture(scope="module")
def of_one_rank() -> dict[str, Any]:
    """What a model that is not split gives, computed by the first test that asks."""
    return {}


@pytest.fixture
def weights(folder: str, build: Build) -> tuple[str, ...]:
    """Flags that load the weights that all models here have."""
    if not Path(folder, "latest_checkpointed_iteration.txt").exists():
        dist.barrier()
        written = build(*TE, *EVEN, "--save", folder)
        save_checkpoint(1, list(written.model.chunks), written.optimizer, written.scheduler, 0)
    dist.barrier()
    return (*EVEN, "--pretrained-checkpoint", folder)


@on_two_ranks
@pytest.mark.parametrize("split", SPLITS)
def test_a_model_in_two_parts_is_the_same_model(
    build: Build, weights: tuple[str, ...], split: str, of_one_rank: dict[str, Any]
) -> None:
    if "plain" not in of_one_rank:
        whole = build(*TE, *weights)
        of_one_rank["plain"] = elbo(whole), completions_of(whole, 3)
    wanted, tokens = of_one_rank["plain"]
    parts = build(*TE, *SPLITS[split], *weights)
    assert ((elbo(parts) - wanted).abs().max() / wanted.abs().max()) < 1e-5
    assert torch.equal(completions_of(parts, 3), tokens)


@on_two_ranks
@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_of_two_parts_takes_any_number_of_rows(
    build: Build, weights: tuple[str, ...], recipe: str, of_one_rank: dict[str, Any]
) -> None:
    """Odd numbers of rows, last micro-batches that are not full; and ratios of unchanged weights.

    The stand-in refuses a rank's share that the recipe cannot take.
    """
    flags = (*FP8, "--fp8-recipe", recipe, *weights)
    if "bf16" not in of_one_rank:
        of_one_rank["bf16"] = elbo(build(*TE, "--bf16", *weights), SEQUENCES, 1)
    plain = of_one_rank["bf16"]
    whole = build(*flags)
    wanted = {rows: elbo(whole, SEQUENCES, rows) for rows in (1, 2, 7)}
    for name, split in SPLITS.items():
        parts = build(*flags, *split)
        for rows, of_whole in wanted.items():
            found = elbo(parts, SEQUENCES, rows)
            # Parts have scales of their own, so they round otherwise, but not more coarsely.
            ratio = (found - plain).abs().mean() / (of_whole - plain).abs().mean()
            print(f"{recipe}, {name}, {rows} rows: {ratio:.2f} of one rank's distance from bf16")
            assert ratio < 2
        for n in (1, 2, 3):  # two rows at a time
            assert not (completions_of(parts, n) == parts.model.mask_token_id).any()
        assert torch.equal(gradient(parts, "two_pass"), elbo(parts))


@on_two_ranks
@pytest.mark.parametrize("split", SPLITS)
def test_fused_gradients_of_two_parts_are_those_of_the_whole(
    build: Build,
    weights: tuple[str, ...],
    split: str,
    monkeypatch: pytest.MonkeyPatch,
    of_one_rank: dict[str, Any],
) -> None:
    """In bf16, where the head adds its part itself and sums the gradient of its states."""

    def gradients(fused: bool, *flags: str) -> list[torch.Tensor]:
        monkeypatch.setitem(device.CPU_ARGUMENT_DEFAULTS, "gradient_accumulation_fusion", fused)
        built = build(*TE, "--bf16", *flags, *weights)
        gradient(built, "two_pass")
        (model,) = unwrap_model(list(built.model.chunks))
        head, norm = model.output_layer.weight, model.decoder.final_layernorm.weight
        assert head.grad_added_to_main_grad is fused
        of_head = gather_from_tensor_model_parallel_region(head.main_grad.t().contiguous())
        # Without the rows that pad the vocabulary: their number depends on the split.
        # Data-parallel ranks have the same sequences here, as if there were as many more.
        copies = built.model.layout.dp_size
        return [of_head[:, : built.args.vocab_size] / copies, norm.main_grad / copies]

    if "gradients" not in of_one_rank:
        of_one_rank["gradients"] = gradients(False)
    for theirs, ours in zip(of_one_rank["gradients"], gradients(True, *SPLITS[split]), strict=True):
        assert (ours - theirs).abs().max() / theirs.abs().max() < 0.02


@on_two_ranks
def test_ratio_of_unchanged_weights_is_one_exactly_with_recomputation(
    build: Build, weights: tuple[str, ...]
) -> None:
    built = build(*FP8, *SPLITS["tp, sequence parallel"], *FULL.split(), *weights)
    old = elbo(built)
    for mode in ("two_pass", "joint"):
        assert torch.equal(gradient(built, mode), old)


@on_two_ranks
def test_less_padding_than_both_ranks_need_is_refused(
    build: Build, weights: tuple[str, ...]
) -> None:
    """The check of the stand-in is what the tests above rest on."""
    built: Built = build(*FP8, "--fp8-recipe", "mxfp8", *SPLITS["tp, sequence parallel"], *weights)
    assert built.model.pad_multiple == 64
    short = replace(built, model=replace(built.model, pad_multiple=32))
    with pytest.raises(ValueError, match="is not a multiple of 32"):
        elbo(short, 1, 1)
