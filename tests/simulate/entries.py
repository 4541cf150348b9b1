"""Plans every entry point at its smallest, simulates all of them, and prints what was found.

    python entries.py FOLDER

A process of its own, in which nothing is simulated: it plans as `--dry-run --simulate` does, and
starts the simulating process, once for all.
"""

import dataclasses
import io
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from megatron_espo.commands import evaluate as evaluation
from megatron_espo.commands import generate, launch
from megatron_espo.dry_run import simulation
from megatron_espo.dry_run.compare import find_mismatch
from megatron_espo.dry_run.job import Job
from megatron_espo.dry_run.record import Rank
from megatron_espo.training import espo, pretrain

EXAMPLES = Path(__file__).parents[2] / "examples"
WIDTH = "--num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4".split()
MODEL = ["--preset", "llada_8b", *WIDTH]
OVERLAPS = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
ESPO = (
    "--seq-length 96 --rollout-completion-length 32 --rollout-block-length 8 "
    "--rollout-denoising-steps 16 --rollout-early-stop --espo-prompts-per-rollout 4"
).split()
PIPELINE = "--pipeline-model-parallel-size 2 --tensor-model-parallel-size 1".split()
CONTEXT = "--context-parallel-size 2 --tensor-model-parallel-size 1".split()
BLOCKS = "--attention-mask block-causal --block-size 8".split()
EXPERTS = (
    "--recipe llada2_mini --recipe gsm8k --num-query-groups 2 --num-layers 3 --num-experts 16 "
    "--moe-layer-freq [0]+[1]*2 --moe-ffn-hidden-size 32 --moe-shared-expert-intermediate-size 32 "
    "--moe-router-topk 4 --moe-router-num-groups 4 --moe-router-group-topk 2 --kv-channels 16 "
    "--expert-model-parallel-size 2"
).split()
LOOP = "--seq-length 64 --micro-batch-size 2 --global-batch-size 64".split()
EVALUATION = (
    "--load checkpoints/llada-8b --bf16 --tensor-model-parallel-size 2 --sequence-parallel "
    "--espo-task countdown --espo-eval-data none.jsonl --eval-lengths 32 --rollout-block-length 8 "
    "--seq-length 96 --espo-eval-samples 16"
).split()
GENERATION = (
    "--load checkpoints/llada-8b --bf16 --rollout-completion-length 32 "
    "--rollout-block-length 8 --rollout-denoising-steps 16 --tokenizer-model none"
).split()
LORA = "--lora-rank 4 --fp8-format hybrid --rollout-top-p 0.9".split()
# Two ranks at a time; the flag that compares all ranks stands last.
COMPARE = (
    "--dry-run --simulate --simulate-processes 2 --dry-run-world-size 4 --simulate-compare"
).split()
TWO = ["--dry-run-world-size", "2"]
# What is started, with which flags.
STARTED = {
    "espo": ("run_espo_8b.sh", ["--recipe", "countdown", *WIDTH, *ESPO, *PIPELINE, *COMPARE]),
    "espo, cp": ("run_espo_8b.sh", ["--recipe", "countdown", *WIDTH, *ESPO, *CONTEXT, *COMPARE]),
    "espo, dual cache": (
        "run_espo_8b.sh",
        ["--recipe", "gsm8k", *WIDTH, *ESPO, "--rollout-cache", "dual", *COMPARE, *TWO],
    ),
    "espo, fp8": (
        "run_espo_8b.sh",
        ["--recipe", "countdown", *WIDTH, *ESPO, "--fp8-format", "hybrid", *COMPARE[:-1]],
    ),
    "espo, lora": (
        "run_espo_8b.sh",
        ["--recipe", "countdown", "--recipe", "lora_dream", *WIDTH, *ESPO, *LORA, *COMPARE],
    ),
    "espo, one gpu": (
        "run_espo_8b.sh",
        ["--recipe", "lora_80gb", *WIDTH, *ESPO, *COMPARE[:4], "--dry-run-world-size", "1"],
    ),
    "espo, blocks": (
        "run_espo_8b.sh",
        ["--recipe", "countdown", *WIDTH, *ESPO, *BLOCKS, "--rollout-cache", "exact", *COMPARE],
    ),
    "espo, experts": ("run_espo_8b.sh", [*WIDTH, *EXPERTS, *ESPO, *BLOCKS, *COMPARE[:-1], *TWO]),
    "pretrain, blocks": (
        "adapt_8b.sh",
        [
            *WIDTH,
            "--num-query-groups",
            "2",
            "--tensor-model-parallel-size",
            "2",
            *LOOP,
            *COMPARE[:-1],
        ],
    ),
    "pretrain": ("pretrain_8b.sh", [*WIDTH, *LOOP, *COMPARE, *TWO]),
    "sft": ("sft_8b.sh", [*WIDTH, *LOOP, "--sft-valid-data", "none.jsonl", *COMPARE[:-1]]),
    "evaluate": (evaluation, [*MODEL, *EVALUATION, *COMPARE[:-1]]),
    "evaluate, lora": (evaluation, [*MODEL, *EVALUATION, "--lora-rank", "4", *COMPARE[:-1]]),
    "generate": (generate, [*MODEL, *GENERATION, *COMPARE[:-1]]),
    "module": (
        espo,
        [
            *(
                "--preset",
                "tiny",
                "--num-layers",
                "2",
                "--bf16",
                "--vocab-size",
                "384",
                "--mask-token-id",
                "256",
            ),
            *("--lr", "1e-3", "--espo-task", "countdown", "--espo-train-data", "none.jsonl"),
            *(*ESPO, *OVERLAPS, *COMPARE),
        ],
    ),
}
"""Recipes that a start script has of its own."""
RECIPES = {
    "run_espo_8b.sh": (espo, ["llada_8b", "gsm8k"]),
    "pretrain_8b.sh": (pretrain, ["pretrain_8b"]),
    "adapt_8b.sh": (pretrain, ["adapt_8b"]),
    "sft_8b.sh": (pretrain, ["llada_8b", "sft_8b"]),
}


class _Planned(Exception):
    """The job is made: it will run with the others."""


def conclusion(job: Job, ranks: list[Rank], module: str, args: Any, peaks: Any) -> dict[str, str]:
    """What a user gets to see, and why the plan is refused."""
    printed, refused = io.StringIO(), ""
    with mock.patch.object(sys, "stdout", printed):
        try:
            simulation.conclude(module, job, args, ranks, peaks)
        except ValueError as error:
            refused = str(error)
    return {"printed": printed.getvalue(), "refused": refused}


def main(folder: Path) -> None:
    """Plan, run, print."""
    jobs: dict[str, Job] = {}
    plans: dict[str, tuple[Any, ...]] = {}
    for number, (name, (target, flags)) in enumerate(STARTED.items()):
        own = folder / str(number)
        own.mkdir(parents=True)

        def plan(module, argv, args, gpus, peaks=None, name=name, own=own):
            jobs[name] = simulation.make_job(module, argv, args, gpus, own)
            plans[name] = (module, args, peaks)
            raise _Planned

        script = str(EXAMPLES / target) if isinstance(target, str) else target.__file__
        with (
            mock.patch.object(sys, "argv", [script, *flags]),
            mock.patch("megatron_espo.dry_run.simulation.simulate", plan),
            mock.patch("megatron_espo.dry_run.command.simulate", plan),
            open("/dev/null", "w") as nowhere,
            mock.patch.object(sys, "stdout", nowhere),
        ):
            try:
                if isinstance(target, str):
                    entry, recipes = RECIPES[target]
                    entry.main(launch.complete_flags(recipes, flags))
                else:
                    target.main(flags)
            except _Planned:
                pass
    # A job that is wrong on purpose: the same one with a mistake.
    own = folder / "disagreeing"
    own.mkdir()
    module = jobs["module"]
    jobs["disagreeing"] = Job(
        target="disagreeing",
        flags=[flag.replace(module.folder, str(own)) for flag in module.flags],
        world_size=module.world_size,
        gpus_per_node=8,
        ranks=module.ranks[:2],
        folder=str(own),
        record_trace=True,
        processes=2,
    )
    (own / "tokenizer").symlink_to(Path(module.folder) / "tokenizer")
    plans["disagreeing"] = plans["module"]
    # Experts that do the same are run one by one.
    own = folder / "alone"
    own.mkdir()
    experts = jobs["espo, experts"]
    jobs["espo, experts alone"] = dataclasses.replace(
        experts,
        flags=[flag.replace(experts.folder, str(own)) for flag in experts.flags],
        folder=str(own),
        repeat=False,
    )
    for path in Path(experts.folder).iterdir():
        (own / path.name).symlink_to(path)
    plans["espo, experts alone"] = plans["espo, experts"]
    results = {}
    for (name, job), ranks in zip(
        jobs.items(), simulation.run_jobs(list(jobs.values())), strict=True
    ):
        results[name] = {
            "ranks": [{**rank.as_json(), "trace": []} for rank in ranks],
            "trace": len(ranks[0].trace),
            "mismatch": find_mismatch(ranks) if job.record_trace else None,
            **conclusion(job, ranks, *plans[name]),
        }
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
