"""Evaluates a checkpoint on a task: greedy completions, exact accuracy and mean reward.

Runs under torchrun like training does, or alone:
    python tools/evaluate.py --load CHECKPOINTS --tokenizer-model DIR --espo-task sudoku \
        --espo-eval-data test.jsonl --rollout-completion-length 16 ...
"""

import contextlib
import json
import sys
from collections.abc import Sequence

from megatron_espo.arguments import config_from_args
from megatron_espo.config import EspoConfig, RolloutConfig
from megatron_espo.data.tokenizer import load_tokenizer
from megatron_espo.rl.evaluate import evaluate_task
from megatron_espo.tasks import load_task
from megatron_espo.training.espo import load_task_data
from megatron_espo.training.inference import load_model
from megatron_espo.training.setup import run_entry_point


def main(argv: Sequence[str]) -> None:
    """Evaluate from the command line; prints one JSON object."""
    with contextlib.redirect_stdout(sys.stderr):  # Megatron's start-up is not the result
        model, args = load_model(argv)
    espo = config_from_args(EspoConfig, args)
    task = load_task(espo.task, flag="--espo-task")
    tokenizer = load_tokenizer(args.tokenizer_model)
    data = load_task_data(task, espo.eval_data, tokenizer, args, espo.eval_samples)
    if data is None:
        raise ValueError("--espo-eval-data is missing: the problems to evaluate on.")
    rollout = config_from_args(RolloutConfig, args)
    result = evaluate_task(model, task, data.examples, data.encoded, tokenizer, rollout, args.seed)
    if result is not None and model.layout.is_reporter:
        print(json.dumps(vars(result)), flush=True)


if __name__ == "__main__":
    run_entry_point(main)
