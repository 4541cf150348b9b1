"""A task whose reward is how often a completion holds the letter e."""

from collections.abc import Sequence

from megatron_espo.tasks.base import Example, Score, read_jsonl

name = "echo"


def read(path: str) -> Sequence[Example]:
    return read_jsonl(path, {"text": str}, lambda r: Example(prompt=r["text"], answer=r))


def score(example: Example, completion: str) -> Score:
    # Untrained models rarely say the same twice: the length alone spreads the rewards.
    return Score(reward=len(completion) % 7 / 7, correct=False, metrics={})
