"""Compares objectives on the demo's tasks: the same bases, seeds, prompts, sampler and noise.

Three rates on one seed (--rate-seed), judged by the validation split; then the best of each
objective on all seeds, judged by the test split. A run that has its result is not made again, so
that a comparison which was stopped goes on where it was, also on another machine: results are
files of --results, what they were made in (bases, checkpoints, logs) lies in --out. Runs of one
seed share their base (benchmarks.compare_bases). Where a seed's results started from a base that
is not here, its missing runs are left out and named; to make them, copy base-TASK-SEED of that
--out here.

    python -m benchmarks.compare --task sudoku --table docs/objectives.md

Everything but the objective, its penalty, clip and draws is the demo's
(examples/run_espo_tiny.sh); advantages are leave-one-out for all. Draws are chosen so that a
completion has two views where its masks allow that.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.compare_bases import (
    base_record,
    check_bases,
    made_elsewhere,
    record_base,
    results_of_seed,
    same_base,
)
from benchmarks.compare_report import table, write_figure, write_table
from benchmarks.measure import machine
from megatron_espo.config import EspoConfig
from megatron_espo.errors import UserError
from megatron_espo.monitor.curves import read_scalars
from megatron_espo.objectives import objective_of, views_per_completion

ROOT = Path(__file__).parents[1]
PROMPTS, GROUP, UPDATES = 32, 8, 2
LAUNCH = (sys.executable, "-m", "torch.distributed.run", "--standalone")

# Penalty and clip range as published where that is known, ESPO's of the demo for its ablations.
_DEMO = {"kl_coef": 5e-3, "num_mc": 1}
SETTINGS: dict[str, dict[str, Any]] = {
    "espo": _DEMO,
    "token_elbo": _DEMO,
    "mean_field": _DEMO,
    "diffu_grpo": {
        "kl_coef": 0.04, "kl_estimator": "k3", "num_mc": 2, "clip_eps_low": 0.5,
        "clip_eps_high": 0.5,
    },
    "coupled_grpo": {
        "kl_coef": 0.01, "kl_estimator": "k3", "num_mc": 1, "clip_eps_low": 0.5,
        "clip_eps_high": 0.5,
    },
    "wd1": {"kl_coef": 0.0, "num_mc": 2},
    "gdsd": {"kl_coef": 1e-3, "num_mc": 1, "clip_eps_low": 4e-4, "clip_eps_high": 4e-4},
    "spg": {"kl_coef": 0.0, "num_mc": 2, "objective_args": ["beta=1"]},
    "ospo": _DEMO,
}  # fmt: skip


# Of examples/tiny_TASK.sh.
TASKS = {
    "sudoku": {"seq_length": 32, "completion": 16},
    "countdown": {"seq_length": 40, "completion": 16},
}


@dataclass(frozen=True)
class Run:
    """One run of the comparison.

    Attributes:
        task: its name.
        objective: its name.
        rate: highest learning rate.
        seed: of base, prompts, sampling and masks.
        rollouts: length.
        settings: the objective's.
    """

    task: str
    objective: str
    rate: float
    seed: int
    rollouts: int
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of its folder and its result."""
        return f"{self.task}-{self.objective}-{self.rate:g}-{self.seed}"

    @property
    def espo(self) -> EspoConfig:
        """Its settings as the trainer takes them."""
        return EspoConfig(
            objective=self.objective, prompts_per_rollout=PROMPTS, group_size=GROUP,
            updates_per_rollout=UPDATES, num_rollouts=self.rollouts, **self.settings,
        )  # fmt: skip


def main(argv: Sequence[str]) -> None:
    """Make the runs that have no result yet, and write the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, default="sudoku")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--objectives", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-4, 3e-4, 1e-3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument(
        "--rate-seed", type=int, default=1, help="seed whose runs choose the rates (default 1)"
    )
    parser.add_argument("--rollouts", type=int, default=32)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--table", type=Path, help="Markdown file with the comparison's marks")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--report-only", action="store_true", help="make no runs")
    options = parser.parse_args(argv)

    def result(objective: str, rate: float, seed: int) -> dict[str, Any] | None:
        settings = SETTINGS[objective]
        run = Run(options.task, objective, rate, seed, options.rollouts, settings)
        return result_of(run, options)

    # Objective by objective within a rate and a seed, so that a part compares all of them.
    tried: dict[str, list[tuple[float, dict[str, Any]]]] = {}
    for rate in options.rates:
        for name in options.objectives:
            if found := result(name, rate, options.rate_seed):
                tried.setdefault(name, []).append((rate, found))
    check_bases(found for runs in tried.values() for _, found in runs)
    best = {n: max(runs, key=lambda r: (validated(r[1]), -r[0]))[0] for n, runs in tried.items()}
    results = [
        found
        for seed in options.seeds
        for name, rate in best.items()
        if (found := result(name, rate, seed))
    ]
    if options.table is not None and results:
        write_table(options.table, options.task, results)
    if options.figure is not None and results:
        write_figure(options.figure, results)
    print("\n".join(table(results)))


def validated(result: dict[str, Any]) -> float:
    """Accuracy on the validation split after the run."""
    accuracy: float = result["validation"][-1]
    return accuracy


def result_of(run: Run, options: argparse.Namespace) -> dict[str, Any] | None:
    """Read a run's result, or make the run.

    Returns:
        The result; None where the run is not to be made: with --report-only, and where the seed's
        results started from another base than there is here.

    Raises:
        UserError: the result that is there is of other settings; a part of the run failed.
    """
    path: Path = options.results / f"{run.name}.json"
    if path.exists():
        known: dict[str, Any] = json.loads(path.read_text())
        if known["run"] != asdict(run):
            raise UserError(f"{path} is of other settings: remove it, or choose other --results.")
        return known
    if options.report_only:
        return None
    base = shared_base(run, options)
    if base is None:
        return None
    result = make(run, base, options.out, options.ranks)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(result, indent=None) + "\n")
    unfinished.rename(path)
    return result


def shared_base(run: Run, options: argparse.Namespace) -> Path | None:
    """Find or make the base of a run's seed, if it is the one of the seed's results."""
    known = results_of_seed(options.results, run.task, run.seed)
    folder: Path = base_folder(run.task, run.seed, options.out)
    if not is_made(folder) and made_elsewhere(known):
        why = "that another processor made, and it is not here"
    else:
        base = base_of(run.task, run.seed, options.out, options.ranks)
        accuracy = tested(run.task, base, base / "base", "base", options.out, options.ranks)
        ours = {"base": base_record(base), "test": [accuracy]}
        if all(same_base(ours, theirs) for theirs in known):
            return base
        why = f"and {folder} holds another one"
    print(f"{run.name}: left out; results of its seed started from a base {why}.", flush=True)
    return None


def make(run: Run, base: Path, out: Path, ranks: int) -> dict[str, Any]:
    """Train and evaluate; what is kept of it."""
    train(run, base, out, ranks)
    curves = read_scalars(out / "events" / run.name)
    espo = run.espo
    return {
        "run": asdict(run),
        "base": base_record(base),
        "validation": curves["eval/accuracy"][1],
        "test": [tested(run.task, base, base / "base", "base", out, ranks),
                 tested(run.task, base, out / "runs" / run.name, run.name, out, ranks)],
        "reward": [round(value, 5) for value in curves["reward/mean"][1]],
        "kl_per_token": [round(v, 6) for v in curves.get("policy/kl_per_token", ([], []))[1]],
        "seconds": {name: round(value, 1) for name, value in phases(curves).items()},
        "ranks": ranks,
        "views": views_per_completion(espo),
        "passes": passes(espo),
        "machine": machine(),
    }  # fmt: skip


def tested(task: str, base: Path, folder: Path, name: str, out: Path, ranks: int) -> float:
    """Accuracy of a saved model on the test split, greedy; of a base it is evaluated once."""
    kept = (base if name == "base" else out) / "evaluation" / name
    if not (kept / "results.json").exists():
        sizes = TASKS[task]
        call(
            [*LAUNCH, "--nproc-per-node", str(ranks), "tools/evaluate.py", "--load", str(folder),
             "--tokenizer-model", str(base / "tokenizer"), "--espo-task", task,
             "--espo-eval-data", str(base / "data/test.jsonl"), "--out", str(kept),
             *sampling_flags(sizes)], out / "logs" / f"{task}-{base.name}-{name}-test.log", ranks,
        )  # fmt: skip
    (summary,) = json.loads((kept / "results.json").read_text())
    accuracy: float = summary["accuracy"]
    return accuracy


def sampling_flags(sizes: dict[str, int]) -> list[str]:
    """One token a step, as in the demo."""
    length = str(sizes["completion"])
    return [
        "--seq-length", str(sizes["seq_length"]), "--rollout-completion-length", length,
        "--rollout-block-length", length, "--rollout-denoising-steps", length,
        "--rollout-micro-batch-size", "128",
    ]  # fmt: skip


def phases(curves: Any) -> dict[str, float]:
    """Seconds of all rollouts by phase, and of all phases."""
    of = {n.removeprefix("time/"): sum(c[1]) for n, c in curves.items() if n.startswith("time/")}
    return {**of, "all": sum(of.values())}


def passes(espo: EspoConfig) -> float:
    """Rows passed through the model per completion and update; with gradients they cost three."""
    objective, mu = objective_of(espo), espo.updates_per_rollout
    frozen = (mu - 1 if objective.compares_with_old else 0) + (mu if espo.kl_coef > 0.0 else 0)
    return views_per_completion(espo) * (3 + frozen / mu)


def base_of(task: str, seed: int, out: Path, ranks: int) -> Path:
    """Make a seed's data and fine-tuned model, once."""
    base = base_folder(task, seed, out)
    if not is_made(base):
        call(
            ["bash", "examples/run_espo_tiny.sh", task, "--seed", str(seed), "--out", str(base),
             "--base-only"], out / f"logs/base-{task}-{seed}.log", ranks,
        )  # fmt: skip
        record_base(base)
    return base


def base_folder(task: str, seed: int, out: Path) -> Path:
    """Where a seed's data and fine-tuned model lie."""
    return out / f"base-{task}-{seed}"


def is_made(base: Path) -> bool:
    """Whether there is a fine-tuned model."""
    return (base / "base/latest_checkpointed_iteration.txt").exists()


def train(run: Run, base: Path, out: Path, ranks: int) -> None:
    """Make a run, or go on with it: its folder is its checkpoint."""
    own = []
    for name, value in run.settings.items():
        values = value if isinstance(value, list) else [value]
        own += [f"--espo-{name.replace('_', '-')}", *map(str, values)]
    folder = str(out / "runs" / run.name)
    rows = PROMPTS * GROUP // ranks * views_per_completion(run.espo)
    # As many completions as in the demo.
    batch = math.gcd(rows, 64 * views_per_completion(run.espo))
    call(
        [*LAUNCH, "--nproc-per-node", str(ranks), "-m", "megatron_espo.training.espo",
         "--preset", "tiny", "--rotary-base", "10", "--tokenizer-model", str(base / "tokenizer"),
         "--seed", str(run.seed), *sampling_flags(TASKS[run.task]),
         "--espo-task", run.task, "--espo-train-data", str(base / "data/train.jsonl"),
         "--espo-eval-data", str(base / "data/validation.jsonl"), "--espo-eval-interval", "16",
         "--espo-objective", run.objective, "--espo-num-rollouts", str(run.rollouts),
         "--espo-prompts-per-rollout", str(PROMPTS), "--espo-group-size", str(GROUP),
         "--espo-updates-per-rollout", str(UPDATES), "--micro-batch-size", str(batch), *own,
         "--lr", str(run.rate), "--min-lr", str(run.rate / 10), "--lr-decay-style", "cosine",
         "--lr-warmup-iters", str(min(4, run.rollouts)), "--adam-beta2", "0.99",
         "--weight-decay", "0.01", "--pretrained-checkpoint", str(base / "base"),
         "--load", folder, "--save", folder, "--save-interval", "32", "--save-keep-last", "1",
         "--tensorboard-dir", str(out / "events" / run.name)],
        out / "logs" / f"{run.name}.log", ranks,
    )  # fmt: skip


def call(command: Sequence[str], log: Path, ranks: int) -> None:
    """Run a command with its output in a file.

    Raises:
        UserError: it failed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"{log.stem} ...", flush=True)
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHON": sys.executable,
        "RANKS": str(ranks),
    }  # fmt: skip
    with log.open("w") as file:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode:
        raise UserError(f"{log.stem} failed; see {log}.")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
