"""What a user can do wrong ends with one sentence that names the flag or file."""

import json
from pathlib import Path

import pytest

from megatron_espo.commands import inference
from megatron_espo.data.tokenizer import byte_tokenizer, save_tokenizer
from megatron_espo.evaluation.problems import load_task_data
from megatron_espo.startup.arguments import initialize_arguments
from megatron_espo.tasks import load_task
from megatron_espo.training import espo, pretrain


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer") / "bytes"
    save_tokenizer(byte_tokenizer(), folder)
    return str(folder)


ESPO = (
    "--preset tiny --seq-length 48 --lr 1e-3 --espo-train-data train.jsonl "
    "--rollout-completion-length 16 --rollout-block-length 8 --rollout-denoising-steps 8 "
    "--espo-prompts-per-rollout 4 --espo-group-size 2"
)


@pytest.mark.parametrize(
    ("flags", "world", "parts"),
    [
        ("--tensor-model-parallel-size 3", 3, ("--num-attention-heads 4", "parallel-size 3")),
        ("--tensor-model-parallel-size 4", 6, ("6 ranks", "--tensor-model-parallel-size 4")),
        ("--pipeline-model-parallel-size 2", 2, ("--num-layers 3", "parallel-size 2")),
        (
            "--group-query-attention --num-query-groups 2 --tensor-model-parallel-size 4",
            4,
            ("--num-query-groups 2", "use at most 2"),
        ),
        (
            "--vocab-size 263 --no-pad-vocab-size --tensor-model-parallel-size 2",
            2,
            ("--vocab-size 263", "--no-pad-vocab-size"),
        ),
        ("--context-parallel-size 3", 2, ("--context-parallel-size 3", "multiple of 3")),
        (
            "--defer-embedding-wgrad-compute",
            1,
            ("--defer-embedding-wgrad-compute", "leave it out"),
        ),
        ("--num-experts 8 --moe-router-topk 9", 1, ("--moe-router-topk 9", "--num-experts 8")),
        ("--expert-model-parallel-size 2", 2, ("--expert-model-parallel-size 2", "leave it out")),
        ("--ckpt-format torch", 1, ("--ckpt-format torch", "torch_dist")),
        ("--async-save", 1, ("--async-save", "leave it out")),
        ("--rollout-block-length 5", 1, ("--rollout-completion-length 16", "block-length 5")),
        ("--rollout-denoising-steps 9", 1, ("--rollout-denoising-steps 9", "multiple of 2")),
        ("--rollout-denoising-steps 32", 1, ("--rollout-denoising-steps 32", "at least one")),
        (
            "--espo-objective just_grpo --rollout-completion-length 264 --seq-length 300 "
            "--rollout-denoising-steps 264",
            1,
            ("--rollout-completion-length 264", "256"),
        ),
        ("--espo-objective block_just_grpo", 1, ("block_just_grpo", "use just_grpo")),
        ("--espo-objective ebpo", 1, ("--espo-objective ebpo", "--attention-mask", "use espo")),
        (
            "--espo-objective just_grpo --attention-mask block-causal --block-size 8",
            1,
            ("--espo-objective just_grpo", "block by block"),
        ),
        (
            "--espo-objective cj_grpo --attention-mask block-causal --block-size 8",
            1,
            ("--espo-objective cj_grpo", "block by block"),
        ),
        (
            "--espo-objective trace_rl --attention-mask block-causal --block-size 8 "
            "--rollout-threshold 0.9 --rollout-editing-threshold 0.5",
            1,
            ("--rollout-editing-threshold 0.5", "--espo-objective trace_rl", "leave it out"),
        ),
        (
            "--espo-objective ospo --espo-task countdown",
            1,
            ("--espo-objective ospo", "task countdown scores none"),
        ),
        (
            "--espo-objective ospo --attention-mask block-causal --block-size 8",
            1,
            ("--espo-objective ospo", "block by block"),
        ),
        ("--espo-group-size 1", 1, ("--espo-group-size 1", "at least 2")),
        ("--espo-num-mc 1 --espo-kl-estimator k2_unbiased", 1, ("k2_unbiased", "--espo-num-mc 2")),
        ("--micro-batch-size 3", 1, ("--micro-batch-size 3", "32 rows")),
        ("--espo-gradient joint --micro-batch-size 2", 1, ("joint", "multiple of 4")),
        ("--espo-refill -1", 1, ("--espo-refill -1", "0 (no further prompts)")),
        ("--head-chunk 0", 1, ("--head-chunk 0", "at least 1")),
        ("--espo-prompts-per-rollout 3", 2, ("--espo-prompts-per-rollout 3", "multiple of 2")),
        ("--global-batch-size 7", 1, ("--global-batch-size 7", "leave it out")),
        ("--attention-dropout 0.1", 1, ("dropout", "--attention-dropout 0")),
        ("--seq-length 16", 1, ("--seq-length 16", "--rollout-completion-length 16")),
        ("--transformer-impl transformer_engine", 1, ("--transformer-impl", "GPU")),
        ("--tokenizer-model /nowhere", 1, ("--tokenizer-model /nowhere",)),
        ("--lr-warmup-iters 900", 1, ("--lr-warmup-iters 900", "800 steps")),
        ("--mask-epsilon 2", 1, ("--mask-epsilon 2",)),
        ("--preset huge", 1, ("--preset huge", "tiny")),
    ],
)
def test_bad_flag_is_named(
    flags: str, world: int, parts: tuple[str, ...], tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    argv = f"{ESPO} --tokenizer-model {tokenizer} {flags}".split()
    if "--preset huge" in flags:
        argv = argv[2:]
    with pytest.raises(ValueError) as caught:
        initialize_arguments(argv, espo.prepare_arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ("--preset tiny", "--seq-length and --micro-batch-size"),
        ("--preset tiny --seq-length 8 --micro-batch-size 2", "--train-iters"),
        (
            "--preset tiny --seq-length 8 --micro-batch-size 2 --train-iters 1 "
            "--global-batch-size 3",
            "--global-batch-size 3",
        ),
    ],
)
def test_bad_pretraining_flag_is_named(flags: str, part: str, tokenizer: str) -> None:
    with pytest.raises(ValueError, match=part):
        initialize_arguments(
            [*flags.split(), "--tokenizer-model", tokenizer], pretrain.prepare_arguments
        )


def test_missing_checkpoint_is_named(tokenizer: str, tmp_path: Path) -> None:
    argv = ["--use-checkpoint-args", "--load", str(tmp_path), "--tokenizer-model", tokenizer]
    with pytest.raises(ValueError, match="no checkpoint in --load"):
        initialize_arguments(argv, inference.prepare_arguments)


def test_unknown_task_is_named() -> None:
    with pytest.raises(ValueError, match=r"--espo-task chess.*sudoku"):
        load_task("chess", flag="--espo-task")


def test_malformed_line_and_long_prompt_are_named(tmp_path: Path, tokenizer: str) -> None:
    from argparse import Namespace

    from megatron_espo.data.tokenizer import load_tokenizer

    path = tmp_path / "train.jsonl"
    record = {"puzzle": "3102200002100320", "solution": "3142243142131324", "style": "bare"}
    good = json.dumps(record)
    path.write_text(good + "\n{broken\n")
    args = Namespace(
        seq_length=32, rollout_completion_length=16, prompt_special_tokens="refuse",
        mask_token_id=256, stop_token_ids=[257, 261],
    )  # fmt: skip
    task, loaded = load_task("sudoku"), load_tokenizer(tokenizer)
    with pytest.raises(ValueError, match=r"train\.jsonl:2"):
        load_task_data(task, str(path), loaded, args)
    with pytest.raises(ValueError, match=r"missing\.jsonl"):
        load_task_data(task, str(tmp_path / "missing.jsonl"), loaded, args)
    path.write_text(good + "\n")
    assert load_task_data(task, str(path), loaded, args) is not None
    args.seq_length = 31
    with pytest.raises(ValueError, match="16 tokens but 1 to 15 fit"):
        load_task_data(task, str(path), loaded, args)
