"""A task and its problems, read, checked and tokenized."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_espo.config import EspoConfig
from megatron_espo.data.encoding import PromptEncoder
from megatron_espo.errors import UserError
from megatron_espo.rewards.workers import RewardWorkers
from megatron_espo.sandbox.run import ACCEPT
from megatron_espo.tasks import Blend, Task, load_task
from megatron_espo.tasks.base import Example, read_examples, start_line
from megatron_espo.tasks.blend import of_task


class Share(NamedTuple):
    """The problems of one task of several: a stretch of all problems.

    Attributes:
        task: its name.
        weight: how many prompts are of it, relative to the others.
        first: place of its first problem.
        size: number of its problems.
    """

    task: str
    weight: float
    first: int
    size: int


@dataclass(frozen=True)
class TaskData:
    """A task's problems with their prompts as token ids.

    Attributes:
        examples: the problems.
        encoded: their prompts.
        shares: of several tasks, what is of which; empty with one.
    """

    examples: Sequence[Example]
    encoded: Sequence[tuple[int, ...]]
    shares: Sequence[Share] = ()


def load_workers(espo: EspoConfig) -> Task:
    """Load the task, with reward workers if the settings ask for them; they start later.

    Args:
        espo: ESPO settings.

    Returns:
        The task, which says on a start line how it is guarded if it has to be.

    Raises:
        UserError: there is no such task, or what it runs cannot be contained here.
    """
    task = load_task(espo.task, flag="--espo-task")
    if espo.accept_uncontained_code:
        os.environ[ACCEPT] = "1"  # for the workers, too
    start_line(task)  # raises on every rank alike, before any of them waits for another
    if not espo.reward_workers:
        return task
    return RewardWorkers(task, espo.task, espo.reward_workers, espo.reward_timeout)


def blend_of(task: Task) -> Blend | None:
    """Return the tasks that a task is made of, with or without workers; None for a single one."""
    inner = task.task if isinstance(task, RewardWorkers) else task
    return inner if isinstance(inner, Blend) else None


def load_task_data(
    task: Task,
    path: str | None,
    tokenizer: Any,
    args: argparse.Namespace,
    count: int = 0,
    *,
    training: bool = False,
) -> TaskData | None:
    """Read a task's problems and tokenize their prompts.

    Args:
        task: reads the file; several tasks read one each.
        path: JSONL file, or None; with several tasks a list of them (tasks.blend).
        tokenizer: of the model; prompts are encoded once, here.
        args: Megatron's arguments.
        count: most problems to take, of each task; 0 takes all.
        training: whether they are to train on: then each of several tasks must have some.

    Returns:
        The data, or None without a path.

    Raises:
        UserError: naming the line of the file, or a prompt that does not fit.
    """
    if path is None:
        return None
    room = args.seq_length - args.rollout_completion_length
    encoder = PromptEncoder(
        tokenizer, args.prompt_special_tokens, args.mask_token_id, args.stop_token_ids
    )
    blend = blend_of(task)
    if blend is None:
        examples = read_examples(task, path)
        examples = examples[:count] if count else examples
        return TaskData(examples, encode_examples(encoder, examples, room, path))
    all_examples: list[Example] = []
    all_encoded: list[tuple[int, ...]] = []
    shares = []
    flag = "--espo-train-data" if training else "--espo-eval-data"
    for name, file in blend.files(path, flag, every_task=training).items():
        part = blend.parts[name]
        examples = read_examples(part.task, file)
        examples = examples[:count] if count else examples
        shares.append(Share(name, part.weight, len(all_examples), len(examples)))
        all_encoded += encode_examples(encoder, examples, room, file)
        all_examples += [of_task(name, example) for example in examples]
    return TaskData(all_examples, all_encoded, shares)


def encode_examples(
    encoder: PromptEncoder, examples: Sequence[Example], room: int, source: str
) -> list[tuple[int, ...]]:
    """Tokenize the prompts of a data set.

    Args:
        encoder: makes ids of prompts.
        examples: the problems.
        room: most tokens a prompt may have.
        source: where they come from, for the error message.

    Returns:
        Token ids per example.

    Raises:
        UserError: for a prompt that is empty, does not fit (prompts are never cut) or spells a
            special token that it may not.
    """
    encoded: list[tuple[int, ...]] = []
    for number, example in enumerate(examples, start=1):
        try:
            ids = tuple(encoder.encode(example.prompt))
        except UserError as error:
            raise UserError(f"{source}: the prompt of problem {number} {error}.") from error
        encoded.append(ids)
        if not 0 < len(ids) <= room:
            raise UserError(
                f"{source}: the prompt of problem {number} has {len(ids)} tokens but 1 to {room} "
                "fit; raise --seq-length, lower --rollout-completion-length or drop the problem."
            )
    return encoded
