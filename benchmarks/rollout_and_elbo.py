"""Times rollouts and ESPO's ELBO updates against a straightforward implementation.

Both sides hold the same weights, complete the same prompts, use the same threads and float32, and
run in one process, interleaved; greedy tokens, ELBOs and gradients must agree before anything is
reported. Prints ratios with their range, tokens per second, model evaluations, and the peak memory
of each side, measured in fresh processes.

    python -m benchmarks.rollout_and_elbo --out runs/benchmark.json
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.utils import unwrap_model

from benchmarks import workloads
from benchmarks.measure import (
    MIB,
    as_json,
    interleaved,
    keep_freed_memory,
    largest_difference,
    machine,
    peak_memory,
    print_table,
    ratios,
    spread,
)
from benchmarks.models import SHAPES, llama_oracle, llama_weights
from benchmarks.workloads import Workload
from megatron_espo.config import RolloutConfig
from megatron_espo.model.handle import DiffusionModel

Report = dict[str, dict[str, Any]]

BASELINE = "straightforward"
# Relative to the largest entry; two orders of adding in float32.
TOLERANCE = 1e-4


def rollout_variants(work: Workload) -> dict[str, RolloutConfig]:
    """Choose how this project samples: exactly, with the caches, and with parallel decoding."""
    config = work.rollout
    cached, confident = {"cache": "dual"}, {"threshold": 0.9}
    settings: dict[str, dict[str, Any]] = {
        "exact": {},
        "prefix cache": {"cache": "prefix"},
        "dual cache": cached,
        "threshold 0.9": confident,
        "dual cache, threshold 0.9": {**cached, **confident},
        "dual cache, threshold 0.9, unsure too": {**cached, **confident, "cache_unsure": "commit"},
    }
    chosen = work.sides or [
        name
        for name, each in settings.items()
        # Random weights are confident of nothing.
        if "threshold" not in each or work.trained is not None or work.head_scale != 1.0
    ]
    return {name: replace(config, **settings[name]) for name in chosen}


def measure_rollouts(model: DiffusionModel, llama: Any, work: Workload, pairs: int) -> Report:
    """Compare the speed of rollouts.

    Args:
        model: this project's model.
        llama: the same weights.
        work: sizes.
        pairs: rounds of interleaved runs.

    Returns:
        The report of each side.

    Raises:
        AssertionError: the exact greedy tokens differ.
    """
    temperature = work.rollout.temperature
    variants = rollout_variants(work)
    sides: dict[str, Callable[[], Any]] = {
        BASELINE: partial(workloads.their_rollout, llama, work, temperature)
    }
    sides |= {
        name: partial(workloads.our_rollout, model, work, config)
        for name, config in variants.items()
    }
    seconds, results = interleaved(sides, pairs)
    exact = results["exact"].completions
    # Sampled tokens come from other random numbers on each side.
    assert temperature > 0.0 or torch.equal(exact, results[BASELINE]), "greedy tokens differ"
    report = {BASELINE: _row(seconds, BASELINE, work)}
    report[BASELINE]["model evaluations"] = work.rollout.denoising_steps
    for name, config in variants.items():
        result = results[name]
        report[name] = {
            **_row(seconds, name, work),
            "model evaluations": float(result.num_evaluations.float().mean()),
            "tokens per evaluation": float(result.tokens_per_step.mean()),
            "mean confidence": float(result.mean_confidence.mean()),
            "equal tokens": float((result.completions == exact).float().mean()),
        }
        if work.trained is not None:
            report[name]["reward"] = workloads.held_out_reward(model, work, config)
    return report


def rollout_memory(work: Workload) -> dict[str, int]:
    """Measure the peak memory of each side's rollouts in bytes."""
    memory = {BASELINE: peak_memory(workloads.prepare_their_rollout, work)}
    for name, config in rollout_variants(work).items():
        memory[name] = peak_memory(workloads.prepare_our_rollout, work, config)
    return memory


def _row(seconds: dict[str, list[float]], name: str, work: Workload) -> dict[str, Any]:
    tokens = work.rows * work.rollout.completion_length
    return {
        "seconds": spread(seconds[name]),
        "times as fast": ratios(seconds[BASELINE], seconds[name]),
        "tokens per second": tokens / spread(seconds[name]).median,
    }


# Whether the straightforward side runs the model once per mask.
THEIR_UPDATES = {BASELINE: False, "one pass per mask": True}
IN_CHUNKS = "default, head in chunks"


def our_updates(head_chunk: int) -> dict[str, tuple[str, int | None]]:
    """Name --espo-gradient and --head-chunk of this project's updates; the first is the default."""
    return {
        "default": ("auto", None),
        "two-pass": ("two_pass", None),
        IN_CHUNKS: ("auto", head_chunk),
    }


def measure_updates(
    model: DiffusionModel, llama: Any, work: Workload, pairs: int, head_chunk: int
) -> Report:
    """Compare the speed of the forward and backward pass of an ESPO update.

    Args:
        model: this project's model.
        llama: the same weights.
        work: sizes.
        pairs: rounds of interleaved runs.
        head_chunk: rows of the head at a time, of the update in chunks.

    Returns:
        The report of each side.

    Raises:
        AssertionError: ELBOs or gradients differ.
    """
    sides: dict[str, Callable[[], Any]] = {
        name: partial(workloads.their_update, llama, work, each)
        for name, each in THEIR_UPDATES.items()
    }
    sides |= {
        name: partial(workloads.our_update, model, work, *settings)
        for name, settings in our_updates(head_chunk).items()
    }
    (chunk,) = unwrap_model(list(model.chunks))
    expected = sides[BASELINE]()
    reference = {name: p.grad.clone() for name, p in llama.named_parameters()}
    differences = {}
    for name in our_updates(head_chunk):
        elbo = sides[name]()
        buffers = {n: p.main_grad for n, p in chunk.named_parameters()}
        gradients = llama_weights(model, work.shape, buffers)
        differences[name] = {
            "ELBO": largest_difference(elbo, expected),
            "gradient": max(largest_difference(gradients[n], g) for n, g in reference.items()),
        }
        assert max(differences[name].values()) < TOLERANCE, (name, differences[name])
    del reference, gradients, buffers
    seconds, _ = interleaved(sides, pairs)
    operations = workloads.update_flops(work)
    report: Report = {}
    for name in sides:
        report[name] = {
            "seconds": spread(seconds[name]),
            "times as fast": ratios(seconds[BASELINE], seconds[name]),
            "sequences per second": work.sequences / spread(seconds[name]).median,
        }
        if name in differences:
            report[name]["largest difference"] = differences[name]
        if name == "default":
            report[name]["operations allow"] = operations[False] / operations[True]
    return report


def update_memory(work: Workload, head_chunk: int) -> dict[str, int]:
    """Measure the peak memory of each side's updates in bytes."""
    theirs = {
        name: peak_memory(workloads.prepare_their_update, work, each)
        for name, each in THEIR_UPDATES.items()
    }
    return theirs | {
        name: peak_memory(workloads.prepare_our_update, work, *settings)
        for name, settings in our_updates(head_chunk).items()
    }


def print_report(title: str, report: Report) -> None:
    """Print the table of one comparison; columns that no side has are left out.

    Args:
        title: stands above it.
        report: by side.
    """
    base = report[BASELINE].get("peak memory", 0)
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "seconds": lambda row: str(row["seconds"]),
        "times as fast": lambda row: str(row["times as fast"]),
        "operations allow": lambda row: f"{row['operations allow']:.2f}",
        "tokens/s": lambda row: f"{row['tokens per second']:.1f}",
        "sequences/s": lambda row: f"{row['sequences per second']:.2f}",
        "evaluations": lambda row: f"{row['model evaluations']:g}",
        "tokens/evaluation": lambda row: f"{row['tokens per evaluation']:.2f}",
        "confidence": lambda row: f"{row['mean confidence']:.3f}",
        "equal tokens": lambda row: f"{row['equal tokens']:.3f}",
        "reward": lambda row: f"{row['reward']:.4f}",
        "peak memory": lambda row: f"{row['peak memory'] / MIB:.0f} MiB",
        "share": lambda row: f"1/{base / row['peak memory']:.1f}",
    }
    header, cells = [""], [[name] for name in report]
    for title_of_column, write in columns.items():
        texts = []
        for row in report.values():
            try:
                texts.append(write(row))
            except KeyError:
                texts.append("")
        if any(texts):
            header.append(title_of_column)
            for line, text in zip(cells, texts, strict=True):
                line.append(text)
    print(f"\n{title}")
    print_table(header, cells)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure from the command line.

    Args:
        argv: flags; those of the process if None.

    Returns:
        What was measured.
    """
    default = Workload(SHAPES["smoke"])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Help)
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="large-vocabulary", help="the model")
    add(
        "--trained", help="--save folder of a trained model of that shape, see benchmarks.confident"
    )
    add("--head-scale", type=float, default=1.0, help="factor on the head, for peaked softmaxes")
    add("--only", choices=("rollout", "update"), help="measure one part")
    add("--sides", nargs="+", default=(), help="of this project's rollouts; exact among them")
    add("--held-out", type=int, default=default.held_out, help="prompts for the reward")
    add("--pairs", type=int, default=5, help="interleaved rounds")
    add("--threads", type=int, default=2, help="of either side")
    workloads.add_sizes(add)
    add("--sequences", type=int, default=default.sequences, help="completions of an update")
    add("--denoising-steps", type=int, default=default.rollout.denoising_steps)
    add("--temperature", type=float, default=0.0, help="of the rollouts")
    add("--head-chunk", type=int, default=128, help="rows of the update whose head is in chunks")
    add("--no-memory", action="store_true", help="leave out the memory of fresh processes")
    add("--only-memory", action="store_true", help="leave out times; may run beside other work")
    add("--default-allocator", action="store_true", help="see measure.keep_freed_memory")
    add("--out", type=Path, help="JSON to write")
    options = parser.parse_args(argv)
    if argv is None and not options.default_allocator:
        keep_freed_memory()
    torch.set_num_threads(options.threads)
    work = replace(
        default,
        shape=SHAPES[options.shape],
        sequences=options.sequences,
        trained=options.trained,
        head_scale=options.head_scale,
        sides=tuple(options.sides),
        held_out=options.held_out,
    )
    work = workloads.sized(work, options, options.temperature)
    rollout = work.rollout
    report: dict[str, Any] = {"machine": machine(), "work": asdict(work)}
    print(json.dumps(report["machine"]))
    if not options.only_memory:
        model = work.build()
        llama = llama_oracle(model, work.shape)
    sizes = (
        f"{options.shape}, prompt {work.prompt_length}, completion {rollout.completion_length}, "
        f"block {rollout.block_length}"
    )
    for part, title, measure, memory in (
        (
            "rollout",
            f"{work.rows} rows, {rollout.denoising_steps} steps",
            measure_rollouts,
            rollout_memory,
        ),
        (
            "update",
            f"{work.sequences} sequences, {work.num_mc} coupled draws",
            partial(measure_updates, head_chunk=options.head_chunk),
            partial(update_memory, head_chunk=options.head_chunk),
        ),
    ):
        if options.only not in (None, part) or (part == "update" and work.trained is not None):
            continue
        found: Report = {}
        if not options.only_memory:
            found = measure(model, llama, work, options.pairs)
        if not options.no_memory:
            for name, peak in memory(work).items():
                found.setdefault(name, {})["peak memory"] = peak
        report[part] = found
        print_report(f"{part.capitalize()}: {sizes}, {title}", found)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1, default=as_json) + "\n")
    return report


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults and keeps the lines of the description."""


if __name__ == "__main__":
    main()
