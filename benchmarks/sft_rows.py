"""Fine-tuning on rows as long as their examples, against rows padded to --seq-length.

python -m benchmarks.sft_rows --shape small-vocabulary --seq-length 1024 --pairs 5

The examples are made up, with the lengths of GSM8K's training set (see :func:`write_examples`).
Both sides are this project's model, take the same examples with the same noise from the same
weights, and make the same steps (plain gradient descent); they take turns in one process, and
their losses are compared before anything is timed.
"""

import argparse
import json
import math
import random
import string
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.training.datasets.data_samplers import MegatronPretrainingSampler
from torch.utils.data import DataLoader

from benchmarks.measure import interleaved, keep_freed_memory, machine, print_table, ratios, spread
from benchmarks.models import SHAPES, build_random
from megatron_espo.conversion.verification import quiet
from megatron_espo.data.sft import SftRows, read_rows
from megatron_espo.data.sft_dataset import SftDataset
from megatron_espo.data.tokenizer import byte_tokenizer, special_ids
from megatron_espo.model.handle import DiffusionModel
from megatron_espo.passes.shapes import Shapes
from megatron_espo.supervised.forward_step import forward_step

# Mean and deviation of the logarithm of the characters of questions and answers in GSM8K's 7,473
# training problems (answers with their calculations), and how the two are correlated.
_QUESTION, _ANSWER, _CORRELATION = (5.384, 0.382), (5.544, 0.487), 0.534
# Characters of a token, an assumption, and tokens of a chat format around a question.
_CHARACTERS, _FORMAT = 3.0, 12


def write_examples(path: Path, count: int, longest: int, seed: int) -> None:
    """Write examples of random letters, one token each, with GSM8K's distribution of lengths.

    Args:
        path: file to write.
        count: examples.
        longest: most tokens of an example.
        seed: of the draws.
    """
    generator = random.Random(seed)

    def letters(number: int) -> str:
        return "".join(generator.choices(string.ascii_lowercase, k=number))

    with path.open("w") as file:
        for _ in range(count):
            shared, own = generator.gauss(0, 1), generator.gauss(0, 1)
            answer = _CORRELATION * shared + math.sqrt(1 - _CORRELATION**2) * own
            prompt, completion = (
                round(math.exp(mean + deviation * normal) / _CHARACTERS)
                for (mean, deviation), normal in ((_QUESTION, shared), (_ANSWER, answer))
            )
            prompt = min(prompt + _FORMAT, longest // 2)
            completion = min(completion, longest - prompt - 1)
            line = {"prompt": letters(prompt), "completion": letters(max(completion, 1))}
            file.write(json.dumps(line) + "\n")


def train(
    model: DiffusionModel,
    rows: SftRows,
    options: argparse.Namespace,
    weights: list[torch.Tensor],
    padded: bool,
) -> list[float]:
    """Make some steps from the same weights.

    Args:
        model: one rank's model.
        rows: the examples.
        options: of the command line.
        weights: where to start.
        padded: take rows of --seq-length in the order of the run, as they come.

    Returns:
        The loss of each step.
    """
    batch, micro = options.batch, options.micro
    parameters = [p for chunk in model.chunks for p in chunk.parameters()]
    with torch.no_grad():
        for parameter, start in zip(parameters, weights, strict=True):
            parameter.copy_(start)
    data = SftDataset(
        rows,
        num_samples=options.steps * batch,
        seed=1,
        longest_of=options.longest_of,
        batch_size=1 if padded else batch,
    )
    sampler = MegatronPretrainingSampler(len(data), 0, micro, 0, 1)
    loader = iter(DataLoader(data, batch_sampler=sampler))
    step = partial(forward_step, shapes=None if padded else Shapes())
    return [
        _step(model, loader, step, batch // micro, options, parameters)
        for _ in range(options.steps)
    ]


def _step(
    model: DiffusionModel,
    loader: Any,
    step: Callable[..., Any],
    num_batches: int,
    options: argparse.Namespace,
    parameters: list[Any],
) -> float:
    """Make a step of gradient descent; returns its loss."""
    for chunk in model.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    reports = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=loader,
        model=model.chunks[0],
        num_microbatches=num_batches,
        seq_length=options.seq_length,
        micro_batch_size=options.micro,
        forward_only=False,
    )
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(parameter.main_grad, alpha=-options.rate)
    loss, count = torch.stack([report["lm loss"].double() for report in reports]).sum(0).tolist()
    return float(loss / count)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Time both sides in turn.

    Args:
        options: of the command line.

    Returns:
        Lengths of the rows, the largest difference of the losses, seconds of each side by round.
    """
    tokenizer = byte_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "examples.jsonl")
        write_examples(path, options.examples, options.seq_length, seed=20260727)
        rows = read_rows(path, tokenizer, special_ids(tokenizer), seq_length=options.seq_length)
    with quiet():
        model = build_random(SHAPES[options.shape])
    weights = [p.detach().clone() for chunk in model.chunks for p in chunk.parameters()]
    sides: dict[str, Callable[[], Any]] = {
        name: partial(train, model, rows, options, weights, name == "padded")
        for name in ("padded", "cut")
    }
    seconds, losses = interleaved(sides, options.pairs)
    difference = max(
        abs(a - b) / abs(a) for a, b in zip(losses["padded"], losses["cut"], strict=True)
    )
    assert difference < 1e-4, losses
    data = SftDataset(rows, num_samples=10_000, seed=1, longest_of=options.longest_of)
    lengths = data.lengths(torch.arange(len(data)).numpy())
    return {
        "machine": machine(),
        "mean tokens of an example": float(rows.lengths().mean()),
        "mean tokens of a row": float(lengths.mean()),
        "losses": losses,
        "largest difference of a loss": difference,
        "seconds": seconds,
    }


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="small-vocabulary")
    parser.add_argument("--seq-length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=16, help="examples of a step")
    parser.add_argument("--micro", type=int, default=4, help="examples of a micro-batch")
    parser.add_argument("--longest-of", type=int, default=2, help="--sft-longest-of")
    parser.add_argument("--steps", type=int, default=1, help="steps of a round")
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--rate", type=float, default=0.05, help="learning rate")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="file for the figures as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = measure(options)
    if options.out is not None:
        options.out.write_text(json.dumps(found))
    examples = options.steps * options.batch
    print(
        f"examples of {found['mean tokens of an example']:.0f} tokens, rows of "
        f"{found['mean tokens of a row']:.0f}; losses agree to "
        f"{found['largest difference of a loss']:.1e}; {found['machine']['cpu']}"
    )
    seconds = found["seconds"]
    table = [
        [
            name,
            str(spread(times)),
            str(spread([examples / t for t in times])),
            str(ratios(seconds["padded"], times)),
        ]
        for name, times in seconds.items()
    ]
    print_table(["rows", "seconds", "examples/s", "times as fast"], table)


if __name__ == "__main__":
    keep_freed_memory()
    main()
