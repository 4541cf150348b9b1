"""Trains the models whose confidence the cached and parallel rollouts are measured with.

Random weights are never confident, so that parallel decoding by a threshold would commit one token
per step. Here a model of a benchmark's shape learns a small language through the project's own
fine-tuning (Megatron's training loop, JSONL of prompts and completions): each letter is the one
before or, once in 96 places, one of two others. Such text is certain next to what is known and less
so with every place farther away. How many tokens a step can commit follows from that rate; a
benchmark prints it beside its ratio, because the ratio depends on it.

    python -m benchmarks.confident --shape large-vocabulary    # once, into runs/benchmark/...
"""

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure import KEEP_MEMORY
from benchmarks.models import SHAPES
from megatron_espo.data.tokenizer import byte_tokenizer, save_tokenizer

LETTERS = "abcdefghijklmnop"
# Mean length of a run of one letter, and how many letters may follow.
RUN = 96
FOLLOWERS = 2
LENGTH = 128
TRAINING = {
    # Steps, rows per step and learning rate that make the model confident in some minutes.
    "large-vocabulary": (200, 4, 2e-3),
    "small-vocabulary": (200, 4, 1e-3),
    "tiny": (400, 8, 2e-3),
    "smoke": (3, 4, 1e-3),
}


def followers(letter: int) -> list[int]:
    """List the letters that may follow a run of one, by their places among LETTERS.

    Args:
        letter: place of the run's letter.

    Returns:
        Other places; which ones is what the model has to learn.
    """
    return [(5 * letter + 3 + 7 * choice) % len(LETTERS) for choice in range(FOLLOWERS)]


def write_text(length: int, generator: random.Random) -> str:
    """Write a text of that many characters.

    Args:
        length: characters.
        generator: chooses the letters and where they change.

    Returns:
        The text.
    """
    letter = generator.randrange(len(LETTERS))
    text = ""
    for _ in range(length):
        if generator.random() < 1 / RUN:
            letter = generator.choice(followers(letter))
        text += LETTERS[letter]
    return text


def reward(prompt: str, completion: str) -> float:
    """Say how much of a completion is of the language.

    Args:
        prompt: a text of the language.
        completion: what a model wrote behind it.

    Returns:
        Share of the characters that are the one before or may follow it.
    """
    pairs = list(zip(prompt[-1] + completion, completion, strict=False))
    right = [
        after in LETTERS
        and (
            after == before
            or (before in LETTERS and LETTERS.index(after) in followers(LETTERS.index(before)))
        )
        for before, after in pairs
    ]
    return sum(right) / len(right)


def write_data(folder: Path, count: int = 4000, held_out: int = 64) -> None:
    """Write the tokenizer, train.jsonl and heldout.jsonl.

    Args:
        folder: where to.
        count: lines to train on.
        held_out: lines of prompts for measurements.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(byte_tokenizer(), folder / "tokenizer")
    for name, lines, seed in (("train", count, 1), ("heldout", held_out, 2)):
        generator = random.Random(seed)
        with (folder / f"{name}.jsonl").open("w") as file:
            for _ in range(lines):
                text = write_text(2 * LENGTH, generator)
                record = {"prompt": text[:LENGTH], "completion": text[LENGTH:]}
                file.write(json.dumps(record) + "\n")


def read_prompts(checkpoint: str, count: int) -> list[list[int]]:
    """Read held-out prompts as token ids.

    Args:
        checkpoint: --save folder of a trained model.
        count: how many; they repeat when there are fewer.

    Returns:
        The ids: bytes.
    """
    lines = (Path(checkpoint).parent / "heldout.jsonl").read_text().splitlines()
    prompts = [list(json.loads(line)["prompt"].encode()) for line in lines]
    return [prompts[i % len(prompts)] for i in range(count)]


def train(shape: str, folder: Path, threads: int) -> None:
    """Fine-tune from nothing, in a process of its own.

    Args:
        shape: name of the shape.
        folder: gets data, tokenizer, log and checkpoint.
        threads: of the process.

    Raises:
        ValueError: the training failed.
    """
    write_data(folder)
    steps, rows, rate = TRAINING[shape]
    command = [sys.executable, "-u", "-m", "megatron_espo.training.pretrain"]
    command += SHAPES[shape].flags()
    command += (
        f"--tokenizer-model {folder}/tokenizer --sft-train-data {folder}/train.jsonl "
        f"--sft-completion-length {LENGTH} --seq-length {2 * LENGTH} --micro-batch-size {rows} "
        f"--global-batch-size {rows} --train-iters {steps} --lr {rate} --min-lr {rate / 10} "
        "--lr-decay-style cosine --lr-warmup-iters 2 --adam-beta2 0.98 --weight-decay 0.0 "
        f"--clip-grad 1.0 --log-interval 20 --save-interval 1000000 --save {folder}/checkpoint"
    ).split()
    environment = {**os.environ, **KEEP_MEMORY, "OMP_NUM_THREADS": str(threads)}
    with (folder / "train.log").open("w") as log:
        done = subprocess.run(command, env=environment, stdout=log, stderr=log, check=False)
    if done.returncode != 0:
        raise ValueError(f"training failed; see {folder}/train.log.")


def main(argv: Sequence[str] | None = None) -> None:
    """Train from the command line, unless that was done before.

    Args:
        argv: flags; those of the process if None.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", choices=TRAINING, default="large-vocabulary", help="the model")
    parser.add_argument("--out", type=Path, help="folder (default: runs/benchmark/SHAPE)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    options = parser.parse_args(argv)
    folder = options.out or Path("runs/benchmark") / options.shape
    if (folder / "checkpoint" / "latest_checkpointed_iteration.txt").exists():
        print(f"{folder}/checkpoint is there already.")
        return
    train(options.shape, folder, options.threads)
    print(f"{folder}/checkpoint")


if __name__ == "__main__":
    main()
