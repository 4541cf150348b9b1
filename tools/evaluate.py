"""Evaluates a checkpoint on a task: greedy completions, exact accuracy and mean reward.

Runs under torchrun like training does, or alone:
    python tools/evaluate.py --load CHECKPOINTS --tokenizer-model DIR --espo-task sudoku \
        --espo-eval-data test.jsonl --rollout-completion-length 16 ...
"""

import json
from collections.abc import Sequence

from megatron_espo.arguments import config_from_args
from megatron_espo.config import RolloutConfig
from megatron_espo.rl.evaluate import evaluate_task
from megatron_espo.training.inference import load_eval_problems, load_model
from megatron_espo.training.setup import run_entry_point


def main(argv: Sequence[str]) -> None:
    """Evaluate from the command line; prints one JSON object."""
    model, args = load_model(argv)
    task, tokenizer, data = load_eval_problems(args)
    rollout = config_from_args(RolloutConfig, args)
    result = evaluate_task(model, task, data.examples, data.encoded, tokenizer, rollout, args.seed)
    if result is not None and model.layout.is_reporter:
        print(json.dumps(vars(result)), flush=True)


if __name__ == "__main__":
    run_entry_point(main)
