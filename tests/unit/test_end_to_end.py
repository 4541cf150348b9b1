"""The commands that users type, at their smallest, on real files."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from interpreter import python

from megatron_espo.checkpoint.compare import checkpoint_tensors, latest_iteration, unequal_tensors
from megatron_espo.monitor.curves import TIME_DEPENDENT, Curve, read_details, read_scalars
from megatron_espo.monitor.pictures import PANELS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")},
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(
    *arguments: str,
    fails: bool = False,
    environment: Mapping[str, str] | None = None,
    timeout: int = 560,
) -> str:
    """Run Python with arguments; returns what it printed."""
    done = subprocess.run(
        [python(), *arguments],
        cwd=ROOT,
        env={**ENVIRONMENT, **(environment or {})},
        text=True,
        timeout=timeout,
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
    fine_tune(
        folder, "base", ["-m", "megatron_espo.training.pretrain"],
        "--tensorboard-dir", str(folder / "base-events"),
    )  # fmt: skip
    return folder


def fine_tune(folder: Path, name: str, program: Sequence[str], *flags: str) -> None:
    """Fine-tune from nothing for three epochs of 64 examples: six steps."""
    demonstrations = str(folder / "data/demonstrations.jsonl")
    printed = run(
        *TORCHRUN, *program, *model(folder), "--sft-train-data", demonstrations,
        "--sft-valid-data", demonstrations, "--sft-completion-length", "16",
        "--micro-batch-size", "8", "--global-batch-size", "32", "--sft-epochs", "3",
        "--eval-iters", "1", "--eval-interval", "3", "--lr", "2e-3", "--save", str(folder / name),
        *flags,
    )  # fmt: skip
    assert "3 epochs of 64 examples: 6 steps of 32 examples." in printed


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


def espo(
    folder: Path,
    name: str,
    *flags: str,
    fails: bool = False,
    program: Sequence[str] = ("-m", "megatron_espo.training.espo"),
    launch: Sequence[str] = TORCHRUN,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Run ESPO for four rollouts on two data-parallel ranks."""
    return run(
        *launch, *program, *model(folder), *SAMPLING,
        "--espo-train-data", str(folder / "data/train.jsonl"),
        "--espo-eval-data", str(folder / "data/test.jsonl"),
        "--espo-num-rollouts", "4", "--espo-prompts-per-rollout", "4", "--espo-group-size", "4",
        "--espo-updates-per-rollout", "2", "--espo-reference-mix-interval", "3",
        "--micro-batch-size", "8", "--lr", "1e-3", "--lr-warmup-iters", "2", "--clip-grad", "0.5",
        "--pretrained-checkpoint", str(folder / "base"),
        "--load", str(folder / name), "--save", str(folder / name),
        "--tensorboard-dir", str(folder / f"{name}-events"), *flags,
        fails=fails, environment=environment,
    )  # fmt: skip


def final_tensors(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Weights, optimizer state and any reference policy of the last checkpoint."""
    assert latest_iteration(str(folder / name)) == 8
    tensors = checkpoint_tensors(str(folder / name))
    # Layers are stacked: nine tensors of weights.
    assert sum(name.startswith("reference/") for name in tensors) in (0, 9)
    assert sum("exp_avg" in name for name in tensors) == 2 * 9
    return tensors


def scalars(folder: Path, name: str) -> dict[str, Curve]:
    curves = read_scalars(folder / f"{name}-events")
    return {tag: curve for tag, curve in curves.items() if not tag.startswith(TIME_DEPENDENT)}


@pytest.fixture(scope="module")
def whole(folder: Path) -> str:
    """A run that nothing disturbs: what it printed."""
    return espo(folder, "whole")


def test_espo_trains_and_reports(folder: Path, whole: str) -> None:
    assert whole.count("\nrollout ") == 4 and whole.count("held-out") == 2
    tensors = final_tensors(folder, "whole")
    base = checkpoint_tensors(str(folder / "base"))
    name = "decoder.final_layernorm.weight"
    assert not torch.equal(tensors[f"/{name}"], base[f"/{name}"]), "training changed nothing"
    assert not torch.equal(tensors[f"/{name}"], tensors[f"reference/{name}"])
    curves = scalars(folder, "whole")
    # Old and current ELBO agree at the first update of every rollout: the ratio is exactly 1.
    assert curves["policy/ratio_first_update/max_deviation"] == ([1, 3, 5, 7], [0.0] * 4)
    assert curves["reward/mean"][0] == [2, 4, 6, 8]
    wanted = {
        "reward/std", "reward/zero_std_groups", "policy/clip_fraction_low",
        "policy/clip_fraction_high", "policy/learning_rate", "elbo/mc_variance_per_token",
        "rollout/completion_length/mean",
    }  # fmt: skip
    drawn = {name for _, _, labels in PANELS for name in labels}
    written = read_scalars(folder / "whole-events").keys()
    assert wanted | drawn <= written
    missing = {tag for tag in written if not documented(tag)}
    assert not missing, f"docs/monitoring.md does not explain {missing}"
    assert not documented("policy/surprise") and not documented("hardware/fan")


def documented(tag: str) -> bool:
    """Whether the table of docs/monitoring.md explains a scalar."""
    table = (ROOT / "docs/monitoring.md").read_text().split("## Histograms")[0]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| `")]
    assert all(cell.strip() for row in rows for cell in row[1:4]), "a cell is empty"
    names = [name for row in rows for name in re.findall("`([^`]*)`", row[1])]
    patterns = [
        re.sub(r"\\{(.*?)\\}", lambda m: f"({m[1].replace(',', '|')})", re.escape(name))
        .replace("\\*", ".*")
        for name in names
    ]  # fmt: skip
    return any(re.fullmatch(pattern, tag) for pattern in patterns)


def assert_same_run(folder: Path, name: str, whole: str = "whole") -> None:
    """The run ended as the undisturbed one did, to the bit."""
    assert not unequal_tensors(final_tensors(folder, whole), final_tensors(folder, name))
    assert scalars(folder, whole) == scalars(folder, name)
    details = [read_details(folder / f"{run}-events") for run in (whole, name)]
    assert details[0] == details[1] and len(details[0]) >= 5


def test_espo_resumes_inside_a_rollout_bit_for_bit(folder: Path, whole: str) -> None:
    espo(folder, "parts", "--exit-interval", "3")
    assert latest_iteration(str(folder / "parts")) == 3
    # A job that is started with other settings for the rollout in hand says so.
    printed = espo(folder, "parts", "--espo-num-mc", "1", fails=True)
    assert "--espo-num-mc 2, here it is 1; keep the value until the rollout's last step" in printed
    espo(folder, "parts")
    assert_same_run(folder, "parts")


# Three views in a draw, views of eight steps that predict each token once, and pairs of views with
# an advantage of each token.
@pytest.mark.parametrize(
    ("name", "own", "views"),
    [("coupled_grpo", ["--micro-batch-size", "6", "--espo-num-mc", "1"], (3,)),
     ("cj_grpo", ["--micro-batch-size", "8"], ()),
     ("ospo", ["--micro-batch-size", "8", "--espo-num-mc", "1"], (2,))],
)  # fmt: skip
def test_an_objective_of_tokens_resumes_inside_a_rollout_bit_for_bit(
    folder: Path, name: str, own: list[str], views: tuple[int, ...]
) -> None:
    """A penalty of tokens, and a rollout in hand with its tokens and, of steps, its step map."""
    flags = ["--espo-objective", name, "--espo-num-rollouts", "2", *own,
             "--espo-kl-estimator", "k3"]  # fmt: skip
    runs = [folder / f"{name}{part}" for part in ("", "-parts")]
    espo(folder, runs[0].name, *flags)
    espo(folder, runs[1].name, *flags, "--exit-interval", "3")
    state = torch.load(runs[1] / "iter_0000003/espo/state.pt", weights_only=True)
    # Two updates of all ranks' completions: draws, views, tokens.
    assert state["rollout"]["elbo_old"].shape == (2, 16, 1, *views, 16)
    assert state["rollout"]["elbo_ref"].shape == (2, 16, 1, *views, 16)
    # Two tokens at each of eight steps.
    steps = state["rollout"]["commit_steps"].sort(dim=1).values.tolist()
    assert steps == [[s for s in range(8) for _ in range(2)] if name == "cj_grpo" else []] * 16
    assert [bool(parts) for parts in state["rollout"]["parts"]] == [name == "ospo"] * 16
    other = ["--espo-objective", "espo", "--micro-batch-size", "8"]
    printed = espo(folder, runs[1].name, *flags, *other, fails=True)
    assert f"--espo-objective {name}, here it is espo" in printed
    espo(folder, runs[1].name, *flags)
    whole, parts = (checkpoint_tensors(str(path)) for path in runs)
    assert not unequal_tensors(whole, parts)
    curves = scalars(folder, runs[0].name)
    assert curves == scalars(folder, runs[1].name)
    # The first update of a rollout is made with the policy that sampled it.
    for bound in ("mean", "min", "max"):
        steps, ratios = curves[f"policy/ratio/{bound}"]
        assert steps == [1, 2, 3, 4] and ratios[0] == ratios[2] == 1.0
    assert curves["policy/ratio/max"][1][3] != 1.0
    assert max(curves["policy/effective_sample_size"][1]) <= 1
    missing = {tag for tag in curves if not documented(tag)}
    assert not missing, f"docs/monitoring.md does not explain {missing}"


def test_the_objective_of_the_documentation_trains(folder: Path) -> None:
    text = (ROOT / "docs/objectives.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(code.splitlines()) <= 30
    (folder / "smooth.py").write_text(code)
    flags = ["--espo-objective", str(folder / "smooth.py"), "--espo-num-rollouts", "1",
             "--lr-warmup-iters", "1"]  # fmt: skip
    printed = espo(folder, "smooth", *flags, "--espo-objective-args", "strength=1000")
    assert "objective " + str(folder / "smooth.py") in printed
    curves = scalars(folder, "smooth")
    assert curves["policy/ratio/mean"][0] == [1, 2] and "policy/kl_per_token" not in curves
    assert not (folder / "smooth/iter_0000002/reference").exists()
    refused = espo(folder, "odd", *flags, "--espo-clip-eps-low", "0.1", fails=True)
    assert "--espo-clip-eps-low 0.1 has no effect" in refused


@pytest.fixture(scope="module")
def two_tasks(folder: Path) -> list[str]:
    """Flags of a run of sudoku and countdown, its problems in a file of each."""
    given = {"train": ["sudoku=" + str(folder / "data/train.jsonl")]}
    given["test"] = ["sudoku=" + str(folder / "data/test.jsonl")]
    for split, parts in given.items():
        lines = [
            {"numbers": [n, 3, 40], "target": 43 + n, "style": "bare"}
            for n in range(10, 19 if split == "train" else 13)
        ]
        path = folder / f"countdown-{split}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        parts.append(f"countdown={path}")
    return ["--espo-task", "sudoku:2,countdown:1", "--espo-train-data", ",".join(given["train"]),
            "--espo-eval-data", ",".join(given["test"])]  # fmt: skip


def test_two_tasks_and_the_distributed_optimizer_resume_bit_for_bit(
    folder: Path, two_tasks: list[str]
) -> None:
    flags = ["--use-distributed-optimizer", *two_tasks]
    printed = espo(folder, "sharded", *flags)
    espo(folder, "sharded-parts", *flags, "--exit-interval", "3")
    # A rollout in hand belongs to the problems of both tasks, and to their weights.
    data = flags[flags.index("--espo-train-data") + 1]
    swapped = data.replace("countdown-train", "countdown-test")
    refused = espo(folder, "sharded-parts", *flags, "--espo-train-data", swapped, fails=True)
    assert "rollout 2, which was made from other prompts" in refused
    refused = espo(folder, "sharded-parts", *flags, "--espo-task", "sudoku,countdown:1", fails=True)
    assert "made with --espo-task sudoku:2,countdown:1, here it is sudoku,countdown:1" in refused
    espo(folder, "sharded-parts", *flags)
    assert_same_run(folder, "sharded-parts", whole="sharded")
    curves = scalars(folder, "sharded")
    shares = [
        dict(zip(*curves[f"reward/by_task/{task}/share"], strict=True))
        for task in ("sudoku", "countdown")
    ]
    # Of four prompts of a rollout; one that has none of a task reports none.
    assert all(shares[0].get(s, 0) + shares[1].get(s, 0) == 1 for s in (2, 4, 6, 8))
    assert curves["eval/by_task/countdown/accuracy"][0] == [0, 8]
    assert re.search(r"on 15 problems \(sudoku .*%, countdown .*%\)", printed)
    missing = {tag for tag in curves if not documented(tag)}
    assert not missing, f"docs/monitoring.md does not explain {missing}"


COARSE_TASK = """
from megatron_espo.tasks.base import Score
from megatron_espo.tasks.sudoku import *
from megatron_espo.tasks import sudoku
def score(example, completion):
    # One completion in five, and so a group of four in two, has another reward than the rest.
    return Score(float(sum(map(ord, completion)) % 5 == 1), False, {})
"""


def test_distributed_optimizer_and_further_prompts_resume_bit_for_bit(folder: Path) -> None:
    """Without a KL penalty, so that sequences are left out of backward passes, too."""
    (folder / "coarse.py").write_text(COARSE_TASK)
    flags = ["--use-distributed-optimizer", "--espo-task", str(folder / "coarse.py"),
             "--espo-refill", "3", "--espo-kl-coef", "0"]  # fmt: skip
    espo(folder, "refilled", *flags)
    espo(folder, "refilled-parts", *flags, "--exit-interval", "3")
    state = torch.load(folder / "refilled-parts/iter_0000003/espo/state.pt", weights_only=True)
    assert state["rollout"]["refills"] and state["rollout"]["discarded"]["rewards"]
    espo(folder, "refilled-parts", *flags)
    assert_same_run(folder, "refilled-parts", whole="refilled")
    curves = scalars(folder, "refilled")
    assert sum(curves["rollout/further_prompts"][1]) > 0
    assert 0 < sum(curves["policy/without_backward"][1]) < 8
    missing = {tag for tag in curves if not documented(tag)}
    assert not missing, f"docs/monitoring.md does not explain {missing}"


POISON = """
import random, sys, numpy, torch
from megatron_espo.training import {entry}
def poison():
    word = random.SystemRandom().randrange(2**31)
    torch.manual_seed(word); numpy.random.seed(word); random.seed(word)
{patch}
{entry}.main(sys.argv[1:])
"""


def poisoned(folder: Path, entry: str, patch: str) -> list[str]:
    """Write an entry point that upsets the global generators where the patch says."""
    script = folder / f"poisoned_{entry}.py"
    script.write_text(POISON.format(entry=entry, patch=patch))
    return [str(script)]


def test_espo_does_not_read_the_global_generators(folder: Path, whole: str) -> None:
    patch = (
        "from megatron_espo.rl import reports, scalars, trainer\n"
        "phase = scalars.Clock.__call__\n"
        "def poisoned(self, name): poison(); return phase(self, name)\n"
        "scalars.Clock.__call__ = poisoned\n"
        "look = trainer.look_out\n"
        "def look_out(*a):\n"
        "    inner = look(*a)\n"
        "    def on_step(tokens): poison(); inner(tokens)\n"
        "    return on_step\n"
        "trainer.look_out = reports.look_out = look_out"
    )
    espo(folder, "poisoned", program=poisoned(folder, "espo", patch))
    assert_same_run(folder, "poisoned")


NAN = (
    "from megatron_espo.rl import trainer\n"
    "accumulate = trainer.accumulate_gradient\n"
    "def spoilt(model, *a):\n"
    "    draws = accumulate(model, *a)\n"
    "    gradient = model.chunks[0].buffers[0].grad_data\n"
    "    if torch.distributed.get_rank() == 1:\n"
    "        gradient[len(gradient) // 2 + 5] = float('nan')\n"
    "    return draws\n"
    "trainer.accumulate_gradient = spoilt"
)


def test_a_gradient_that_is_not_finite_ends_the_run(folder: Path) -> None:
    """One entry of one rank's part, spoilt after the gradient was reduced: all ranks find it."""
    program = poisoned(folder, "espo", NAN)
    output = espo(folder, "spoilt", "--use-distributed-optimizer", program=program, fails=True)
    message = "the gradient's norm at optimizer step 1 is nan; the step is not saved"
    assert output.count(f"RuntimeError: {message}") >= 2
    assert not list((folder / "spoilt").glob("iter_*"))


def test_fine_tuning_resumes_bit_for_bit_and_shows_each_step_once(folder: Path) -> None:
    program = ["-m", "megatron_espo.training.pretrain"]
    flags = ("--load", str(folder / "tuned"), "--save-interval", "2", "--log-interval", "1",
             "--tensorboard-dir", str(folder / "tuned-events"))  # fmt: skip
    fine_tune(folder, "tuned", program, *flags)
    whole, curves = checkpoint_tensors(str(folder / "tuned")), scalars(folder, "tuned")
    assert curves["lm loss"][0] == [1, 2, 3, 4, 5, 6]
    # As if it had been killed after its fifth step.
    (folder / "tuned" / "latest_checkpointed_iteration.txt").write_text("4")
    shutil.rmtree(folder / "tuned" / "iter_0000006")
    fine_tune(folder, "tuned", program, *flags)
    assert not unequal_tensors(whole, checkpoint_tensors(str(folder / "tuned")))
    again = scalars(folder, "tuned")
    losses = [name for name in curves if "loss" in name]
    assert losses and {n: curves[n] for n in losses} == {n: again[n] for n in losses}


def test_training_does_not_read_the_global_generators(folder: Path) -> None:
    patch = (
        "step = pretrain.forward_step\n"
        "def forward_step(*a, **k): poison(); return step(*a, **k)\n"
        "pretrain.forward_step = forward_step"
    )
    fine_tune(folder, "poisoned-base", program=poisoned(folder, "pretrain", patch))
    ours, theirs = (checkpoint_tensors(str(folder / n)) for n in ("base", "poisoned-base"))
    assert not unequal_tensors(ours, theirs) and len(ours) > 10


FAILING_TASK = """
import os, signal
from pathlib import Path
from megatron_espo.tasks.sudoku import *
from megatron_espo.tasks import sudoku
flag, calls = Path(os.environ["FAILED"]), 0
def score(example, completion):
    global calls
    calls += 1
    # Five of sixteen held-out and half of the second rollout's completions later, on one rank.
    if os.environ["RANK"] == "1" and calls == 18 and not flag.exists():
        flag.touch()
        {failure}
    return sudoku.score(example, completion)
"""


def failing(tmp_path: Path, failure: str) -> tuple[list[str], dict[str, str]]:
    """Flags and environment of a run whose reward fails once, on rank 1."""
    (tmp_path / "failing_task.py").write_text(FAILING_TASK.format(failure=failure))
    environment = {"FAILED": str(tmp_path / "failed"), "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    # In the trainer itself, so that it is the rank that fails.
    flags = ["--espo-task", "failing_task", "--save-interval", "1", "--espo-reward-workers", "0"]
    return flags, environment


def test_exception_in_one_rank_ends_the_job_with_its_message(
    folder: Path, whole: str, tmp_path: Path
) -> None:
    flags, environment = failing(tmp_path, "raise RuntimeError('the reward server is gone')")
    # Forks end so fast that both ranks are found dead at once, and the first one is blamed.
    environment = {**environment, "PYTHON_EXEC": sys.executable}
    started = time.monotonic()
    printed = espo(folder, "raising", *flags, environment=environment, fails=True)
    assert time.monotonic() - started < 150
    assert "RuntimeError: the reward server is gone" in printed
    assert re.search(r"Root Cause.*\n\[\d+\]:\n.*\n.*\n +rank +: 1 ", printed)


def test_restart_after_a_killed_rank_is_the_same_run(
    folder: Path, whole: str, tmp_path: Path
) -> None:
    flags, environment = failing(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    launch = [*TORCHRUN, "--max-restarts", "1"]
    espo(folder, "restarted", *flags, environment=environment, launch=launch)
    assert (tmp_path / "failed").exists()
    assert_same_run(folder, "restarted")


WAITING_TASK = """
import os, time
from pathlib import Path
from megatron_espo.tasks.base import Score
from megatron_espo.tasks.sudoku import *
def score(example, completion):
    # Held-out problems are scored before there is a rollout.
    flags, deadline = Path(os.environ["FLAGS"]), time.monotonic() + 8
    while (flags / "sampled").exists() and not (flags / "frozen").exists():
        if time.monotonic() > deadline:
            return Score(0.0, False, {})
        time.sleep(0.01)
    return Score(1.0, True, {})
"""
FLAGGED = """
import os, sys
from pathlib import Path
from megatron_espo.rl import trainer
from megatron_espo.startup.setup import run_entry_point
from megatron_espo.training import espo
flags = Path(os.environ["FLAGS"])
sample, frozen = trainer.sample, trainer._evaluate_frozen_policies
def flagged(name, function):
    def run(*a):
        (flags / name).touch()
        return function(*a)
    return run
trainer.sample = flagged("sampled", sample)
trainer._evaluate_frozen_policies = flagged("frozen", frozen)
run_entry_point(espo.main)
"""


def test_rewards_are_waited_for_after_the_passes_of_frozen_policies(
    folder: Path, tmp_path: Path
) -> None:
    """A score that only comes once those passes have begun."""
    (tmp_path / "waiting_task.py").write_text(WAITING_TASK)
    (tmp_path / "flagged.py").write_text(FLAGGED)
    environment = {"FLAGS": str(tmp_path), "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    espo(
        folder, "waiting", "--espo-task", "waiting_task", "--espo-num-rollouts", "1",
        "--espo-reward-workers", "2", "--lr-warmup-iters", "0",
        program=[str(tmp_path / "flagged.py")],
        launch=[*TORCHRUN[:-1], "1"], environment=environment,
    )  # fmt: skip
    (reward,) = read_scalars(folder / "waiting-events")["reward/mean"][1]
    assert reward == 1.0


KILLED_WORKER_TASK = """
import os, signal
from pathlib import Path
from megatron_espo.tasks.sudoku import *
from megatron_espo.tasks import sudoku
flag, calls = Path(os.environ["FAILED"]), 0
def score(example, completion):
    global calls
    calls += 1
    if os.environ["RANK"] == "1" and calls == 5 and not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return sudoku.score(example, completion)
"""


def test_killed_reward_worker_is_counted_and_the_run_is_the_same(
    folder: Path, whole: str, tmp_path: Path
) -> None:
    (tmp_path / "killed_worker_task.py").write_text(KILLED_WORKER_TASK)
    environment = {"FAILED": str(tmp_path / "failed")}
    task = str(tmp_path / "killed_worker_task.py")
    espo(folder, "worker", "--espo-task", task, environment=environment)
    assert (tmp_path / "failed").exists()
    theirs, ours = scalars(folder, "whole"), scalars(folder, "worker")
    assert sum(theirs.pop("reward/crashes")[1]) == 0.0
    assert sum(ours.pop("reward/crashes")[1]) == 1.0
    assert ours == theirs and sum(ours["reward/timeouts"][1]) == 0.0
    assert not unequal_tensors(final_tensors(folder, "whole"), final_tensors(folder, "worker"))


@pytest.mark.timeout(900)
def test_killed_run_is_the_same_run(tmp_path: Path) -> None:
    """``tools/check_resume.py kill`` makes twenty kills, of torchrun alone, too."""
    # By turns one rank, all ranks told, all ranks while they write. Forked ranks have the server
    # of forks for their parent, not torchrun: its death cannot be shown with them.
    printed = run(
        "tools/check_resume.py", "kill", "--out", str(tmp_path / "runs"), "--kills", "3",
        "--rollouts", "14", timeout=900,
    )  # fmt: skip
    assert printed.count("\nkill ") == 3 and "tensors" in printed


def evaluate(
    folder: Path, *flags: str, launch: Sequence[str] = (), fails: bool = False
) -> tuple[str, list[dict]]:
    """Evaluate the undisturbed run; what was printed and the finished completions."""
    (folder / "mine.py").write_text("from megatron_espo.tasks.sudoku import name, read, score\n")
    printed = run(
        *launch, "tools/evaluate.py", "--load", str(folder / "whole"),
        "--tokenizer-model", str(folder / "tokenizer"), "--seq-length", "32", *SAMPLING,
        "--espo-task", str(folder / "mine.py"),
        "--espo-eval-data", str(folder / "data/test.jsonl"), "--out", str(folder / "evaluation"),
        *flags, fails=fails,
    )  # fmt: skip
    lines = (folder / "evaluation/completions.jsonl").read_text().splitlines()
    return printed, [json.loads(line) for line in lines]


def test_evaluation_of_the_checkpoint_gives_the_runs_number_and_resumes(
    folder: Path, whole: str
) -> None:
    printed, completions = evaluate(folder)
    result = json.loads(next(x for x in printed.splitlines() if x.startswith('{"accuracy"')))
    assert result["num_problems"] == len(completions) == 12
    last = scalars(folder, "whole")["eval/reward"][1][-1]
    assert result["reward"] == pytest.approx(last, abs=1e-6)
    # As if it had been killed while it wrote its fifth completion; two ranks go on.
    path = folder / "evaluation/completions.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:5])[:-20])
    printed, again = evaluate(folder, launch=TORCHRUN)
    assert "length 16: 4 of 12 are finished" in printed and again[:4] == completions[:4]
    tokens = [{c["problem"]: c["token_ids"] for c in made} for made in (completions, again)]
    assert tokens[0] == tokens[1] and len(again) == 12
    assert json.loads((folder / "evaluation/results.json").read_text())[0]["reward"] == (
        pytest.approx(result["reward"])
    )
    # Another run's checkpoint of the same step at the same path.
    weights = next((folder / "whole" / "iter_0000008").glob("*.distcp"))
    kept = weights.read_bytes(), weights.stat().st_mtime_ns
    weights.write_bytes(kept[0])
    printed, after = evaluate(folder, fails=True)
    assert "holds an evaluation with another model" in printed and after == again
    os.utime(weights, ns=(kept[1], kept[1]))


def test_checkpoint_of_another_model_is_refused_on_all_ranks(folder: Path) -> None:
    printed = espo(folder, "refused", "--hidden-size", "32", fails=True)
    assert "error: --pretrained-checkpoint" in printed and "--hidden-size is 64 there" in printed
    assert '  File "' not in printed.split("error: --pretrained")[0], "a traceback came first"
    assert not (folder / "refused").exists()


GOLDEN = ROOT / "tests/data/golden_losses.json"


def assert_golden(kind: str, curves: Mapping[str, Curve], names: Sequence[str]) -> None:
    """Compare a run with what it was when tests/data/golden_losses.json was written.

    With GOLDEN=write the file gets the run's numbers instead: for a change that is meant to change
    them.
    """
    found = {name: {"steps": curves[name][0], "values": curves[name][1]} for name in names}
    kinds = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("GOLDEN") == "write":
        GOLDEN.write_text(json.dumps(kinds | {kind: found}, indent=1, sort_keys=True) + "\n")
        return
    assert found.keys() == kinds[kind].keys()
    for name, curve in kinds[kind].items():
        assert found[name]["steps"] == curve["steps"], name
        # Sums in another order on another processor, through some updates.
        assert found[name]["values"] == pytest.approx(curve["values"], rel=1e-5, abs=1e-7), name


def test_losses_of_a_fine_tuning_are_the_recorded_ones(folder: Path) -> None:
    names = ["lm loss", "lm loss validation", "grad-norm", "learning-rate"]
    assert_golden("fine-tuning", read_scalars(folder / "base-events"), names)


def test_losses_of_an_espo_run_are_the_recorded_ones(folder: Path, whole: str) -> None:
    names = [
        "policy/loss", "policy/grad_norm", "policy/kl_per_token", "policy/ratio/mean",
        "reward/mean", "elbo/per_token/mean", "eval/reward",
    ]  # fmt: skip
    assert_golden("espo", scalars(folder, "whole"), names)


def test_text_pretraining_samples_at_the_end(folder: Path, tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"{number} cats sat on the mat. " * 20)
    done = subprocess.run(
        ["bash", "examples/pretrain_tiny.sh", "--text", str(tmp_path), "--out",
         str(folder / "text"), "--", "--train-iters", "4", "--eval-iters", "1",
         "--lr-warmup-iters", "1", "--log-interval", "1"],
        cwd=ROOT, env={**ENVIRONMENT, "PYTHON": python()}, text=True, timeout=560,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert "lm loss" in done.stdout and "Masked diffusion " in done.stdout
    names = ["lm loss", "lm loss validation", "grad-norm"]
    assert_golden("pre-training", read_scalars(folder / "text/tensorboard"), names)


def test_text_pretraining_takes_a_few_files_from_where_it_is_called(tmp_path: Path) -> None:
    (tmp_path / "notes/deep").mkdir(parents=True)
    for number in range(5):
        (tmp_path / f"notes/deep/{number}.rst").write_text("A cat sat on the mat.\n" * 20)
    (tmp_path / "notes/picture").write_bytes(bytes(range(256)))
    (tmp_path / "one").write_text("One file more.\n" * 20)
    done = subprocess.run(
        ["bash", str(ROOT / "examples/pretrain_tiny.sh"), "--text", "notes", "one", "--out", "made",
         "--", "--train-iters", "2", "--lr-warmup-iters", "1", "--log-interval", "1"],
        cwd=tmp_path, env={**ENVIRONMENT, "PYTHON": python(), "RANKS": "1"}, text=True,
        timeout=560, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    pages = (tmp_path / "made/text.jsonl").read_text().splitlines()
    assert len(pages) == 6 and "One file more." in pages[-1]
    assert "iteration 2/2" in done.stdout and "Masked diffusion " in done.stdout
