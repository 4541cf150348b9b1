"""Measures how the cost of rollouts and updates grows, and fits it with the arithmetic's terms.

One size at a time is varied: prompt length, completion length, block length, batch, vocabulary. The
seconds of a model evaluation (rollouts) or of a sequence's update are fitted by least squares of
relative errors with non-negative coefficients on what the arithmetic says:

* a constant: what a pass costs whatever its size (calls of the framework);
* tokens: positions that pass through the layers, times rows (projections and MLP);
* scores: positions x keys, times rows (attention);
* logits: rows of the output head x vocabulary;
* vocabulary: reading the head's weights (rollouts), writing the gradient of head and embedding.

For each size the growth between neighbouring points is compared with that of the operations
(monitor/flops.py); what grows faster than they do is flagged.

    python -m benchmarks.sweep --out runs/benchmark/sweep.json --figure runs/benchmark/sweep.png
"""

import argparse
import itertools
import json
import math
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.measure import keep_freed_memory, machine, print_table
from benchmarks.models import Shape
from benchmarks.workloads import Workload, our_rollout, our_update
from megatron_espo.config import EspoConfig, RolloutConfig
from megatron_espo.generation.remasking import commit_counts
from megatron_espo.monitor.flops import ModelDimensions, elbo_flops, forward_flops

Kind = Literal["exact", "dual cache", "update"]
TERMS = ("constant", "tokens", "scores", "logits", "vocabulary")
NUM_MC = 1
# A growth exponent this much above the operations' is flagged; repeats differ by less.
TOLERANCE = 0.2


@dataclass(frozen=True)
class Point:
    """A measured size; the defaults are what is not varied.

    Attributes:
        kind: rollouts without or with the dual cache, or updates.
        batch: completions at once.
        prompt: prompt length.
        completion: completion length.
        block: block length.
        steps_per_block: denoising steps of a block.
        vocabulary: tokens.
        hidden: width of the model.
        layers: depth of the model.
    """

    kind: Kind
    batch: int = 2
    prompt: int = 128
    completion: int = 64
    block: int = 32
    steps_per_block: int = 8
    vocabulary: int = 16384
    hidden: int = 256
    layers: int = 4

    @property
    def positions(self) -> int:
        """Width of a row."""
        return self.prompt + self.completion

    @property
    def shape(self) -> Shape:
        """The model."""
        return Shape(self.vocabulary, self.hidden, self.layers, self.vocabulary - 1)

    @property
    def evaluations(self) -> int:
        """Model evaluations of a rollout."""
        return self.completion // self.block * self.steps_per_block

    def passes(self) -> list[tuple[float, int, int]]:
        """List the passes of an evaluation, on average: share, positions, keys."""
        if self.kind == "dual cache":
            # A block's first evaluation fills the cache, the others pass the block alone.
            full = 1 / self.steps_per_block
            return [(full, self.positions, self.positions), (1 - full, self.block, self.positions)]
        return [(1.0, self.positions, self.positions)]

    def head_rows(self) -> float:
        """Rows of the output head per evaluation (rollouts) or per batch (updates)."""
        if self.kind == "update":
            return self.batch * NUM_MC * self.completion
        counts = commit_counts(self.block, self.steps_per_block)
        left = [self.block - sum(counts[:step]) for step in range(self.steps_per_block)]
        return self.batch * sum(left) / len(left)

    def terms(self) -> list[float]:
        """Evaluate the terms of the fit, in the order of TERMS."""
        rows = self.batch * (2 * NUM_MC if self.kind == "update" else 1)
        tokens = rows * sum(share * positions for share, positions, _ in self.passes())
        scores = rows * sum(share * positions * keys for share, positions, keys in self.passes())
        return [1.0, tokens, scores, self.head_rows() * self.vocabulary, float(self.vocabulary)]

    def flops(self) -> float:
        """Count the operations of an evaluation or of an update."""
        model = ModelDimensions(
            num_layers=self.layers,
            hidden_size=self.hidden,
            ffn_hidden_size=3 * self.hidden,
            num_attention_heads=self.shape.num_heads,
            num_query_groups=self.shape.num_heads,
            head_dim=64,
            vocab_size=self.vocabulary,
        )
        if self.kind == "update":
            espo = EspoConfig(num_mc=NUM_MC)
            return 3 * elbo_flops(model, self.batch, self.positions, self.completion, espo)
        return self.head_rows() * 2 * self.hidden * self.vocabulary + sum(
            share * forward_flops(model, self.batch, positions, 0, keys)
            for share, positions, keys in self.passes()
        )


SWEEPS: dict[str, Sequence[int]] = {
    "prompt": (128, 256, 512, 1024, 2048),
    "completion": (32, 64, 128, 256),
    "block": (8, 16, 32, 64, 128),
    "batch": (1, 2, 4, 8, 16),
    "vocabulary": (4096, 16384, 65536, 126464),
}


def points(kinds: Sequence[Kind], sweeps: dict[str, Sequence[int]]) -> dict[str, list[Point]]:
    """List the points of every sweep.

    Args:
        kinds: what to measure.
        sweeps: values by size.

    Returns:
        Points by size, each kind's in increasing order; updates have no block.
    """
    result: dict[str, list[Point]] = {}
    for size, values in sweeps.items():
        result[size] = []
        for kind in kinds:
            if size == "block" and kind == "update":
                continue
            base = Point(kind)
            if size == "block":
                base = replace(base, completion=max(values))
            result[size] += [replace(base, **{size: value}) for value in values]  # type: ignore[arg-type]
    return result


def measure(all_points: Sequence[Point], repeats: int, threads: int) -> dict[Point, float]:
    """Measure points; each vocabulary's model lives in a process of its own.

    Args:
        all_points: what to measure.
        repeats: runs of each point, round by round.
        threads: CPU threads.

    Returns:
        Median seconds of a model evaluation (rollouts) or of an update.
    """
    result: dict[Point, float] = {}
    context = multiprocessing.get_context("spawn")
    for vocabulary in sorted({point.vocabulary for point in all_points}):
        mine = [point for point in dict.fromkeys(all_points) if point.vocabulary == vocabulary]
        with context.Pool(1) as pool:
            seconds = pool.apply(_measure, (mine, repeats, threads))
        result |= dict(zip(mine, seconds, strict=True))
    return result


def _measure(mine: Sequence[Point], repeats: int, threads: int) -> list[float]:
    torch.set_num_threads(threads)
    model = Workload(mine[0].shape).build()
    seconds: list[list[float]] = [[] for _ in mine]
    for number in range(repeats + 1):
        for point, times in zip(mine, seconds, strict=True):
            # One block is as good as all: its cost depends on the row's width alone.
            rollout = RolloutConfig(
                completion_length=point.completion,
                block_length=point.block,
                denoising_steps=point.evaluations,
                temperature=0.0,
                micro_batch_size=point.batch,
            )
            if point.kind == "dual cache":
                rollout = replace(rollout, cache="dual")
            work = Workload(
                point.shape, point.batch, point.prompt, rollout, point.batch, num_mc=NUM_MC
            )
            start = time.perf_counter()
            if point.kind == "update":
                our_update(model, work, "joint", sequences_per_batch=point.batch)
            else:
                our_rollout(model, work, rollout)
            each = 1 if point.kind == "update" else point.evaluations
            if number:
                times.append((time.perf_counter() - start) / each)
    return [median(times) for times in seconds]


def fit(measured: dict[Point, float]) -> NDArray[np.float64]:
    """Fit the terms to measured seconds, relative errors squared, no negative coefficient.

    Args:
        measured: seconds by point.

    Returns:
        float64 ``[terms]``: seconds per unit of each term.
    """
    seconds = np.array(list(measured.values()))
    matrix = np.array([point.terms() for point in measured]) / seconds[:, None]
    scale = matrix.max(axis=0)
    kept = list(range(len(TERMS)))
    while True:
        solution = np.linalg.lstsq(matrix[:, kept] / scale[kept], np.ones(len(seconds)), None)[0]
        if (solution >= 0).all():
            break
        kept.pop(int(solution.argmin()))
    coefficients = np.zeros(len(TERMS))
    coefficients[kept] = solution / scale[kept]
    return coefficients


def growth(sweep: Sequence[Point], size: str, measured: dict[Point, float]) -> list[dict[str, Any]]:
    """Compare the growth of time between neighbouring points with that of the operations.

    Args:
        sweep: points of one kind in increasing order.
        size: what grows.
        measured: seconds by point.

    Returns:
        Per pair of neighbours: from, to, exponent of the time, exponent of the operations (the
        power of the size that both follow), and whether the time grows faster.
    """
    steps = []
    for a, b in itertools.pairwise(sweep):
        log = math.log(getattr(b, size) / getattr(a, size))
        ours = math.log(measured[b] / measured[a]) / log
        theirs = math.log(b.flops() / a.flops()) / log
        steps.append(
            {
                "from": getattr(a, size),
                "to": getattr(b, size),
                "time": ours,
                "operations": theirs,
                "faster": ours > theirs + TOLERANCE,
            }
        )
    return steps


def report(
    sweeps: dict[str, list[Point]], measured: dict[Point, float], kinds: Sequence[Kind]
) -> dict[str, Any]:
    """Fit, compare and print.

    Args:
        sweeps: points by size.
        measured: seconds by point.
        kinds: what was measured.

    Returns:
        What is printed, as a structure for JSON.
    """
    result: dict[str, Any] = {"fits": {}, "points": [], "growth": []}
    for kind in kinds:
        mine = {point: s for point, s in measured.items() if point.kind == kind}
        coefficients = fit(mine)
        fitted = {point: float(np.dot(coefficients, point.terms())) for point in mine}
        worst = max(abs(fitted[p] / s - 1) for p, s in mine.items())
        typical = median(abs(fitted[p] / s - 1) for p, s in mine.items())
        unit = "update" if kind == "update" else "evaluation"
        print(f"\n{kind}: seconds per {unit} = ", end="")
        print(
            " + ".join(
                f"{c:.3g}" + ("" if name == "constant" else f" {name}")
                for name, c in zip(TERMS, coefficients, strict=True)
                if c
            )
        )
        print(f"fitted to {typical:.1%} of a point on average, {worst:.1%} at worst")
        result["fits"][kind] = {
            "coefficients": dict(zip(TERMS, coefficients.tolist(), strict=True)),
            "typical error": typical,
            "largest error": worst,
        }
        rows = []
        for size, sweep in sweeps.items():
            line = [point for point in sweep if point.kind == kind]
            steps = growth(line, size, measured) if line else []
            result["growth"] += [{"kind": kind, "size": size, **step} for step in steps]
            for index, point in enumerate(line):
                shares = coefficients * point.terms() / fitted[point]
                entry = {"size": size, **asdict(point), "seconds": measured[point]}
                entry["fitted"] = fitted[point]
                result["points"].append(entry)
                step = steps[index - 1] if index else None
                rows.append(
                    [
                        f"{size} {getattr(point, size)}",
                        f"{1e3 * measured[point]:.2f}",
                        f"{1e3 * fitted[point]:.2f}",
                        *[f"{100 * share:.0f}%" for share in shares],
                        f"{point.flops() / measured[point] / 1e9:.0f}",
                        "" if step is None else f"{step['time']:.2f}",
                        "" if step is None else f"{step['operations']:.2f}",
                        "" if step is None or not step["faster"] else "FASTER",
                    ]
                )
        header = ["", "ms", "fitted", *TERMS, "GFLOP/s", "exponent", "operations", ""]
        print_table(header, rows)
    flagged = [step for step in result["growth"] if step["faster"]]
    print(f"\ngrows faster than the operations by more than a power of {TOLERANCE}: ", end="")
    print(flagged or "nothing")
    return result


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw measured points and fitted curves.

    Args:
        result: of :func:`report`.
        path: PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = list(dict.fromkeys(entry["size"] for entry in result["points"]))
    figure, axes = pyplot.subplots(1, len(sizes), figsize=(3.0 * len(sizes), 3.1), dpi=110)
    colors = {"exact": "C0", "dual cache": "C2", "update": "C1"}
    for axis, size in zip(np.atleast_1d(axes), sizes, strict=True):
        for kind, color in colors.items():
            line = [e for e in result["points"] if e["size"] == size and e["kind"] == kind]
            x = [entry[size] for entry in line]
            axis.plot(x, [1e3 * entry["seconds"] for entry in line], "o", color=color, ms=4)
            axis.plot(x, [1e3 * entry["fitted"] for entry in line], color=color, lw=1, label=kind)
        axis.set(xscale="log", yscale="log", xlabel=_LABELS[size])
        axis.set_xticks(x := sorted({e[size] for e in result["points"] if e["size"] == size}))
        axis.set_xticklabels([f"{v // 1000}k" if v >= 4096 else str(v) for v in x])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    first = np.atleast_1d(axes)[0]
    first.set_ylabel("ms per model evaluation\nor per update")
    first.legend(fontsize=8)
    figure.suptitle("Measured (points) and fitted (lines)", fontsize=10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


_LABELS = {
    "prompt": "prompt length",
    "completion": "completion length",
    "block": "block length",
    "batch": "completions at once",
    "vocabulary": "vocabulary",
}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Sweep from the command line.

    Args:
        argv: flags; those of the process if None.

    Returns:
        What was measured.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--sizes", nargs="+", choices=SWEEPS, default=list(SWEEPS), help="what to vary")
    add("--most", type=int, help="leave out larger values (vocabularies apart)")
    add("--repeats", type=int, default=3, help="runs of each point (default: 3)")
    add("--threads", type=int, default=2, help="CPU threads (default: 2)")
    add("--default-allocator", action="store_true", help="see measure.keep_freed_memory")
    add("--out", type=Path, help="JSON to write")
    add("--figure", type=Path, help="PNG to write")
    options = parser.parse_args(argv)
    if argv is None and not options.default_allocator:
        keep_freed_memory()
    kinds: list[Kind] = ["exact", "dual cache", "update"]
    chosen: dict[str, Sequence[int]] = {
        size: [v for v in SWEEPS[size] if size == "vocabulary" or v <= (options.most or v)]
        for size in options.sizes
    }
    sweeps = points(kinds, chosen)
    torch.set_num_threads(options.threads)
    measured = measure(
        [p for line in sweeps.values() for p in line], options.repeats, options.threads
    )
    result = {"machine": machine(), **report(sweeps, measured, kinds)}
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    if options.figure is not None:
        draw(result, options.figure)
    return result


if __name__ == "__main__":
    main()
