"""A hundred mistakes at all tools and entry points: one sentence, status 2, no traceback."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from interpreter import python

from megatron_espo.data.tokenizer import byte_tokenizer, save_tokenizer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")},
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
}

TRAIN = "--preset tiny --tokenizer-model tokenizer --lr 1e-3 "
ESPO = f"-m megatron_espo.training.espo {TRAIN} --seq-length 32 "
ESPO += "--rollout-completion-length 16 --rollout-block-length 8 --rollout-denoising-steps 8 "
DATA = "--espo-train-data data/train.jsonl "
STEPS = "--seq-length 32 --micro-batch-size 2 --train-iters 2 "
PRETRAIN = f"-m megatron_espo.training.pretrain {TRAIN} {STEPS} "
SFT = f"{PRETRAIN} --sft-completion-length 16 --sft-train-data "
EVALUATE = "tools/evaluate.py --espo-eval-data data/test.jsonl --rollout-completion-length 16 "
EVALUATE += "--rollout-block-length 8 --rollout-denoising-steps 8 --load "
GENERATE = "tools/generate.py --rollout-completion-length 16 --rollout-block-length 8 "
GENERATE += "--rollout-denoising-steps 8 --load checkpoint "
TO_MEGATRON = "tools/convert_hf.py to-megatron --out out --hf "
TO_HF = "tools/convert_hf.py to-hf --out out --family llada --megatron "
PREPARE = "tools/prepare_data.py "
PREPROCESS = "tools/preprocess_data.py --output-prefix out --tokenizer-model "
LAUNCH = "examples/run_espo_8b.sh "

# The command line -> a part of the sentence.
MISTAKES = {
    # ESPO: its flags.
    f"{ESPO} {DATA} --espo-group-siez 4": "did you mean --espo-group-size",
    f"{ESPO} {DATA} --lr fast": "--lr: invalid float value",
    f"{ESPO} {DATA} --lr": "--lr: expected one argument",
    f"{ESPO} {DATA} --lr -1": "--lr -1.0",
    f"{ESPO} {DATA} --min-lr 1": "--min-lr 1.0",
    f"{ESPO} {DATA} words": "words belongs to no flag",
    f"{ESPO} {DATA} --rollout-remasking best": "--rollout-remasking: invalid choice",
    f"{ESPO} {DATA} --recipe nothing": "--recipe nothing",
    f"{ESPO} {DATA} --recipe broken.flags": "broken.flags, line 1",
    f"{ESPO} {DATA} --recipe": "--recipe",
    f"{ESPO} {DATA} --preset huge": "--preset huge",
    f"{ESPO} {DATA} --yaml-cfg x.yaml": "--yaml-cfg",
    f"{ESPO} {DATA} --espo-group-size 1": "--espo-group-size 1",
    f"{ESPO} {DATA} --espo-num-rollouts 0": "--espo-num-rollouts",
    f"{ESPO} {DATA} --espo-kl-coef nan": "--espo-kl-coef nan",
    f"{ESPO} {DATA} --espo-reward-timeout 0": "--espo-reward-timeout",
    f"{ESPO} {DATA} --rollout-block-length 5": "--rollout-block-length 5",
    f"{ESPO} {DATA} --rollout-temperature -1": "--rollout-temperature",
    f"{ESPO} {DATA} --rollout-threshold inf": "--rollout-threshold inf",
    f"{ESPO} {DATA} --mask-token-id 9999": "--mask-token-id",
    f"{ESPO} {DATA} --stop-token-ids -1": "--stop-token-ids",
    f"{ESPO} {DATA} --vocab-size 5": "--vocab-size 5",
    f"{ESPO} {DATA} --seq-length 16": "--seq-length 16",
    f"{ESPO} {DATA} --num-layers 0": "--num-layers",
    f"{ESPO} {DATA} --micro-batch-size 0": "--micro-batch-size",
    f"{ESPO} {DATA} --micro-batch-size -3": "--micro-batch-size",
    f"{ESPO} {DATA} --tensor-model-parallel-size 2": "--tensor-model-parallel-size 2",
    f"{ESPO} {DATA} --tensor-model-parallel-size 0": "--tensor-model-parallel-size",
    f"{ESPO} {DATA} --fp8-format e4m3": "--fp8-format",
    f"{ESPO} {DATA} --num-experts 4 --moe-router-topk 5": "--moe-router-topk 5",
    f"{ESPO} {DATA} --simulate": "--simulate",
    f"{ESPO} {DATA} --dry-run": "--vocab-size is missing",
    f"{ESPO} {DATA} --dry-run --dry-run-world-size 0 --vocab-size 300": "--dry-run-world-size 0",
    # ESPO: its files.
    f"{ESPO}": "--espo-train-data is missing",
    f"{ESPO} --espo-train-data nowhere.jsonl": "nowhere.jsonl",
    f"{ESPO} --espo-train-data data": "data",
    f"{ESPO} --espo-train-data empty": "empty",
    f"{ESPO} --espo-train-data broken.jsonl": "broken.jsonl:2",
    f"{ESPO} --espo-train-data binary": "binary",
    f"{ESPO} {DATA} --espo-eval-data nowhere.jsonl": "nowhere.jsonl",
    f"{ESPO} {DATA} --espo-task chess": "--espo-task chess",
    f"{ESPO} {DATA} --espo-task no.such.module": "--espo-task no.such.module",
    f"{ESPO} {DATA} --espo-task json": "--espo-task json",
    f"{ESPO} {DATA} --tokenizer-model nowhere": "--tokenizer-model nowhere",
    f"{ESPO} {DATA} --tokenizer-model data": "data",
    f"{ESPO} {DATA} --tokenizer-model cut-tokenizer": "cut-tokenizer",
    f"{ESPO} {DATA} --pretrained-checkpoint nowhere": "--pretrained-checkpoint nowhere",
    f"{ESPO} {DATA} --pretrained-checkpoint data": "--pretrained-checkpoint data",
    f"{ESPO} {DATA} --pretrained-checkpoint checkpoint": "holds another model",
    f"{ESPO} {DATA} --pretrained-checkpoint bad-tracker": "bad-tracker",
    f"{ESPO} {DATA} --pretrained-checkpoint gone": "gone",
    f"{ESPO} {DATA} --pretrained-checkpoint cut-metadata": "cut-metadata",
    f"{ESPO} {DATA} --use-checkpoint-args": "--use-checkpoint-args",
    f"{ESPO} {DATA} --save empty": "empty",
    f"{ESPO} {DATA} --load espo-cut --save espo-cut": "espo-cut",
    # Pre-training and fine-tuning.
    f"-m megatron_espo.training.pretrain {TRAIN}": "--seq-length and --micro-batch-size",
    f"{PRETRAIN} --data-path nowhere": "nowhere",
    f"{PRETRAIN}": "--data-path",
    f"{PRETRAIN} --data-path cut-text --split 1": "cut-text",
    f"{PRETRAIN} --data-path text --split a,b": "--split a,b",
    f"{PRETRAIN} --data-path text --split 0,0,1": "--split",
    f"{PRETRAIN} --data-path text --train-iters 0": "--train-iters",
    f"{PRETRAIN} --data-path text --global-batch-size 3": "--global-batch-size 3",
    f"{PRETRAIN} --data-path text --mask-epsilon 2": "--mask-epsilon 2",
    f"{PRETRAIN} --data-path text --lr-warmup-iters 5": "--lr-warmup-iters 5",
    f"{SFT} nowhere.jsonl": "nowhere.jsonl",
    f"{SFT} broken.jsonl": "broken.jsonl:1",
    f"{SFT} data/train.jsonl": "train.jsonl:1",
    f"{SFT} long.jsonl": "long.jsonl:1",
    f"{SFT} data/demonstrations.jsonl --sft-completion-length 99": "--sft-completion-length 99",
    # Evaluation and generation.
    f"{EVALUATE} nowhere": "nowhere",
    f"{EVALUATE} checkpoint --espo-eval-data nowhere.jsonl": "nowhere.jsonl",
    f"{EVALUATE} checkpoint --eval-lengths many": "--eval-lengths",
    f"{EVALUATE} checkpoint --eval-lenghts 16": "did you mean --eval-lengths",
    f"{EVALUATE} cut-weights": "cut-weights",
    f"{EVALUATE} gone": "gone",
    f"{EVALUATE} checkpoint --ckpt-step 77": "77",
    f"{EVALUATE} backed-up": "backed-up",
    "tools/evaluate.py --hf nowhere/at/all": "nowhere/at/all",
    "tools/evaluate.py --hf empty-folder": "empty-folder",
    "tools/evaluate.py": "--load",
    f"{GENERATE} --prompt a --delay -1": "--delay",
    f"{GENERATE} --prompt a --save-frames a.mov": "a.mov",
    f"{GENERATE} --prompt a b --save-frames a.gif": "--save-frames",
    f"{GENERATE} --prompt a --frames-width 4": "--frames-width 4",
    f"{GENERATE} --prompt a --rollout-temprature 1": "did you mean --rollout-temperature",
    f"{GENERATE} --prompt {'a' * 900}": "--prompt",
    "tools/generate.py --prompt a": "--load",
    # Conversion.
    "tools/convert_hf.py": "required: command",
    "tools/convert_hf.py upwards": "invalid choice: 'upwards'",
    "tools/convert_hf.py to-megatron --out out": "required: --hf",
    f"{TO_MEGATRON} nowhere/at/all": "nowhere/at/all",
    f"{TO_MEGATRON} empty-folder": "empty-folder",
    f"{TO_MEGATRON} cut-config": "cut-config",
    f"{TO_MEGATRON} cut-shard": "cut-shard",
    f"{TO_MEGATRON} unknown-model": "unknown-model",
    f"{TO_MEGATRON} hf --lora nowhere/at/all": "nowhere/at/all",
    f"{TO_MEGATRON} hf --out data": "data",
    f"{TO_MEGATRON} hf --dtype int3": "--dtype: invalid choice",
    f"{TO_HF} nowhere": "nowhere",
    f"{TO_HF} gone": "gone",
    f"{TO_HF} cut-metadata": "cut-metadata",
    f"{TO_HF} checkpoint --iteration 9": "iter_0000009",
    f"{TO_HF} checkpoint --familiy dream": "did you mean --family",
    # Data and the rest.
    f"{PREPARE} chess --out out": "chess",
    f"{PREPARE} sudoku --out out": "nothing to write",
    f"{PREPARE} sudoku --out empty --train 1": "empty",
    f"{PREPARE} sudoku --out out --train -1": "--train",
    f"{PREPARE} gsm8k --out out --source nowhere": "nowhere",
    f"{PREPARE} sudoku --check broken.jsonl": "broken.jsonl",
    f"{PREPROCESS} nowhere --input text.txt": "nowhere",
    f"{PREPROCESS} tokenizer --input nowhere": "nowhere",
    f"{PREPROCESS} tokenizer --input binary": "binary",
    f"{PREPROCESS} tokenizer --input text.txt --workers 0": "--workers",
    f"{PREPROCESS} tokenizer --input text.txt --output-prefix no/such/../../empty/x": "empty",
    "tools/make_tokenizer.py --out data": "data",
    "tools/make_tokenizer.py --out out --train text.txt --vocab-size 9": "--vocab-size 9",
    "tools/make_tokenizer.py --out out --train nowhere --vocab-size 300": "nowhere",
    "tools/make_tokenizer.py --out empty/x": "empty",
    "tools/make_random_model.py gpt --out out": "invalid choice: 'gpt'",
    "tools/make_random_model.py llada --out data": "data",
    "tools/make_random_model.py llada --out out --max-shard-size big": "--max-shard-size",
    "tools/plot_run.py nowhere": "nowhere",
    "tools/plot_run.py empty-folder": "empty-folder",
    "tools/check_rewards.py --data nowhere": "nowhere",
    "tools/check_resume.py kill --out data": "--out",
    "tools/measure_elbo_noise.py --load checkpoint": "--other is missing",
    f"{LAUNCH} --recipe nothing": "--recipe nothing",
    f"{LAUNCH} --dry-run --recipe gsm8k --espo-group-size 1": "--espo-group-size 1",
    "-m megatron_espo.doctor --gpus many": "--gpus",
}  # fmt: skip


def broken(folder: Path, name: str, change: Callable[[Path], None], like: str) -> None:
    """A copy with something wrong."""
    shutil.copytree(folder / like, folder / name)
    change(folder / name)


def cut(pattern: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for path in folder.rglob(pattern):
            os.truncate(path, path.stat().st_size // 2)

    return change


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good files and all kinds of bad ones."""
    folder = tmp_path_factory.mktemp("wrong")
    save_tokenizer(byte_tokenizer(), folder / "tokenizer")
    (folder / "empty").touch()
    (folder / "empty-folder").mkdir()
    (folder / "binary").write_bytes(b"\xff\xfe\0" * 99)
    (folder / "broken.flags").write_text('--lr "1\n')
    (folder / "text.txt").write_text("Words and more words. " * 99)
    puzzle = {"puzzle": "3102200002100320", "solution": "3142243142131324", "style": "bare"}
    (folder / "broken.jsonl").write_text(json.dumps(puzzle) + "\n{broken\n")
    long = {"prompt": "p" * 99, "completion": "c"}
    (folder / "long.jsonl").write_text(json.dumps(long) + "\n")
    for command in (
        "tools/prepare_data.py sudoku --out data --train 8 --test 4 --demonstrations 8",
        f"{PREPROCESS} tokenizer --input text.txt --output-prefix text",
        "tools/make_random_model.py llada --out hf --dtype float32",
        "tools/convert_hf.py to-megatron --hf hf --out checkpoint",
    ):
        done = call(command, folder)
        assert done.returncode == 0, done.stderr[-3000:]
    for ending in ("bin", "idx"):
        shutil.copy(folder / f"text.{ending}", folder / f"cut-text.{ending}")
    os.truncate(folder / "cut-text.idx", 20)
    broken(folder, "cut-tokenizer", cut("tokenizer.json"), "tokenizer")
    broken(folder, "cut-config", cut("config.json"), "hf")
    broken(folder, "cut-shard", cut("*.safetensors"), "hf")
    broken(folder, "unknown-model", lambda f: name_model(f / "config.json"), "hf")
    broken(folder, "cut-metadata", cut(".metadata"), "checkpoint")
    broken(folder, "cut-weights", cut("*.distcp"), "checkpoint")
    tracker = "latest_checkpointed_iteration.txt"
    broken(folder, "gone", lambda f: (f / tracker).write_text("12"), "checkpoint")
    broken(folder, "bad-tracker", lambda f: (f / tracker).write_text("1x"), "checkpoint")

    def back_up(folder: Path) -> None:
        (folder / tracker).write_text("")
        (folder / "release").rename(folder / "iter_0000003.bak")

    broken(folder, "backed-up", back_up, "checkpoint")
    cut_state = folder / "espo-cut/iter_0000002/espo/state.pt"
    cut_state.parent.mkdir(parents=True)
    cut_state.write_bytes(np.arange(9).tobytes())
    (folder / "espo-cut" / tracker).write_text("2")
    return folder


def name_model(config: Path) -> None:
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"architectures": ["GPT2LMHeadModel"]})
    )


def call(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    words = command.split()
    if words[0] != "-m":
        words[0] = str(ROOT / words[0])
    return subprocess.run(
        [python(), *words], cwd=folder, env=ENVIRONMENT, text=True, timeout=300, check=False,
        stdin=subprocess.DEVNULL, capture_output=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def ends(folder: Path) -> dict[str, subprocess.CompletedProcess[str]]:
    """How all of them end."""
    with ThreadPoolExecutor(3) as pool:
        done = pool.map(lambda command: call(command, folder), MISTAKES)
        return dict(zip(MISTAKES, done, strict=True))


def test_there_are_a_hundred() -> None:
    assert len(MISTAKES) >= 100


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_one_sentence(
    command: str, ends: dict[str, subprocess.CompletedProcess[str]]
) -> None:
    end = ends[command]
    lines = end.stderr.splitlines()
    said = [line for line in lines if line.startswith("error: ")]
    assert len(said) == 1 and lines[-1] == said[0], end.stderr[-2000:]
    assert MISTAKES[command] in said[0] and end.returncode == 2
    assert "Traceback" not in end.stderr + end.stdout and len(said[0]) < 600
    assert end.stdout.count("\n") <= 3
