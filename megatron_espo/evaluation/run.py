"""Evaluates a model at several completion lengths, on all ranks, and takes up what is finished."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from megatron_espo.config import RolloutConfig
from megatron_espo.data.tokenizer import FastTokenizer
from megatron_espo.errors import UserError
from megatron_espo.evaluation.completing import complete_problems
from megatron_espo.evaluation.problems import TaskData
from megatron_espo.evaluation.protocol import Protocol
from megatron_espo.evaluation.statistics import Record, Summary, summarize
from megatron_espo.evaluation.store import CompletionStore
from megatron_espo.model.handle import DiffusionModel
from megatron_espo.monitor.progress import Progress
from megatron_espo.parallel.layout import Layout, raised_on_all
from megatron_espo.tasks.base import Task

Item = tuple[int, int]
"""A problem's number and a sample's number."""


def evaluate(
    model: DiffusionModel,
    task: Task,
    data: TaskData,
    tokenizer: FastTokenizer,
    protocol: Protocol,
    seed: int,
    open_store: Callable[[], CompletionStore] | None = None,
    say: Callable[[str], None] = print,
) -> list[Summary]:
    """Complete every problem at every length as often as asked for.

    Finished completions are written after each pass over a few problems, by the reporting rank.

    Args:
        model: the model, in evaluation mode.
        task: scores the completions.
        data: its problems, the same on every rank.
        tokenizer: decodes what is scored.
        protocol: lengths and settings.
        seed: seed of the draws.
        open_store: opens the folder that keeps completions; None keeps nothing. Called on the
            reporting rank only.
        say: shows a line of progress, on the reporting rank.

    Returns:
        A summary per length on the reporting rank, nothing on the others.

    Raises:
        UserError: the store cannot be opened, or the task's score returned something that cannot be
            used; on every rank.
    """
    layout = model.layout
    store, error = None, None
    if layout.is_reporter and open_store is not None:
        try:
            store = open_store()
        except UserError as caught:
            error = str(caught)
    finished = {} if store is None else dict(store.records)
    error, done = _from_reporter((error, set(finished)), layout)
    if error:
        raise UserError(error)
    items = [(p, s) for s in range(protocol.num_samples) for p in range(len(data.examples))]
    summaries = []
    try:
        for length, config in protocol.configs.items():
            left = [item for item in items if (length, *item) not in done]
            if layout.is_reporter and len(left) < len(items):
                say(f"length {length}: {len(items) - len(left)} of {len(items)} are finished")
            progress = Progress(len(items) - len(left), len(items))
            for chunk in _chunks(left, config, layout):
                records = _complete(model, task, data, tokenizer, config, chunk, seed)
                if not layout.is_reporter:
                    continue
                if store is not None:
                    store.append(records)
                finished |= {record.key: record for record in records}
                ours = [finished[k] for item in items if (k := (length, *item)) in finished]
                share = sum(record.correct for record in ours) / len(ours)
                say(
                    f"length {length}: {len(ours)}/{len(items)}, {100 * share:.1f}% correct so "
                    f"far, left {progress.time_left(len(ours))}"
                )
            if layout.is_reporter:
                ours = [finished[length, *item] for item in items]
                summaries.append(summarize(ours, protocol.ks))
    finally:
        if store is not None:
            store.close()
    return summaries


def _chunks(items: Sequence[Item], config: RolloutConfig, layout: Layout) -> list[list[Item]]:
    """Cut what is left into passes that fill the micro-batches of all ranks."""
    size = config.micro_batch_size * layout.pp_size * layout.dp_size
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def _complete(
    model: DiffusionModel,
    task: Task,
    data: TaskData,
    tokenizer: FastTokenizer,
    config: RolloutConfig,
    chunk: Sequence[Item],
    seed: int,
) -> list[Record]:
    """Complete a chunk on all ranks together; every rank gets all records."""
    layout = model.layout
    share = chunk[layout.dp_rank :: layout.dp_size]
    started = time.perf_counter()
    with raised_on_all(layout):
        scored = complete_problems(
            model, task, data.examples, data.encoded, share, tokenizer, config, seed
        )
    rows: list[tuple[Any, ...]] = [
        (*item, *row)
        for item, *row in zip(
            share,
            scored.texts,
            scored.completions.tolist(),
            scored.scores,
            scored.lengths.tolist(),
            scored.num_evaluations.tolist(),
            scored.num_committed.tolist(),
            scored.mean_confidence.tolist(),
            strict=True,
        )
    ]
    parts: list[Any] = [(time.perf_counter() - started, rows)]
    if layout.dp_size > 1:
        parts = [None] * layout.dp_size
        dist.all_gather_object(parts, (time.perf_counter() - started, rows), group=layout.dp)
    seconds = max(spent for spent, _ in parts) / len(chunk)
    return [
        Record(
            length=config.completion_length,
            problem=problem,
            sample=sample,
            prompt=tokenizer.decode(list(data.encoded[problem])),
            completion=text,
            token_ids=ids,
            reward=score.reward,
            correct=score.correct,
            metrics=dict(score.metrics),
            num_tokens=tokens,
            num_evaluations=evaluations,
            num_committed=committed,
            confidence=confidence,
            seconds=seconds,
        )
        for _, part in parts
        for problem, sample, text, ids, score, tokens, evaluations, committed, confidence in part
    ]


def _from_reporter(value: Any, layout: Layout) -> Any:
    """Give every rank the reporting rank's value."""
    size = dist.get_world_size()
    if size > 1:
        box = [value]
        dist.broadcast_object_list(box, size - 1)
        value = box[0]
    return value
