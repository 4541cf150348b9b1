"""Kills a tiny ESPO run of two tasks over and over; the resumed run must be the same to the bit.

    python tools/check_resume.py kill --out runs/kill --kills 20
    python tools/check_resume.py stages --out runs/stages --kills 6
    python tools/check_resume.py relayout --out runs/relayout

kill: a run of two ranks that is never disturbed, and one that is killed at random moments (SIGKILL
of one rank, SIGTERM of all, SIGKILL of all while a checkpoint is being written, SIGKILL of torchrun
alone) and started anew each time; after torchrun's at once, while its ranks still save. The final
weights, optimizer state, reference policy and TensorBoard's scalars (times aside), histograms and
texts of both must be equal. Flags after ``--`` go to both runs, for example a layout.

stages: SIGKILL of whole process groups during start-up, evaluation (tools/evaluate.py --out) and
conversion (tools/convert_hf.py), by turns; what the same command makes after that must equal, byte
for byte where files are concerned, what it makes undisturbed.

relayout: a run of four ranks with pp=2, dp=2, and the same run that stops half-way and goes on with
two ranks and tp=2; prints rewards and losses of both.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_espo.checkpoint.compare import (
    checkpoint_tensors,
    latest_iteration,
    unequal_tensors,
)
from megatron_espo.command_line import Parser, run_tool
from megatron_espo.console import rank_log
from megatron_espo.errors import UserError
from megatron_espo.monitor.curves import TIME_DEPENDENT, Curve, read_details, read_scalars

ROOT = Path(__file__).parents[1]
_UPDATES = 3
_MODES = ("rank", "term", "write", "launcher")
_SHOWN = ("reward/mean", "policy/loss", "elbo/per_token/mean", "policy/grad_norm")


class Run:
    """One ESPO run in a folder, started as often as needed."""

    def __init__(self, folder: Path, data: Path, rollouts: int, flags: list[str]) -> None:
        self.folder, self.data, self.rollouts, self.flags = folder, data, rollouts, flags
        self.folder.mkdir(parents=True)
        (self.folder / "log").touch()

    def start(self, ranks: int, *more: str) -> subprocess.Popen[bytes]:
        """Start torchrun; its output is appended to the run's log."""
        length = "16"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--nproc-per-node", str(ranks), "-m", "megatron_espo.training.espo",
            "--preset", "tiny", "--num-layers", "4", "--tokenizer-model",
            str(self.data / "tokenizer"), "--seq-length", "32",
            "--espo-task", "sudoku:2,countdown:1",
            "--rollout-completion-length", length, "--rollout-block-length", length,
            "--rollout-denoising-steps", length, "--rollout-micro-batch-size", "8",
            "--espo-train-data", self.files("train"), "--espo-eval-data", self.files("test"),
            "--espo-eval-interval", "3",
            "--espo-num-rollouts", str(self.rollouts), "--espo-prompts-per-rollout", "4",
            "--espo-group-size", "4", "--espo-updates-per-rollout", str(_UPDATES),
            "--espo-reference-mix-interval", "4", "--micro-batch-size", "8", "--lr", "1e-3",
            "--lr-decay-style", "cosine", "--min-lr", "1e-4", "--save-interval", "2",
            "--load", str(self.folder / "checkpoints"), "--save", str(self.folder / "checkpoints"),
            "--tensorboard-dir", str(self.folder / "tensorboard"), *self.flags, *more,
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def files(self, split: str) -> str:
        """The problems of both tasks, as a flag has them."""
        folders = {"sudoku": self.data, "countdown": self.data / "countdown"}
        return ",".join(f"{task}={folder / split}.jsonl" for task, folder in folders.items())

    def finish(self, ranks: int, *more: str) -> None:
        """Run to the end.

        Raises:
            UserError: The run failed.
        """
        if self.start(ranks, *more).wait() != 0:
            tail = (self.folder / "log").read_text(errors="replace").splitlines()[-15:]
            raise UserError(f"{self.folder}/log: the run failed:\n" + "\n".join(tail))

    def saved(self) -> int:
        """The latest iteration, 0 without a checkpoint."""
        try:
            return latest_iteration(str(self.folder / "checkpoints"))
        except UserError:
            return 0

    def is_writing(self, since: float) -> bool:
        """Whether a checkpoint that is not the latest yet was written to since then."""
        saved = self.saved()
        return any(
            _written(path) > since
            for folder in (self.folder / "checkpoints").glob("iter_*")
            if int(folder.name.removeprefix("iter_")) > saved
            for path in (folder, *folder.rglob("*"))
        )

    def starts(self) -> int:
        """How many starts have come as far as training."""
        # Megatron's lines are in the run's own log.
        logs = (self.folder / "log", rank_log(self.folder / "checkpoints"))
        text = "".join(path.read_text(errors="replace") for path in logs if path.exists())
        return text.count("successfully loaded checkpoint") + text.count("held-out (before)")


def _written(path: Path) -> float:
    with contextlib.suppress(OSError):  # a temporary file that has just been moved
        return path.stat().st_mtime
    return 0.0


def make_data(folder: Path) -> None:
    """Make the tokenizer and the problems."""
    for arguments in (
        ["tools/make_tokenizer.py", "--out", str(folder / "tokenizer")],
        ["tools/prepare_data.py", "sudoku", "--out", str(folder), "--seed", "1",
         "--train", "40", "--validation", "4", "--test", "8"],
        ["tools/prepare_data.py", "countdown", "--out", str(folder / "countdown"), "--seed", "1",
         "--train", "12", "--test", "4"],
    ):  # fmt: skip
        subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)


def workers_of(pid: int) -> list[int]:
    """Process ids of torchrun's workers (it has other children, too)."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread or process that has just ended
            found += [int(part) for part in path.read_text().split()]
    workers = []
    for child in found:
        with contextlib.suppress(OSError):
            if b"megatron_espo.training.espo" in Path(f"/proc/{child}/cmdline").read_bytes():
                workers.append(child)
    return sorted(workers)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> bool:
    """Wait until something is true; False if the process ends first."""
    while process.poll() is None:
        if condition():
            return True
        time.sleep(0.01)
    return False


def kill_once(run: Run, ranks: int, mode: str, rng: random.Random) -> str | None:
    """Start a run and kill it.

    Args:
        run: the run.
        ranks: number of ranks.
        mode: "rank", "term", "write" or "launcher".
        rng: decides the moment.

    Returns:
        What was done, or None if the run came to its end before.
    """
    before, starts, started = run.saved(), run.starts(), time.time()
    process = run.start(ranks)
    # Some checkpoints after the start, and then at any moment of a rollout or of a save.
    target = before + rng.choice((0, 0, 2, 4))
    begun = wait_for(lambda: run.starts() > starts and run.saved() >= target, process)
    if mode == "write":
        begun = begun and wait_for(lambda: run.is_writing(started), process)
        time.sleep(rng.uniform(0.0, 0.1))
    else:
        time.sleep(rng.uniform(0.0, 1.0))
    workers = workers_of(process.pid)
    if not begun or not workers or process.poll() is not None:
        process.wait()
        return None
    writing = run.is_writing(started)
    struck = time.monotonic()
    if mode == "term":
        process.send_signal(signal.SIGTERM)
    elif mode == "launcher":
        process.kill()
        process.wait()
        # The next start need not know: it waits for the ranks that are left.
        return f"{mode:8} at a checkpoint of step {before} -> {run.saved()}; torchrun alone"
    else:
        for pid in workers if mode == "write" else [rng.choice(workers)]:
            os.kill(pid, signal.SIGKILL)
    process.wait()
    took = time.monotonic() - struck
    return (
        f"{mode:8} at a checkpoint of step {before} -> {run.saved()}"
        f"{', while writing' if writing else ''}; all ranks ended after {took:.1f} s"
    )


def scalars(run: Run) -> dict[str, Curve]:
    """A run's TensorBoard scalars, times aside."""
    curves = read_scalars(run.folder / "tensorboard")
    return {name: curve for name, curve in curves.items() if not name.startswith(TIME_DEPENDENT)}


def check_kills(options: argparse.Namespace, flags: list[str]) -> bool:
    """Compare a run that is killed with one that is not."""
    rng = random.Random(options.seed)
    whole = Run(options.out / "whole", options.out, options.rollouts, flags)
    killed = Run(options.out / "killed", options.out, options.rollouts, flags)
    print(f"The undisturbed run: {options.rollouts} rollouts x {_UPDATES} updates", flush=True)
    whole.finish(options.ranks)
    kills = 0
    while kills < options.kills:
        done = kill_once(killed, options.ranks, _MODES[kills % len(_MODES)], rng)
        if done is None:
            break
        kills += 1
        print(f"kill {kills:2d}: {done}", flush=True)
    killed.finish(options.ranks)
    tensors = [checkpoint_tensors(str(run.folder / "checkpoints")) for run in (whole, killed)]
    unequal = unequal_tensors(*tensors)
    curves = [scalars(run) for run in (whole, killed)]
    names = sorted(curves[0].keys() | curves[1].keys())
    apart = [name for name in names if curves[0].get(name) != curves[1].get(name)]
    points = sum(len(curve[0]) for curve in curves[0].values())
    details = [read_details(run.folder / "tensorboard") for run in (whole, killed)]
    tags = sorted(details[0].keys() | details[1].keys())
    blurred = [tag for tag in tags if details[0].get(tag) != details[1].get(tag)]
    print(
        f"{kills} kills: {len(tensors[0]) - len(unequal)} of {len(tensors[0])} tensors and "
        f"{len(names) - len(apart)} of {len(names)} scalars ({points} points) and "
        f"{len(tags) - len(blurred)} of {len(tags)} histograms and texts equal to the bit"
    )
    for name in unequal + apart + blurred:
        print(f"  differs: {name}")
    if kills < options.kills:
        print(f"error: the run ended after {kills} kills; raise --rollouts.")
    return not (unequal or apart or blurred) and kills == options.kills


def commands_of(run: Run) -> dict[str, list[str]]:
    """The commands that come after a run; OUT stands for what each makes."""
    sampling = [
        "--rollout-completion-length", "16", "--rollout-block-length", "16",
        "--rollout-denoising-steps", "16", "--rollout-micro-batch-size", "1",
    ]  # fmt: skip
    checkpoints, data = str(run.folder / "checkpoints"), run.data
    return {
        "evaluation": [
            sys.executable, "tools/evaluate.py", "--load", checkpoints, "--tokenizer-model",
            str(data / "tokenizer"), "--seq-length", "32", "--espo-task", "sudoku",
            "--espo-eval-data", str(data / "test.jsonl"), "--eval-temperature", "1.0",
            "--eval-num-samples", "8", *sampling, "--out", "OUT",
        ],
        "conversion": [
            sys.executable, "tools/convert_hf.py", "to-hf", "--megatron", checkpoints,
            "--family", "llada", "--out", "OUT",
        ],
    }  # fmt: skip


def made(folder: Path) -> dict[str, object]:
    """What a command left: completions in the order of problems, or files."""
    lines = folder / "completions.jsonl"
    if lines.is_file():
        rows = [json.loads(line) for line in lines.read_text().splitlines()]
        return {f"{row['problem']}/{row['sample']}": row["token_ids"] for row in rows}
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def kill_everything(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL a process with its group, and torchrun's workers, which have groups of their own."""
    workers = workers_of(process.pid)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for pid in workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def check_stages(options: argparse.Namespace, flags: list[str]) -> bool:
    """Kill starts, evaluations and conversions, and compare what comes of them in the end."""
    rng, equal = random.Random(options.seed), True
    whole = Run(options.out / "whole", options.out, 2, flags)
    killed = Run(options.out / "killed", options.out, 2, flags)
    whole.finish(options.ranks)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def start(stage: str, out: Path) -> subprocess.Popen[bytes]:
        if stage == "start":
            return killed.start(options.ranks)
        words = [str(out) if word == "OUT" else word for word in commands_of(whole)[stage]]
        with (options.out / "log").open("ab") as log:
            return subprocess.Popen(
                words, cwd=ROOT, env=environment, start_new_session=True, stdout=log, stderr=log
            )

    def finish(stage: str, out: Path) -> float:
        began = time.monotonic()
        if start(stage, out).wait() != 0:
            raise UserError(f"{options.out}/log: {stage} failed.")
        return time.monotonic() - began

    seconds = {name: finish(name, options.out / name) for name in ("evaluation", "conversion")}
    seconds["start"] = seconds["evaluation"]
    for number in range(options.kills):
        stage, out = ("start", "evaluation", "conversion")[number % 3], options.out / "again"
        moment = seconds[stage] * rng.uniform(0.3, 1.0)
        process = start(stage, out)
        time.sleep(moment)
        had_ended = process.poll() is not None
        kill_everything(process)
        lines = out / "completions.jsonl"
        left = len(lines.read_bytes().splitlines()) if lines.exists() else 0
        print(
            f"kill {number + 1}: {stage} after {moment:.1f} of about {seconds[stage]:.1f} s"
            f"{' (it had ended)' if had_ended else ''}: "
            + {
                "start": f"the run's last checkpoint is {killed.saved()}",
                "evaluation": f"{left} completions are finished",
                "conversion": f"the folder is {'whole' if out.exists() else 'not there'}",
            }[stage],
            flush=True,
        )
        if stage != "start":
            if not (stage == "conversion" and out.exists()):
                finish(stage, out)
            same = made(out) == made(options.out / stage)
            print(f"  the same command then: {'equal' if same else 'DIFFERS'}", flush=True)
            shutil.rmtree(out)
            equal &= same
    killed.finish(options.ranks)
    tensors = [checkpoint_tensors(str(run.folder / "checkpoints")) for run in (whole, killed)]
    unequal = unequal_tensors(*tensors)
    same_tensors = f"{len(tensors[0]) - len(unequal)} of {len(tensors[0])}"
    print(f"{options.kills} kills: {same_tensors} tensors of the run equal to the bit")
    return equal and not unequal


def check_relayout(options: argparse.Namespace, flags: list[str]) -> bool:
    """Compare a run that changes its layout half-way with one that does not."""
    first = ["--pipeline-model-parallel-size", "2"]
    half = options.rollouts // 2 * _UPDATES
    whole = Run(options.out / "whole", options.out, options.rollouts, flags)
    moved = Run(options.out / "moved", options.out, options.rollouts, flags)
    whole.finish(4, *first)
    # One step into a rollout, so that the rollout in hand moves, too.
    moved.finish(4, *first, "--exit-interval", str(half + 1))
    moved.finish(2, "--tensor-model-parallel-size", "2")
    ours, theirs = scalars(whole), scalars(moved)
    print(f"pp=2 x dp=2 throughout | the same up to step {half + 1}, then tp=2")
    print("| step | " + " | ".join(_SHOWN) + " |")
    print("|---" * (len(_SHOWN) + 1) + "|")
    worst = 0.0
    for step in ours["policy/loss"][0]:
        cells = []
        for name in _SHOWN:
            pair = [dict(zip(*curves[name], strict=True)).get(step) for curves in (ours, theirs)]
            if pair[0] is None or pair[1] is None:
                cells.append("")
                continue
            worst = max(worst, abs(pair[0] - pair[1]) / max(abs(pair[0]), 1e-3))
            cells.append(f"{pair[0]:.6f} / {pair[1]:.6f}")
        print(f"| {step} | " + " | ".join(cells) + " |")
    print(f"largest relative difference: {worst:.1e}")
    return bool(worst < options.tolerance)


def main(argv: Sequence[str]) -> int:
    """Run a check; returns the exit status."""
    flags: list[str] = []
    if "--" in argv:
        place = argv.index("--")
        argv, flags = argv[:place], list(argv[place + 1 :])
    parser = Parser(description=__doc__)
    parser.add_argument("check", choices=("kill", "stages", "relayout"))
    parser.add_argument("--out", type=Path, required=True, help="new folder for the runs")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2, help="ranks of the killed run")
    parser.add_argument("--rollouts", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1, help="decides the moments of the kills")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="for relayout")
    options = parser.parse_args(argv)
    if options.out.exists():
        raise UserError(f"--out {options.out} exists; choose a new folder.")
    options.out.mkdir(parents=True)
    options.out = options.out.resolve()
    make_data(options.out)
    checks = {"kill": check_kills, "stages": check_stages, "relayout": check_relayout}
    check = checks[options.check]
    return 0 if check(options, flags) else 1


if __name__ == "__main__":
    run_tool(main)
