"""Runs with adapters as users start them: resumed, on a changed base, evaluated, fine-tuned."""

import shutil
from pathlib import Path

import pytest
import torch
from test_end_to_end import (
    SAMPLING,
    espo,
    fine_tune,
    folder,  # noqa: F401  a fixture
    model,
    run,
    scalars,
)

from megatron_espo.api import load
from megatron_espo.checkpoint.compare import checkpoint_tensors, latest_iteration, unequal_tensors
from megatron_espo.conversion.convert import convert_to_hugging_face, convert_to_megatron

pytestmark = pytest.mark.slow

LORA = ("--lora-rank", "4", "--lora-alpha", "8", "--espo-reference-mix-interval", "0",
        "--use-distributed-optimizer")  # fmt: skip


@pytest.fixture(scope="module")
def whole(folder: Path) -> str:  # noqa: F811
    """A run of eight steps that nothing disturbs: what it printed."""
    return espo(folder, "whole-lora", *LORA)


def test_a_run_trains_adapters_and_saves_nothing_else(folder: Path, whole: str) -> None:  # noqa: F811
    assert whole.count("\nrollout ") == 4
    tensors = checkpoint_tensors(str(folder / "whole-lora"))
    weights = {name for name in tensors if name.startswith("/decoder")}
    assert len(weights) == 14 and all(".adapter." in name for name in weights)
    assert not any(name.startswith(("reference/", "/embedding")) for name in tensors)
    moments = {name for name in tensors if "exp_avg" in name}
    assert len(moments) == 2 * 14 and all(".adapter." in name for name in moments)
    assert all(tensors[name].any() for name in weights)
    curves = scalars(folder, "whole-lora")
    assert curves["policy/ratio_first_update/max_deviation"] == ([1, 3, 5, 7], [0.0] * 4)
    # Both policies are the base before the first rollout's updates, and then no more.
    distance = curves["policy/kl_per_token"][1]
    assert distance[0] == 0.0 and distance[-1] > 0.0


def test_a_run_resumes_bit_for_bit(folder: Path, whole: str) -> None:  # noqa: F811
    espo(folder, "parts-lora", *LORA, "--exit-interval", "3")
    shutil.copytree(folder / "parts-lora", folder / "moved-lora")
    espo(folder, "parts-lora", *LORA)
    ours, theirs = (checkpoint_tensors(str(folder / n)) for n in ("parts-lora", "whole-lora"))
    assert not unequal_tensors(ours, theirs)
    assert scalars(folder, "parts-lora") == scalars(folder, "whole-lora")


def test_a_run_goes_on_in_another_layout(folder: Path, whole: str) -> None:  # noqa: F811
    espo(folder, "moved-lora", *LORA, "--tensor-model-parallel-size", "2", "--sequence-parallel")
    assert latest_iteration(str(folder / "moved-lora")) == 8
    ours, theirs = (checkpoint_tensors(str(folder / n)) for n in ("moved-lora", "whole-lora"))
    assert ours.keys() == theirs.keys()
    start = checkpoint_tensors(str(folder / "moved-lora"), 3)
    for name in (name for name in ours if name.startswith("/decoder")):
        moved = (theirs[name] - start[name]).norm()
        assert (ours[name] - theirs[name]).norm() < 0.05 * moved, name


def test_a_base_that_changed_is_refused(folder: Path, whole: str, tmp_path: Path) -> None:  # noqa: F811
    changed = tmp_path / "base"
    shutil.copytree(folder / "base", changed)
    (data,) = sorted(changed.glob("iter_*/__0_*.distcp"))[:1]
    content = bytearray(data.read_bytes())
    for place in range(0, len(content), 1000):
        content[place] ^= 1
    data.write_bytes(content)
    printed = espo(folder, "whole-lora", *LORA, "--lora-base", str(changed), fails=True)
    assert f"error: {changed}/iter_0000006 is not what the adapters in --load" in printed
    assert "[rank" not in printed  # torchrun has a traceback of its own
    # Moved as it was, it is the base.
    moved = tmp_path / "moved"
    shutil.copytree(folder / "base", moved)
    espo(folder, "whole-lora", *LORA, "--lora-base", str(moved))


def test_adapters_are_found_with_their_base(
    folder: Path,  # noqa: F811
    whole: str,
    one_rank: object,
    tmp_path: Path,
) -> None:
    """For sampling and in Python: as they are merged into it."""
    printed = run(
        "tools/generate.py", "--load", str(folder / "whole-lora"), "--prompt", "1020", "--plain",
        *model(folder)[-2:], *SAMPLING, "--rollout-temperature", "0",
    )  # fmt: skip
    assert "\n1020" in printed
    convert_to_hugging_face(str(folder / "whole-lora"), str(tmp_path / "hf"), family="llada")
    convert_to_megatron(str(tmp_path / "hf"), str(tmp_path / "merged"))
    elbo = [
        load(source).elbo(["1020="], ["1234432121433412"], num_mc=16).draws
        for source in (folder / "whole-lora", tmp_path / "merged", folder / "base")
    ]
    torch.testing.assert_close(elbo[0], elbo[1], rtol=1e-5, atol=1e-4)
    assert (elbo[0] - elbo[2]).abs().min() > 1e-3


def test_fine_tuning_trains_adapters_and_resumes_bit_for_bit(folder: Path) -> None:  # noqa: F811
    program = ["-m", "megatron_espo.training.pretrain"]
    flags = ("--load", str(folder / "tuned-lora"), "--save-interval", "2",
             "--pretrained-checkpoint", str(folder / "base"), *LORA[:2])  # fmt: skip
    fine_tune(folder, "tuned-lora", program, *flags)
    first = checkpoint_tensors(str(folder / "tuned-lora"))
    assert sum(".adapter." in name for name in first) == 14 * 3
    (folder / "tuned-lora" / "latest_checkpointed_iteration.txt").write_text("4")
    shutil.rmtree(folder / "tuned-lora" / "iter_0000006")
    fine_tune(folder, "tuned-lora", program, *flags)
    assert not unequal_tensors(first, checkpoint_tensors(str(folder / "tuned-lora")))
    # ESPO starts from them, with the same base under it.
    printed = espo(
        folder, "tuned-espo", *LORA[:2], *LORA[4:], "--pretrained-checkpoint",
        str(folder / "tuned-lora"), "--exit-interval", "1"
    )  # fmt: skip
    assert printed.count("held-out (before)") == 1
