r"""Times this project beside other people's released code, on one folder of weights.

Their code comes from checkouts of theirs and runs as a process in an environment of its own, which
keeps its model; nothing of it is here. Both sides read the weights that this project's converter
wrote, in float32, with the same threads. Tokens must be equal, and ELBOs and gradients up to
rounding, before anything is timed; then the two take turns, round by round.

    python -m benchmarks.peers --peer-python ../peers/venv/bin/python \
        --fast-dllm ../peers/Fast-dLLM --llada ../peers/LLaDA --espo ../peers/ESPO \
        --shape large-vocabulary small-vocabulary tiny --out runs/benchmark/peers.json

Random weights are confident of nothing: what has a threshold is measured on a trained model
(benchmarks.confident), and left out where there is none.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import as_json, keep_freed_memory, machine, print_table
from benchmarks.models import SHAPES
from benchmarks.peer_compare import Case, compare_rollouts, compare_updates
from benchmarks.peer_link import Peer, check_checkouts, export, save_random
from benchmarks.workloads import Workload, add_sizes, sized
from megatron_espo.errors import UserError
from megatron_espo.model.handle import DiffusionModel
from megatron_espo.startup.setup import start_anew

UPDATE = "ESPO update"


def rollout_cases(threshold: float) -> list[Case]:
    """List what is compared; the settings of each are those of both sides."""
    confident = {"threshold": threshold}
    unsure = {**confident, "cache_unsure": "commit"}
    after = f", threshold {threshold:g}"
    return [
        Case("LLaDA generate()", "llada"),
        Case("Fast-dLLM, prefix cache", "fast-dllm", {"cache": "prefix"}),
        Case("Fast-dLLM, dual cache", "fast-dllm", {"cache": "dual"}),
        Case(f"Fast-dLLM{after}", "fast-dllm", confident),
        Case(f"Fast-dLLM, prefix cache{after}", "fast-dllm", {"cache": "prefix", **unsure}),
        Case(f"Fast-dLLM, dual cache{after}", "fast-dllm", {"cache": "dual", **unsure}),
    ]


def measure(work: Workload, options: argparse.Namespace, checkouts: dict[str, str]) -> Any:
    """Compare everything that a model's weights allow.

    Args:
        work: sizes, with random weights or a trained model.
        options: of the command line.
        checkouts: folders by the names of their flags.

    Returns:
        The rows of the report by name, and the versions of the other side.
    """
    weights = "random" if work.trained is None else "trained"
    rows: dict[str, dict[str, Any]] = {}
    chosen = [
        case
        for case in rollout_cases(options.threshold)
        if case.code in checkouts
        and options.only in (None, "rollout")
        and ("threshold" in case.settings) == (work.trained is not None)
    ]
    # Models that are loaded for sampling have no buffers for gradients.
    updates = "espo" in checkouts and options.only in (None, "update") and work.trained is None
    if not chosen and not updates:
        return rows, {}
    with tempfile.TemporaryDirectory() as name, both_sides(work, options, checkouts, name) as sides:
        peer, model = sides
        for case in chosen:
            rows[case.name] = compare_rollouts(peer, model, work, case, options.pairs)
        if updates:
            rows[UPDATE] = compare_updates(peer, model, work, options.pairs, Path(name))
        return {name: {"weights": weights, **row} for name, row in rows.items()}, peer.versions


@contextmanager
def both_sides(
    work: Workload, options: argparse.Namespace, checkouts: dict[str, str], folder: str
) -> Iterator[tuple[Peer, DiffusionModel]]:
    """Load one set of weights on both sides, theirs from the folder that the converter writes."""
    start_anew()  # after the model before
    model = work.build()
    if work.trained is None:
        checkpoint = save_random(model, work.shape.mask_token_id, Path(folder))
    else:
        checkpoint = Path(work.trained)
    published = Path(folder) / "llada"
    export(checkpoint, published)
    log = Path(folder) / "peer.log"
    with Peer(options.peer_python, published, checkouts, options.threads, log) as peer:
        yield peer, model


def print_report(title: str, report: dict[str, dict[str, Any]]) -> None:
    """Print the Markdown table of a shape.

    Args:
        title: stands above it.
        report: rows by name.
    """
    print(f"\n{title}\n")
    header = ["", "weights", "their seconds", "our seconds", "times as fast"]
    header += ["tokens/s, theirs and ours", "evaluations, theirs and ours"]
    print_table(
        header,
        [
            [
                name,
                row["weights"],
                *(str(row[column]) for column in header[2:5]),
                " ".join(f"{value:.1f}" for value in row["tokens per second"]),
                " ".join(f"{value:g}" for value in row["evaluations"]),
            ]
            for name, row in report.items()
        ],
    )


def measure_shape(
    name: str, options: argparse.Namespace, checkouts: dict[str, str]
) -> dict[str, Any]:
    """Compare on one shape, with random weights and with a trained model if there is one.

    Args:
        name: of the shape.
        options: of the command line.
        checkouts: folders by the names of their flags.

    Returns:
        The report.
    """
    work = sized(Workload(SHAPES[name]), options)
    works = [work]
    trained = Path(options.trained) / name / "checkpoint"
    if (trained / "latest_checkpointed_iteration.txt").is_file():
        works.append(replace(work, trained=str(trained)))
    else:
        print(f"{trained}: no trained model, so nothing with a threshold (benchmarks.confident).")
    report: dict[str, Any] = {"work": asdict(work), "cases": {}}
    for each in works:
        rows, versions = measure(each, options, checkouts)
        report["cases"] |= rows
        report["peer"] = report.get("peer") or versions
    rollout = work.rollout
    print_report(
        f"{name}: {work.rows} rows, prompt {work.prompt_length}, completion "
        f"{rollout.completion_length}, block {rollout.block_length}, {rollout.denoising_steps} "
        f"steps; update of {work.sequences} sequences, {work.num_mc} coupled draws; "
        f"{options.threads} threads",
        report["cases"],
    )
    return report


def main(argv: Sequence[str] | None = None) -> None:
    """Measure from the command line.

    Args:
        argv: flags; those of the process if None.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--peer-python", required=True, help="of their environment: torch and transformers 4")
    add("--fast-dllm", required=True, help="checkout of NVlabs/Fast-dLLM; loads the model, too")
    add("--llada", help="checkout of ML-GSAI/LLaDA")
    add("--espo", help="checkout of ML-GSAI/ESPO")
    add("--shape", nargs="+", choices=SHAPES, default=["large-vocabulary", "small-vocabulary"])
    add(
        "--trained", default="runs/benchmark", help="folder with SHAPE/checkpoint of trained models"
    )
    add("--only", choices=("rollout", "update"), help="measure one part")
    add("--threshold", type=float, default=0.9, help="of parallel decoding")
    add("--pairs", type=int, default=5, help="rounds")
    add("--threads", type=int, default=2, help="of either side")
    add_sizes(add)
    add("--denoising-steps", type=int, default=128, help="without a threshold")
    add("--out", type=Path, help="JSON to write")
    options = parser.parse_args(argv)
    given = {"fast-dllm": options.fast_dllm, "llada": options.llada, "espo": options.espo}
    checkouts = {name: folder for name, folder in given.items() if folder is not None}
    try:
        commits = check_checkouts(checkouts)
        if argv is None:
            keep_freed_memory()
        torch.set_num_threads(options.threads)
        report = {"machine": machine(), "commits": commits}
        print(json.dumps(report))
        for name in options.shape:
            report[name] = measure_shape(name, options, checkouts)
            if options.out is not None:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(report, indent=1, default=as_json) + "\n")
    except UserError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
