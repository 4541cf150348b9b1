"""Block diffusion as users run it: trained in two layouts, sampled, adapted to larger blocks."""

from pathlib import Path

import pytest
from test_end_to_end import TORCHRUN, run, scalars

from megatron_espo.checkpoint.compare import checkpoint_tensors, latest_iteration, unequal_tensors
from megatron_espo.checkpoint.tracker import checkpoint_folder
from megatron_espo.startup.stored import stored_arguments

pytestmark = pytest.mark.slow

TRAIN = ("-m", "megatron_espo.training.pretrain")
MODEL = (
    "--preset tiny --num-layers 2 --qk-layernorm --kv-channels 12 --seq-length 32 "
    "--attention-mask block-causal --block-size 4"
).split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run("tools/make_tokenizer.py", "--out", str(folder / "tokenizer"))
    run("tools/prepare_data.py", "sudoku", "--out", str(folder / "data"), "--seed", "1",
        "--train", "1", "--test", "4", "--demonstrations", "32")  # fmt: skip
    return folder


def fine_tune(folder: Path, name: str, *flags: str) -> str:
    demonstrations = str(folder / "data/demonstrations.jsonl")
    return run(
        *TORCHRUN, *TRAIN, "--tokenizer-model", str(folder / "tokenizer"), "--sft-train-data",
        demonstrations, "--sft-completion-length", "16", "--micro-batch-size", "4",
        "--global-batch-size", "8", "--train-iters", "3", "--lr", "2e-3", "--log-interval", "1",
        "--save", str(folder / name), "--tensorboard-dir", str(folder / f"{name}-events"), *flags,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    fine_tune(folder, "dp", *MODEL)
    return folder / "dp"


@pytest.fixture(scope="module")
def start(trained: Path) -> tuple[str, ...]:
    """Flags of a run from the trained model: initial weights of their own depend on the layout."""
    return (
        *("--use-checkpoint-args", "--pretrained-checkpoint", str(trained)),
        *("--seq-length", "32"),
    )


def test_pipeline_stages_pass_rows_twice_as_wide(folder: Path, start: tuple[str, ...]) -> None:
    fine_tune(folder, "kept", *start)
    fine_tune(folder, "pp", *start, "--pipeline-model-parallel-size", "2")
    losses = [scalars(folder, name)["lm loss"][1] for name in ("kept", "pp")]
    assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], rel=1e-5)


SAMPLING = (
    "--rollout-completion-length 8 --rollout-threshold 0.5 --rollout-editing-threshold 0.1 "
    "--rollout-temperature 0 --prompt abc"
).split()


def test_a_block_model_is_sampled_with_and_without_its_cache(trained: Path) -> None:
    load = ("tools/generate.py", "--load", str(trained), *SAMPLING)
    answers = [
        run(*load, "--rollout-block-length", "4", "--rollout-cache", cache).splitlines()[-2:]
        for cache in ("none", "exact")
    ]
    assert answers[0] and answers[0][0] == answers[1][0]
    printed = run(*load, "--rollout-block-length", "8", fails=True)
    assert "--rollout-block-length 8: the model's blocks have 4 tokens; use 4" in printed


def test_blocks_grow_and_a_run_goes_on_where_they_were(
    folder: Path, start: tuple[str, ...]
) -> None:
    """Of 2, 4 and 8 tokens; another mask and size than the checkpoint's; equal to the last bit."""
    growth = "--attention-mask context-causal --block-size 2 --block-growth-to 8".split()
    growth += ["--block-growth-interval", "1"]
    fine_tune(folder, "whole-growth", *start, *growth)
    fine_tune(folder, "growth", *start, *growth, "--exit-interval", "2")
    assert size_of(folder, "growth") == ("context-causal", 4)
    # The checkpoint knows how its blocks grow.
    fine_tune(folder, "growth", *start, "--load", str(folder / "growth"))
    assert size_of(folder, "growth") == size_of(folder, "whole-growth") == ("context-causal", 8)
    both = [checkpoint_tensors(str(folder / name)) for name in ("whole-growth", "growth")]
    assert not unequal_tensors(*both)


def size_of(folder: Path, name: str) -> tuple[str, int]:
    args = stored_arguments(checkpoint_folder(str(folder / name)))
    return args.attention_mask, args.block_size


def test_a_checkpoint_keeps_how_its_model_attends(folder: Path, trained: Path) -> None:
    assert size_of(folder, "dp") == ("block-causal", 4)
    shape = [flag for flag in MODEL if flag not in ("--attention-mask", "block-causal")]
    shape = [flag for flag in shape if flag not in ("--block-size", "4")]
    printed = run(
        *TRAIN, *shape, "--tokenizer-model", str(folder / "tokenizer"), "--pretrained-checkpoint",
        str(trained), "--sft-train-data", str(folder / "data/demonstrations.jsonl"),
        *"--micro-batch-size 4 --train-iters 1 --lr 1e-3".split(), fails=True,
    )  # fmt: skip
    assert "holds a model of --attention-mask block-causal --block-size 4; pass these" in printed


ROLLOUT = (
    "--rollout-completion-length 16 --rollout-block-length 4 --rollout-denoising-steps 16 "
    "--rollout-cache exact --rollout-micro-batch-size 8 --espo-task sudoku "
    "--espo-num-rollouts 2 --espo-prompts-per-rollout 2 --espo-group-size 4 "
    "--espo-updates-per-rollout 2 --espo-num-mc 1 --espo-kl-coef 0.01 --lr 1e-3"
).split()


def espo(folder: Path, start: tuple[str, ...], name: str, *flags: str, fails: bool = False) -> str:
    return run(
        *TORCHRUN, "-m", "megatron_espo.training.espo", *start, "--tokenizer-model",
        str(folder / "tokenizer"), "--espo-train-data", str(folder / "data/train.jsonl"), *ROLLOUT,
        "--load", str(folder / name), "--save", str(folder / name), "--save-interval", "1",
        "--tensorboard-dir", str(folder / f"{name}-events"), *flags, fails=fails,
    )  # fmt: skip


def test_espo_trains_a_block_model_and_goes_on_where_it_was_stopped(
    folder: Path, start: tuple[str, ...]
) -> None:
    """Interrupted inside a rollout, with its masks drawn again, to the last bit."""
    espo(folder, start, "whole")
    espo(folder, start, "resumed", "--exit-interval", "1")
    assert latest_iteration(str(folder / "resumed")) == 1
    printed = espo(folder, start, "resumed", "--block-size", "8", "--attention-mask",
                   "block-causal", "--rollout-block-length", "8", fails=True)  # fmt: skip
    assert "lies inside rollout 1, which was made with --block-size 4, here it is 8" in printed
    espo(folder, start, "resumed")
    both = [checkpoint_tensors(str(folder / name)) for name in ("whole", "resumed")]
    assert not unequal_tensors(*both)
    args = stored_arguments(checkpoint_folder(str(folder / "resumed")))
    assert (args.attention_mask, args.block_size) == ("block-causal", 4)


def test_espo_refuses_what_does_not_fit_blocks(folder: Path, start: tuple[str, ...]) -> None:
    for flags, sentence in (
        (("--rollout-block-length", "8"), "--rollout-block-length 8: the model's blocks have 4"),
        (("--attention-mask", "context-causal", "--block-size", "4", "--next-token-weight", "1"),
         "--next-token-weight 1.0 is a loss of pre-training and fine-tuning"),
    ):  # fmt: skip
        printed = run(
            "-m", "megatron_espo.training.espo", *start, "--tokenizer-model",
            str(folder / "tokenizer"), *ROLLOUT, *flags, fails=True,
        )  # fmt: skip
        assert sentence in printed
