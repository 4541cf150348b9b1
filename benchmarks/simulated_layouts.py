"""The table of simulated layouts in docs/cluster.md: peaks of memory beside the plan's arithmetic.

    python -m benchmarks.simulated_layouts [--only NAME ...] [--out runs/simulated.json]

Each row is a dry run with --simulate of what its users would start, from an environment without the
variables that the start scripts set. Some 20 minutes on one core.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_espo.recipes import expand_recipes

ROOT = Path(__file__).parents[1]
GB = 1e9
_UNSET = ("CUDA_DEVICE_MAX_CONNECTIONS", "OMP_NUM_THREADS", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE")


# Rows that the formulas of plan/ were written after; the others are held out.
_IN_VIEW = (
    "tp 2 x dp 4",
    "tp 2 x pp 2 x dp 2",
    "tp 2 x pp 2 x dp 2, two virtual stages",
    "tp 2 x cp 2 x dp 2",
    "plain layers",
    "selective recomputation",
    "full recomputation",
    "dual cache",
)


@dataclass(frozen=True)
class Row:
    """A run that is planned and simulated.

    Attributes:
        name: of the row.
        target: start script or tool, or a module's name.
        flags: its command line.
    """

    name: str
    target: str
    flags: str

    @property
    def in_view(self) -> bool:
        """Whether the plan's formulas were written with this row in view."""
        return self.name in _IN_VIEW

    def command(self) -> list[str]:
        """The command line of its simulation."""
        if self.target.endswith((".sh", ".py")):
            return [sys.executable, str(ROOT / self.target), *self.flags.split()]
        return [sys.executable, "-m", f"megatron_espo.training.{self.target}", *self.flags.split()]


_ESPO, _PRETRAIN, _SFT = (f"examples/{n}_8b.sh" for n in ("run_espo", "pretrain", "sft"))
_SHORT = "--recipe countdown --num-layers 8"
_EVALUATE = (
    "--load checkpoints/llada-8b --preset llada_8b --bf16 --tensor-model-parallel-size 2 "
    "--sequence-parallel --espo-task gsm8k --espo-eval-data data/gsm8k/test.jsonl "
    "--eval-lengths 256 --rollout-block-length 32 --seq-length 656 --espo-eval-samples 64"
)
_GENERATE = (
    "--load checkpoints/llada-8b --preset llada_8b --bf16 --dry-run-world-size 1 "
    "--rollout-completion-length 256 --rollout-block-length 32 --rollout-denoising-steps 256"
)


def _without(flag: str) -> str:
    """The flags of ESPO's recipes without one that cannot be taken back."""
    flags = expand_recipes(["--recipe", "llada_8b", "--recipe", "countdown"])
    return " ".join(f for f in flags if f != flag) + " --save runs/simulated"


def _nodes(model: str, nodes: int) -> Row:
    """The plan of docs/cluster.md for some nodes."""
    layout = "--tensor-model-parallel-size 4 " if nodes == 8 else ""
    flags = f"--recipe {model} --recipe gsm8k --dry-run-world-size {8 * nodes} {layout}"
    return Row(f"plan: {model}, {nodes} nodes", _ESPO, flags)


ROWS = (
    *(_nodes(model, nodes) for nodes in (1, 2, 8) for model in ("llada_8b", "dream_7b")),
    Row("ESPO, tp 2 x dp 4, 32 layers", _ESPO, "--recipe countdown"),
    Row("ESPO, pp 2 x tp 2 x dp 2, 32 layers", _ESPO,
        "--recipe countdown --pipeline-model-parallel-size 2"),
    Row("pre-training, tp 2 x dp 4, 32 layers", _PRETRAIN, ""),
    Row("SFT, tp 2 x dp 4, 32 layers", _SFT, ""),
    Row("ESPO by python -m, 32 layers", "espo",
        "--recipe llada_8b --recipe countdown --save runs/simulated"),
    Row("evaluate, tp 2 x dp 4, 32 layers", "tools/evaluate.py", _EVALUATE),
    Row("generate, one GPU, 32 layers", "tools/generate.py", _GENERATE),
    Row("tp 2 x dp 4", _ESPO, _SHORT),
    Row("tp 4 x dp 2", _ESPO, f"{_SHORT} --tensor-model-parallel-size 4"),
    Row("tp 2 x pp 2 x dp 2", _ESPO, f"{_SHORT} --pipeline-model-parallel-size 2"),
    Row("tp 2 x pp 4", _ESPO, f"{_SHORT} --pipeline-model-parallel-size 4"),
    Row("tp 2 x pp 2 x dp 2, two virtual stages", _ESPO,
        f"{_SHORT} --pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"),
    Row("tp 2 x cp 2 x dp 2", _ESPO, f"{_SHORT} --context-parallel-size 2"),
    Row("tp 1 x cp 4 x dp 2", _ESPO,
        f"{_SHORT} --tensor-model-parallel-size 1 --context-parallel-size 4"),
    Row("no sequence parallelism", "espo",
        f"{_without('--sequence-parallel')} --num-layers 8"),
    Row("no overlapped gradients and gathers", "espo",
        f"{_without('--overlap-grad-reduce').replace('--overlap-param-gather', '')} "
        "--num-layers 8"),
    Row("no distributed optimizer", "espo",
        f"{_without('--use-distributed-optimizer').replace('--overlap-param-gather', '')} "
        "--num-layers 8"),
    Row("FP8 tensorwise", _ESPO, f"{_SHORT} --fp8-format hybrid"),
    Row("FP8 tensorwise, rollouts only", _ESPO,
        f"{_SHORT} --fp8-format hybrid --espo-fp8-phases rollout"),
    Row("FP8 tensorwise, ELBOs only", _ESPO,
        f"{_SHORT} --fp8-format hybrid --espo-fp8-phases elbo"),
    Row("FP8 blockwise", _ESPO, f"{_SHORT} --fp8-format hybrid --fp8-recipe blockwise"),
    Row("FP8 blockwise, rollouts only", _ESPO,
        f"{_SHORT} --fp8-format hybrid --fp8-recipe blockwise --espo-fp8-phases rollout"),
    Row("FP8 blockwise, ELBOs only", _ESPO,
        f"{_SHORT} --fp8-format hybrid --fp8-recipe blockwise --espo-fp8-phases elbo"),
    Row("dual cache", _ESPO, f"{_SHORT} --rollout-cache dual"),
    Row("Dream-7B", _ESPO, f"{_SHORT} --recipe dream_7b --num-layers 8"),
    Row("plain layers", _ESPO, f"{_SHORT} --transformer-impl local"),
    Row("plain layers, micro-batch 8", _ESPO,
        f"{_SHORT} --transformer-impl local --micro-batch-size 8"),
    Row("micro-batch 8", _ESPO, f"{_SHORT} --micro-batch-size 8"),
    Row("selective recomputation", _ESPO, f"{_SHORT} --recompute-activations"),
    Row("full recomputation", _ESPO,
        f"{_SHORT} --recompute-granularity full --recompute-method uniform "
        "--recompute-num-layers 1"),
)  # fmt: skip


def simulate(row: Row, folder: Path) -> dict[str, Any]:
    """Run a row's dry run; what it found."""
    out = folder / "found.json"
    environment = {k: v for k, v in os.environ.items() if k not in _UNSET}
    done = subprocess.run(
        [*row.command(), "--dry-run", "--simulate", "--simulate-out", str(out)],
        cwd=folder,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        return {"status": (done.stderr or done.stdout).strip().splitlines()[-1]}
    return {"status": "ok", **json.loads(out.read_text("utf-8"))}


def lines(row: Row, found: dict[str, Any]) -> Iterator[str]:
    """A line of the table for each simulated rank."""
    if found["status"] != "ok":
        yield f"| {row.name} | | {found['status']} | | | | | | |"
        return
    for rank in found["ranks"]:
        peaks = {name: phase["peak"] for name, phase in rank["phases"].items()}
        where = max(peaks, key=lambda name: peaks[name])
        planned = rank["planned_peak"]
        compared = " | "
        if planned:
            part = "in view" if row.in_view else "held out"
            compared = f"{planned / GB:.2f} | {100 * (planned / peaks[where] - 1):+.1f}% ({part})"
        steps = rank["steps"]
        waits = f"{sum(s['waits'] for s in steps) / len(steps):.1f}" if steps else ""
        found_times = rank["estimate"]
        times = ""
        if found_times:
            times = (
                f"{sum(found_times['seconds'].values()):.0f} s, "
                f"{found_times['tokens_per_second']:,.0f} tokens/s, {100 * found_times['mfu']:.0f}%"
            )
        yield (
            f"| {row.name} | {rank['rank']} | ok | {peaks[where] / GB:.2f} ({where}) | "
            f"{compared} | {waits} | {rank['pinned'] / GB:.2f} | {times} |"
        )


def main(argv: Sequence[str]) -> None:
    """Simulate the rows and print the table.

    Args:
        argv: command line.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", help="rows whose names hold one of these")
    parser.add_argument("--out", type=Path, default=Path("runs/simulated.json"))
    options = parser.parse_args(argv)
    results: dict[str, Any] = {}
    print(
        "| run | rank | | simulated peak, GB | plan, GB | plan against simulated | "
        "waits per denoising step | pinned, GB | estimate from the ceilings |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for row in ROWS:
        if options.only and not any(part in row.name for part in options.only):
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = simulate(row, Path(folder))
        results[row.name] = {"in_view": row.in_view, "command": row.flags, **found}
        for line in lines(row, found):
            print(line, flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
