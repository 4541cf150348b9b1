"""Runs that go on with other settings than they were saved with: what docs/resume.md promises."""

import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from interpreter import python

from megatron_espo.checkpoint.compare import latest_iteration
from megatron_espo.checkpoint.tracker import TRACKER
from megatron_espo.data.tokenizer import byte_tokenizer, save_tokenizer
from megatron_espo.monitor.curves import read_scalars

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")},
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "WANDB_MODE": "offline",
}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
NEW, OLD = "--override-opt-param-scheduler", "--use-checkpoint-opt-param-scheduler"
RATE, LEAST, WARMUP, LENGTH = 1e-3, 1e-4, 1, 6


def run(*arguments: str) -> tuple[int, str]:
    """Run Python; its status and what it printed."""
    done = subprocess.run(
        [python(), *arguments], cwd=ROOT, env=ENVIRONMENT, text=True, timeout=300, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return done.returncode, done.stdout


def espo(folder: Path, name: str, *flags: str, launch: tuple[str, ...] = ()) -> tuple[int, str]:
    """Run three rollouts of two updates on one rank."""
    return run(
        *launch, "-m", "megatron_espo.training.espo", "--preset", "tiny", "--num-layers", "2",
        "--hidden-size", "16", "--ffn-hidden-size", "32", "--num-attention-heads", "2",
        "--tokenizer-model", str(folder / "tokenizer"), "--seq-length", "32",
        "--rollout-completion-length", "16", "--rollout-block-length", "16",
        "--rollout-denoising-steps", "4", "--rollout-micro-batch-size", "8",
        "--espo-task", "sudoku", "--espo-train-data", str(folder / "data/train.jsonl"),
        "--espo-num-rollouts", "3", "--espo-prompts-per-rollout", "2", "--espo-group-size", "2",
        "--espo-updates-per-rollout", "2", "--espo-num-mc", "2", "--espo-reward-workers", "0",
        "--lr", str(RATE), "--min-lr", str(LEAST), "--lr-decay-style", "cosine",
        "--lr-warmup-iters", str(WARMUP), "--load", str(folder / name), "--save",
        str(folder / name), "--tensorboard-dir", str(folder / f"{name}-events"), *flags,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sets of problems, two tokenizers, and a run that was stopped after steps 3 and 4."""
    folder = tmp_path_factory.mktemp("run")
    save_tokenizer(byte_tokenizer(), folder / "tokenizer")
    other = byte_tokenizer()
    other.add_tokens(["99"])
    save_tokenizer(other, folder / "more-tokens")
    shutil.copytree(folder / "tokenizer", folder / "other-tokens")
    for file in (folder / "other-tokens").iterdir():
        file.write_text(file.read_text().replace("<|start_header_id|>", "<|head|>"))
    record = {"numbers": [4, 9], "target": 13, "style": "bare"}
    (folder / "countdown.jsonl").write_text(json.dumps(record) + "\n")
    for seed, name in ((1, "data"), (2, "other-data")):
        status, printed = run(
            "tools/prepare_data.py", "sudoku", "--out", str(folder / name), "--seed", str(seed),
            "--train", "8", "--test", "4",
        )  # fmt: skip
        assert status == 0, printed
    status, printed = espo(folder, "saved", "--save-interval", "1", "--exit-interval", "4")
    assert status == 0 and latest_iteration(str(folder / "saved")) == 4, printed[-3000:]
    return folder


def cosine(step: int, rate: float = RATE, least: float = LEAST, length: int = LENGTH) -> float:
    """The schedule by its formula."""
    share = min((step - WARMUP) / (length - WARMUP), 1.0)
    return least + (rate - least) * (1.0 + math.cos(math.pi * share)) / 2


def test_the_table_says_what_is_tested() -> None:
    text = (ROOT / "docs/resume.md").read_text().partition("| changed | between")[2]
    lines = [line.strip("| ").split(" | ") for line in text.split("\n\n")[0].splitlines()[2:]]
    rows = {row: {4: between, 3: inside} for row, between, inside in lines}
    assert rows.keys() == {name.split("/")[0] for name in CASES}
    for name, case in CASES.items():
        row, _, variant = name.partition("/")
        for step in case.steps:
            refusal = case.between if step == 4 else case.inside
            word = "goes on" if refusal is None else "asks" if refusal == ASKED else "refused"
            word = "asks" if variant in ("new", "old") else word
            assert rows[row][step].startswith(word), f"{name} after step {step}"


class Case:
    """A change and what comes of it.

    Args:
        flags: the change.
        between: after step 4, between two rollouts: None goes on, else the message's part.
        inside: after step 3, inside one.
        rates: the learning rate of a step, where the run goes on.
        length: the run's steps.
        steps: where it is tried; variants of one row are tried once.
    """

    def __init__(
        self, flags, between=None, inside=None, rates=cosine, length=LENGTH, launch=(), steps=(4, 3)
    ) -> None:  # fmt: skip
        self.flags, self.between, self.inside = flags.split(), between, inside
        self.rates, self.length, self.launch, self.steps = rates, length, launch, steps


ASKED = f"pass {NEW}.*or {OLD}"
MODEL = "holds another model"
# By the rows of the table in docs/resume.md, with variants behind a slash.
CASES = {
    "nothing": Case(""),
    "`--seed`": Case("--seed 7", inside="--seed 1234, here it is 7"),
    "`--lr`": Case("--lr 5e-4", ASKED, ASKED),
    "`--lr`/new": Case(
        f"--lr 5e-4 {NEW}", rates=lambda step: cosine(step, rate=5e-4), steps=[3]
    ),
    "`--lr`/old": Case(f"--lr 5e-4 {OLD}", steps=[4]),
    "`--min-lr`": Case("--min-lr 2e-4", ASKED, ASKED),
    "`--min-lr`/new": Case(
        f"--min-lr 2e-4 {NEW}", rates=lambda step: cosine(step, least=2e-4), steps=[4]
    ),
    "more `--espo-num-rollouts`": Case("--espo-num-rollouts 4", ASKED, ASKED),
    "more `--espo-num-rollouts`/new": Case(
        f"--espo-num-rollouts 4 {NEW}", rates=lambda step: cosine(step, length=8), length=8,
        steps=[4],
    ),
    "more `--espo-num-rollouts`/old": Case(
        f"--espo-num-rollouts 4 {OLD}", length=8, steps=[3]
    ),
    "fewer `--espo-num-rollouts`": Case("--espo-num-rollouts 2", ASKED, ASKED),
    "fewer `--espo-num-rollouts`/old": Case(
        f"--espo-num-rollouts 2 {OLD}", length=4, steps=[4]
    ),
    "`--espo-group-size`": Case("--espo-group-size 3", inside="--espo-group-size 2, here it is 3"),
    "`--espo-prompts-per-rollout`": Case(
        "--espo-prompts-per-rollout 4", inside="--espo-prompts-per-rollout 2, here it is 4"
    ),
    "`--espo-updates-per-rollout`": Case(
        f"--espo-updates-per-rollout 3 --lr-decay-iters {LENGTH}",
        "--espo-updates-per-rollout 2, here it is 3", "--espo-updates-per-rollout 2",
    ),
    "`--espo-train-data`": Case(
        "--espo-train-data other-data/train.jsonl", inside="other prompts; pass the --espo-train"
    ),
    "`--espo-task`": Case(
        "--espo-task countdown --espo-train-data countdown.jsonl",
        inside="--espo-task sudoku, here it is countdown",
    ),
    "`--espo-elbo-estimator`, `--espo-num-mc`": Case(
        "--espo-elbo-estimator bernoulli", inside="--espo-elbo-estimator coupled"
    ),
    "`--espo-elbo-estimator`, `--espo-num-mc`/draws": Case(
        "--espo-num-mc 1", inside="--espo-num-mc 2, here it is 1", steps=[3]
    ),
    "`--espo-objective`, `--espo-objective-args`": Case(
        "--espo-objective diffu_grpo", inside="--espo-objective espo, here it is diffu_grpo"
    ),
    "`--espo-kl-estimator`": Case("--espo-kl-estimator k3"),
    "`--espo-kl-estimator` to or from k2_unbiased": Case(
        "--espo-kl-estimator k2_unbiased", inside="--espo-kl-estimator k2, here it is k2_unbiased"
    ),
    "`--tokenizer-model`": Case("--tokenizer-model more-tokens", MODEL, MODEL),
    "`--tokenizer-model`/same size": Case(
        "--tokenizer-model other-tokens", "another vocabulary", "another vocabulary", steps=[4]
    ),
    "`--preset`": Case("--preset llada_8b --mask-token-id 256", MODEL, MODEL),
    "the layout": Case("--tensor-model-parallel-size 2", launch=TORCHRUN),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "step"), [(name, step) for name, case in CASES.items() for step in case.steps]
)
def test_a_changed_run_goes_on_or_says_why_not(folder: Path, name: str, step: int) -> None:
    case = CASES[name]
    run = f"{name}-{step}".replace("/", "-").replace("`", "").replace(" ", "-")
    shutil.copytree(folder / "saved", folder / run)
    (folder / run / TRACKER).write_text(str(step))
    flags = [str(folder / word) if (folder / word).exists() else word for word in case.flags]
    status, printed = espo(folder, run, *flags, launch=case.launch)
    refusal = case.between if step == 4 else case.inside
    if refusal is not None:
        assert status != 0 and "Traceback" not in printed
        said = [line for line in printed.splitlines() if line.startswith("error: ")]
        assert said and re.search(refusal, said[0]), said or printed[-2000:]
        return
    assert status == 0, printed[-3000:]
    if case.length <= step:
        assert "has made all steps" in printed
        return
    assert latest_iteration(str(folder / run)) == case.length
    steps, rates = read_scalars(folder / f"{run}-events")["policy/learning_rate"]
    assert steps == list(range(step + 1, case.length + 1))
    assert rates == pytest.approx([case.rates(s) for s in steps], rel=1e-5)


def test_the_last_and_the_best_checkpoint_stay_and_numbers_go_to_wandb(folder: Path) -> None:
    """An untrained model solves nothing: the first evaluation is the best one."""
    flags = (
        "--save-interval", "1", "--save-keep-last", "1", "--save-keep-best",
        "--espo-eval-data", str(folder / "data/test.jsonl"), "--espo-eval-interval", "1",
        "--wandb-project", "project", "--wandb-exp-name", "name",
    )  # fmt: skip
    status, printed = espo(folder, "kept", *flags)
    assert status == 0, printed[-3000:]
    steps = sorted(path.name for path in (folder / "kept").glob("iter_*"))
    assert steps == ["iter_0000002", "iter_0000006"]
    best = json.loads((folder / "kept" / "best_checkpoint.json").read_text())
    accuracies = dict(zip(*read_scalars(folder / "kept-events")["eval/accuracy"], strict=True))
    assert best == {"iteration": 2, "accuracy": accuracies[2]}
    # Records are protocol buffers, in which names stand as they are.
    (log,) = (folder / "kept" / "wandb").glob("wandb/offline-run-*/run-*.wandb")
    content = log.read_bytes()
    assert b"policy/grad_norm" in content and b"histograms/policy/ratio" in content
    assert b"eval/accuracy" in content
