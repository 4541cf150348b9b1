"""Measures the Monte-Carlo noise of ELBO estimates and of the log-ratio between two checkpoints.

Samples one completion per problem, estimates its ELBO under both policies with many sets of masks,
and prints, per estimator and at equal numbers of model rows, the standard deviation over masks of

* the ELBO per token,
* the log-ratio per token when both policies see the same masks (as ESPO does),
* the log-ratio when each policy draws its own masks.

    python tools/measure_elbo_noise.py --load POLICY --other BASE --tokenizer-model DIR \
        --espo-task sudoku --espo-eval-data validation.jsonl --espo-eval-samples 64 \
        --rollout-completion-length 16 ...
"""

import contextlib
import sys
from collections.abc import Sequence

import torch
from megatron.training.checkpointing import load_checkpoint
from torch import Tensor

from megatron_espo.command_line import Parser, parse_own
from megatron_espo.commands.inference import load_eval_problems, load_model
from megatron_espo.config import RolloutConfig
from megatron_espo.errors import UserError
from megatron_espo.generation.sampler import generate
from megatron_espo.model.handle import DiffusionModel
from megatron_espo.rl.elbo import estimate_elbo
from megatron_espo.startup.arguments import config_from_args
from megatron_espo.startup.setup import run_entry_point

# Estimator and draws: rows of equal cost stand together.
SETTINGS = (
    ("coupled", 1),
    ("exact_count", 2),
    ("bernoulli", 2),
    ("coupled", 2),
    ("exact_count", 4),
    ("bernoulli", 4),
)
REPEATS = 64


def main(argv: Sequence[str]) -> None:
    """Measure from the command line; prints a Markdown table."""
    parser = Parser(add_help=False)
    parser.add_argument("--other")
    options, rest = parse_own(parser, argv)
    if options.other is None:
        raise UserError("--other is missing: the checkpoint to compare --load with.")
    model, args = load_model(rest)
    _, _, data = load_eval_problems(args)
    rollout = config_from_args(RolloutConfig, args)
    ids = torch.arange(len(data.encoded))
    completions = generate(
        model, data.encoded, ids, rollout, args.seed, "measure-elbo-noise"
    ).completions
    policy = _estimates(model, data.encoded, completions, rollout.micro_batch_size)
    args.load = options.other
    with contextlib.redirect_stdout(sys.stderr):
        load_checkpoint(list(model.chunks), None, None)
    base = _estimates(model, data.encoded, completions, rollout.micro_batch_size)
    if not model.layout.is_reporter:
        return
    print(f"{len(ids)} completions of {rollout.completion_length} tokens, {REPEATS} sets of masks")
    print("| estimator | model rows | ELBO | log-ratio, same masks | own masks | own / same |")
    print("|---|---|---|---|---|---|")
    for name, num_mc in SETTINGS:
        ours, theirs = policy[name, num_mc], base[name, num_mc]
        # Rolling by one set of masks makes the two sides independent.
        same, own = _deviation(ours - theirs), _deviation(ours - theirs.roll(1, dims=0))
        rows = num_mc * (2 if name == "coupled" else 1)
        print(
            f"| {name}, {num_mc} draws | {rows} | {_deviation(ours):.4f} | {same:.4f} | {own:.4f} "
            f"| {own / same:.1f} |"
        )


def _estimates(
    model: DiffusionModel, prompts: Sequence[Sequence[int]], completions: Tensor, rows: int
) -> dict[tuple[str, int], Tensor]:
    """Estimate every ELBO REPEATS times: float64 ``[repeats, n]`` in nats per token."""
    return {
        (name, num_mc): torch.stack(
            [
                estimate_elbo(
                    model,
                    prompts,
                    completions,
                    estimator=name,  # type: ignore[arg-type]
                    num_mc=num_mc,
                    purpose=f"noise-{repeat}",
                    rows_per_batch=rows,
                ).elbo.double()
                / completions.size(1)
                for repeat in range(REPEATS)
            ]
        )
        for name, num_mc in SETTINGS
    }


def _deviation(estimates: Tensor) -> float:
    """Root of the variance over sets of masks, averaged over completions."""
    return float(estimates.var(dim=0).mean().sqrt())


if __name__ == "__main__":
    run_entry_point(main)
