"""Mixtures of experts as users train them: fine-tuned, in ESPO, resumed, in another layout."""

from pathlib import Path

import pytest
import torch
from test_end_to_end import SAMPLING, TORCHRUN, run, scalars

from megatron_espo.checkpoint.compare import checkpoint_tensors, unequal_tensors

pytestmark = pytest.mark.slow

MODEL = (
    "--preset tiny --num-layers 2 --seq-length 32 --qk-layernorm --rotary-percent 0.5 "
    "--num-experts 8 --moe-layer-freq [0,1] --moe-ffn-hidden-size 32 "
    "--moe-shared-expert-intermediate-size 32 --moe-router-topk 4 --moe-router-num-groups 4 "
    "--moe-router-group-topk 2 --moe-router-score-function sigmoid "
    "--moe-router-enable-expert-bias --moe-router-topk-scaling-factor 2.5"
).split()
EP = ("--expert-model-parallel-size", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer, sudoku data, and a base that was fine-tuned for a few steps."""
    folder = tmp_path_factory.mktemp("run")
    run("tools/make_tokenizer.py", "--out", str(folder / "tokenizer"))
    run("tools/prepare_data.py", "sudoku", "--out", str(folder / "data"), "--seed", "1",
        "--train", "40", "--test", "6", "--demonstrations", "32")  # fmt: skip
    fine_tune(folder, "base", *MODEL, *EP, "--moe-router-bias-update-rate", "0.01")
    return folder


def fine_tune(folder: Path, name: str, *flags: str, fails: bool = False) -> str:
    return run(
        *TORCHRUN, "-m", "megatron_espo.training.pretrain", "--tokenizer-model",
        str(folder / "tokenizer"), "--sft-train-data", str(folder / "data/demonstrations.jsonl"),
        "--sft-completion-length", "16", "--micro-batch-size", "4", "--global-batch-size", "8",
        "--train-iters", "3", "--lr", "2e-3", "--log-interval", "1", "--save", str(folder / name),
        "--tensorboard-dir", str(folder / f"{name}-events"), *flags, fails=fails,
    )  # fmt: skip


def espo(folder: Path, name: str, *flags: str, fails: bool = False) -> str:
    """Run ESPO for two rollouts with two updates each, on two ranks."""
    return run(
        *TORCHRUN, "-m", "megatron_espo.training.espo", "--use-checkpoint-args", "--seq-length",
        "32", "--tokenizer-model", str(folder / "tokenizer"), *SAMPLING, "--rollout-early-stop",
        "--espo-train-data", str(folder / "data/train.jsonl"),
        "--espo-eval-data", str(folder / "data/test.jsonl"),
        "--espo-num-rollouts", "2", "--espo-prompts-per-rollout", "4", "--espo-group-size", "4",
        "--espo-updates-per-rollout", "2", "--espo-gradient", "two_pass", "--micro-batch-size",
        "8", "--lr", "3e-4",
        "--pretrained-checkpoint", str(folder / "base"), "--load", str(folder / name), "--save",
        str(folder / name), "--save-interval", "1", "--tensorboard-dir",
        str(folder / f"{name}-events"), *flags, fails=fails,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    espo(folder, "whole", *EP)
    return folder / "whole"


def biases(folder: Path) -> torch.Tensor:
    tensors = checkpoint_tensors(str(folder))
    found = [tensor for name, tensor in tensors.items() if "expert_bias" in name]
    assert all(torch.equal(tensor, found[0]) for tensor in found)  # the reference's, too
    return found[0]


def test_biases_move_in_fine_tuning_and_stay_in_rl(folder: Path, whole: Path) -> None:
    base = biases(folder / "base")
    assert base.abs().max() == pytest.approx(0.03, rel=0.4) and base.dtype == torch.float32
    assert torch.equal(biases(whole), base)
    fine_tune(folder, "frozen", *MODEL, *EP, "--moe-router-bias-update-rate", "0")
    assert not biases(folder / "frozen").any()


def test_the_first_ratio_is_1_and_rerouting_is_logged(folder: Path, whole: Path) -> None:
    found = scalars(folder, "whole")
    assert found["policy/ratio_first_update/max_deviation"][1] == [0.0, 0.0]
    # From the second update on there is an old policy, and the weights have moved.
    rerouted = found["policy/rerouted_from_old"][1]
    assert len(rerouted) == 2 and all(0.0 < share < 0.9 for share in rerouted)
    reference = found["policy/rerouted_from_reference"][1]
    assert len(reference) == 4 and reference[0] == 0.0 and reference[-1] > 0.0


def test_a_run_resumes_bit_for_bit(folder: Path, whole: Path) -> None:
    espo(folder, "halves", *EP, "--exit-interval", "3")
    espo(folder, "halves", *EP)
    ours, theirs = (checkpoint_tensors(str(folder / name)) for name in ("halves", "whole"))
    assert not unequal_tensors(ours, theirs)


def test_a_run_goes_on_in_another_layout_but_not_without_expert_parallelism(
    folder: Path, whole: Path
) -> None:
    espo(folder, "moved", *EP, "--exit-interval", "3")
    printed = espo(folder, "moved", fails=True)
    assert "was saved with --expert-model-parallel-size 2: its optimizer's state" in printed
    assert "use 2 or more, or begin a run with --pretrained-checkpoint" in printed
    espo(
        folder, "moved", *EP, "--tensor-model-parallel-size", "2", "--sequence-parallel",
        "--expert-tensor-parallel-size", "1",
    )  # fmt: skip
    losses = [scalars(folder, name)["policy/loss"][1] for name in ("moved", "whole")]
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_mixture_in_blocks_learns_by_espo(folder: Path) -> None:
    """As LLaDA2.1: views of a sequence share its clean tokens, rollouts cache and edit blocks."""
    fine_tune(folder, "block-base", *MODEL, *EP, "--attention-mask", "block-causal",
              "--block-size", "8")  # fmt: skip
    espo(folder, "in-blocks", *EP, "--pretrained-checkpoint", str(folder / "block-base"),
         "--rollout-cache", "exact", "--rollout-threshold", "0.7", "--rollout-editing-threshold",
         "0.0", "--rollout-max-post-steps", "2")  # fmt: skip
    found = scalars(folder, "in-blocks")
    assert found["policy/ratio_first_update/max_deviation"][1] == [0.0, 0.0]
    assert all(0.0 <= share < 0.9 for share in found["policy/rerouted_from_old"][1])
    assert max(found["policy/grad_norm"][1]) > 0.0
