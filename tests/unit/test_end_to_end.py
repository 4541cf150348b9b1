"""The commands that users type, at their smallest, on real files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_espo.monitor.curves import PANELS

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")},
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(*arguments: str, fails: bool = False) -> str:
    """Run Python with arguments; returns what it printed."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=ENVIRONMENT,
        text=True,
        timeout=240,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert (done.returncode != 0) == fails, done.stdout[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer, sudoku data, and a base model fine-tuned for a few steps."""
    folder = tmp_path_factory.mktemp("run")
    run("tools/make_tokenizer.py", "--out", str(folder / "tokenizer"))
    run(
        "tools/prepare_data.py",
        "sudoku",
        "--out",
        str(folder / "data"),
        "--seed",
        "1",
        "--train",
        "40",
        "--test",
        "12",
        "--demonstrations",
        "64",
    )
    run(
        *TORCHRUN,
        "-m",
        "megatron_espo.training.pretrain",
        *model(folder),
        "--sft-train-data",
        str(folder / "data/demonstrations.jsonl"),
        "--sft-valid-data",
        str(folder / "data/demonstrations.jsonl"),
        "--sft-completion-length",
        "16",
        "--micro-batch-size",
        "8",
        "--global-batch-size",
        "32",
        "--train-iters",
        "6",
        "--eval-iters",
        "1",
        "--eval-interval",
        "3",
        "--lr",
        "2e-3",
        "--save",
        str(folder / "base"),
    )
    return folder


def model(folder: Path) -> list[str]:
    return [
        "--preset",
        "tiny",
        "--num-layers",
        "2",
        "--tokenizer-model",
        str(folder / "tokenizer"),
        "--seq-length",
        "32",
    ]


SAMPLING = (
    "--rollout-completion-length 16 --rollout-block-length 8 --rollout-denoising-steps 8 "
    "--rollout-micro-batch-size 8 --espo-task sudoku"
).split()


def espo(folder: Path, name: str, *flags: str, fails: bool = False) -> str:
    """Run ESPO for four rollouts on two data-parallel ranks."""
    return run(
        *TORCHRUN, "-m", "megatron_espo.training.espo", *model(folder), *SAMPLING,
        "--espo-train-data", str(folder / "data/train.jsonl"),
        "--espo-eval-data", str(folder / "data/test.jsonl"),
        "--espo-num-rollouts", "4", "--espo-prompts-per-rollout", "4", "--espo-group-size", "4",
        "--espo-updates-per-rollout", "2", "--espo-reference-mix-interval", "3",
        "--micro-batch-size", "8", "--lr", "1e-3", "--lr-warmup-iters", "2", "--clip-grad", "0.5",
        "--pretrained-checkpoint", str(folder / "base"),
        "--load", str(folder / name), "--save", str(folder / name),
        "--tensorboard-dir", str(folder / f"{name}-events"), *flags,
        fails=fails,
    )  # fmt: skip


def final_weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Read model and optimizer tensors of the last checkpoint."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    target = folder / f"{name}.pt"
    dcp_to_torch_save(str(folder / name / "iter_0000008"), str(target))
    tensors: dict[str, torch.Tensor] = {}

    def collect(prefix: str, value: object) -> None:
        if isinstance(value, torch.Tensor):
            tensors[prefix] = value
        elif isinstance(value, dict):
            for key, item in value.items():
                collect(f"{prefix}/{key}", item)

    collect("", torch.load(target, weights_only=False))
    return tensors


def scalars(folder: Path, name: str) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / f"{name}-events"), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(point.step, point.value) for point in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if not tag.startswith(("time/", "performance/"))
    }


def test_espo_resumes_bit_for_bit_and_reports(folder: Path) -> None:
    printed = espo(folder, "whole")
    assert printed.count("\nrollout ") == 4 and printed.count("held-out") == 2
    espo(folder, "parts", "--exit-interval", "4")
    assert not (folder / "parts/iter_0000008").exists()
    espo(folder, "parts")
    whole, parts = final_weights(folder, "whole"), final_weights(folder, "parts")
    assert whole.keys() == parts.keys() and len(whole) > 10
    moved = final_norm_of_difference(folder, whole)
    assert moved > 0, "training changed nothing"
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name
    curves = scalars(folder, "whole")
    assert curves == scalars(folder, "parts")
    # Old and current ELBO agree at the first update of every rollout: the ratio is exactly 1.
    assert curves["policy/ratio_first_update/max_deviation"] == [(s, 0.0) for s in (1, 3, 5, 7)]
    assert [step for step, _ in curves["reward/mean"]] == [2, 4, 6, 8]
    wanted = {
        "reward/std", "reward/zero_std_groups", "policy/clip_fraction_low",
        "policy/clip_fraction_high", "policy/learning_rate", "elbo/mc_variance_per_token",
        "rollout/completion_length/mean",
    }  # fmt: skip
    drawn = {name for _, _, labels in PANELS for name in labels}
    assert wanted | drawn <= curves.keys()


def final_norm_of_difference(folder: Path, weights: dict[str, torch.Tensor]) -> float:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    target = folder / "base.pt"
    dcp_to_torch_save(str(folder / "base" / "iter_0000006"), str(target))
    base = torch.load(target, weights_only=False)
    name = "decoder.final_layernorm.weight"
    after = next(
        tensor
        for key, tensor in weights.items()
        if key.endswith(f"/{name}") and "optimizer" not in key
    )
    before = next(
        value for key, value in base.items() if key.endswith(name) and "optimizer" not in key
    )
    return float((after - before).abs().max())


def test_evaluation_of_the_checkpoint_gives_the_runs_number(folder: Path) -> None:
    printed = run(
        "tools/evaluate.py",
        "--load",
        str(folder / "whole"),
        "--tokenizer-model",
        str(folder / "tokenizer"),
        "--seq-length",
        "32",
        *SAMPLING,
        "--espo-eval-data",
        str(folder / "data/test.jsonl"),
    )
    result = json.loads(next(x for x in printed.splitlines() if x.startswith('{"accuracy"')))
    assert result["num_problems"] == 12
    last = scalars(folder, "whole")["eval/reward"][-1][1]
    assert result["reward"] == pytest.approx(last, abs=1e-6)


def test_checkpoint_of_another_model_is_refused_on_all_ranks(folder: Path) -> None:
    printed = espo(folder, "refused", "--hidden-size", "32", fails=True)
    assert "error: --pretrained-checkpoint" in printed and "--hidden-size is 64 there" in printed
    assert '  File "' not in printed.split("error: --pretrained")[0], "a traceback came first"
    assert not (folder / "refused").exists()


def test_text_pretraining_samples_at_the_end(folder: Path, tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"{number} cats sat on the mat. " * 20)
    done = subprocess.run(
        ["bash", "examples/pretrain_tiny.sh", "--text", str(tmp_path), "--out",
         str(folder / "text"), "--", "--train-iters", "4", "--eval-iters", "1",
         "--lr-warmup-iters", "1"],
        cwd=ROOT, env={**ENVIRONMENT, "PYTHON": sys.executable}, text=True, timeout=240,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert "lm loss" in done.stdout and "Masked diffusion " in done.stdout
