"""A task and its problems, read, checked and tokenized."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_espo.config import EspoConfig
from megatron_espo.data.encoding import PromptEncoder
from megatron_espo.errors import UserError
from megatron_espo.rewards.workers import RewardWorkers
from megatron_espo.sandbox.run import ACCEPT
from megatron_espo.tasks import Task, load_task
from megatron_espo.tasks.base import Example, read_examples, start_line


@dataclass(frozen=True)
class TaskData:
    """A task's problems with their prompts as token ids.

    Attributes:
        examples: the problems.
        encoded: their prompts.
    """

    examples: Sequence[Example]
    encoded: Sequence[tuple[int, ...]]


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


def load_task_data(
    task: Task, path: str | None, tokenizer: Any, args: argparse.Namespace, count: int = 0
) -> TaskData | None:
    """Read a task's problems and tokenize their prompts.

    Args:
        task: the task.
        path: JSONL file, or None.
        tokenizer: the tokenizer.
        args: Megatron's arguments.
        count: most problems to take; 0 takes all.

    Returns:
        The data, or None without a path.

    Raises:
        UserError: naming the line of the file, or a prompt that does not fit.
    """
    if path is None:
        return None
    examples = read_examples(task, path)
    examples = examples[:count] if count else examples
    room = args.seq_length - args.rollout_completion_length
    encoder = PromptEncoder(
        tokenizer, args.prompt_special_tokens, args.mask_token_id, args.stop_token_ids
    )
    return TaskData(examples, encode_examples(encoder, examples, room, path))


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
