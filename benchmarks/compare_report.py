"""The table and the picture of a comparison of objectives (benchmarks.compare)."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from benchmarks.compare_bases import check_bases
from megatron_espo.errors import UserError

_BEGIN, _END = "<!-- compare {task}: begin -->", "<!-- compare {task}: end -->"
# Student's t at 97.5% for 1 to 9 degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def by_objective(results: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Group results, ordered by seed."""
    grouped: dict[str, list[dict[str, Any]]] = {}
    for result in sorted(results, key=lambda r: int(r["run"]["seed"])):
        grouped.setdefault(result["run"]["objective"], []).append(result)
    return grouped


def paired_interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """Mean difference of runs of equal seeds and half its 95% interval; None below two."""
    n = len(differences)
    if n < 2:
        return None
    return fmean(differences), _T[n - 2] * stdev(differences) / math.sqrt(n)


def table(results: Sequence[dict[str, Any]]) -> list[str]:
    """Write the comparison as Markdown lines.

    Raises:
        UserError: runs of one seed started from different bases.
    """
    check_bases(results)
    grouped = by_objective(results)
    espo = {r["run"]["seed"]: r["test"][-1] for r in grouped.get("espo", [])}
    lines = [
        "| objective | rate | seeds | before | after | less ESPO, paired, 95% | views | passes | "
        "seconds of a run |",
        "|---" * 9 + "|",
    ]
    for name, runs in grouped.items():
        differences = [
            100 * (r["test"][-1] - espo[r["run"]["seed"]]) for r in runs if r["run"]["seed"] in espo
        ]
        interval = None if name == "espo" else paired_interval(differences)
        less = "" if interval is None else f"{interval[0]:+.1f} ± {interval[1]:.1f}"
        before, after = (100 * fmean(r["test"][i] for r in runs) for i in (0, -1))
        lines.append(
            f"| {name} | {runs[0]['run']['rate']:g} | {len(runs)} | {before:.1f}% | "
            f"**{after:.1f}%** | {less} | {runs[0]['views']} | {runs[0]['passes']:.1f} | "
            f"{fmean(r['seconds']['all'] for r in runs):.0f} |"
        )
    return lines


def write_table(path: Path, task: str, results: Sequence[dict[str, Any]]) -> None:
    """Put the table between the marks of a Markdown file.

    Raises:
        UserError: it has none.
    """
    text, begin, end = path.read_text(), _BEGIN.format(task=task), _END.format(task=task)
    if begin not in text or end not in text:
        raise UserError(f"--table {path}: has no lines {begin} and {end}.")
    before, after = text.split(begin)[0], text.split(end)[1]
    path.write_text(before + "\n".join([begin, *table(results), end]) + after)


def write_figure(path: Path, results: Sequence[dict[str, Any]]) -> None:
    """Draw the mean reward of sampled completions over the rollouts, a mean over seeds."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for number, (name, runs) in enumerate(by_objective(results).items()):
        curves = zip(*(run["reward"] for run in runs), strict=True)
        line = ("-", "--", ":")[number % 3]
        axes.plot([fmean(values) for values in curves], line, label=name)
    axes.set(xlabel="rollout", ylabel="mean reward of sampled completions")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
