"""The loop of preference optimization: pairs, ELBOs of the reference, an update.

Masks are functions of the seed and of a pair's place in the run, so that policy and reference look
at the same ones, and so does a run that is resumed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from megatron_espo.config import DpoConfig, EspoConfig
from megatron_espo.console import say
from megatron_espo.data.pairs import PairRows
from megatron_espo.monitor.flops import preference_flops
from megatron_espo.monitor.metrics import Columns
from megatron_espo.monitor.progress import Heartbeat, Progress
from megatron_espo.monitor.throughput import throughput_scalars
from megatron_espo.objectives import Loss
from megatron_espo.objectives.dpo import Dpo
from megatron_espo.preference.report import (
    console_line,
    held_out_scalars,
    pair_columns,
    step_scalars,
)
from megatron_espo.preference.rows import PairBatch, Places, pair_batch, pairs_at
from megatron_espo.random import stream
from megatron_espo.rl.reference import Reference
from megatron_espo.rl.run import Loop, RunState
from megatron_espo.rl.scalars import Clock
from megatron_espo.rl.terms import Facts, log_probabilities
from megatron_espo.rl.update import accumulate_facts

# A completion's group is its pair.
_SETTINGS = EspoConfig(group_size=2)


@dataclass(frozen=True)
class PreferenceTrainer(Loop):
    """Everything the loop works with.

    Attributes:
        reference: the reference policy.
        train_data: pairs to train on.
        held_out: held-out pairs, or None.
        dpo: settings.
        mode: the way to the gradient.
        batch_size: pairs of a step, over all data-parallel ranks.
        num_steps: optimizer steps of the run.
        eval_interval: steps between evaluations of the held-out pairs.
        log_interval: steps between lines on the console.
    """

    reference: Reference
    train_data: PairRows
    held_out: PairRows | None
    dpo: DpoConfig
    mode: Literal["joint", "two_pass"]
    batch_size: int
    num_steps: int
    eval_interval: int
    log_interval: int


def train(trainer: PreferenceTrainer, start: RunState) -> None:
    """Run preference optimization to the end, or until it is told to stop.

    Args:
        trainer: the parts.
        start: where to begin.
    """
    progress, held_out = Progress(start.step, trainer.num_steps), _HeldOut(trainer)
    if start.step >= trainer.num_steps and trainer.dashboard.is_reporter:
        say(f"The run has made all of its {trainer.num_steps} steps; raise their number to go on.")
    if (start.step == 0 or start.evaluation_due) and not held_out.evaluate(start.step):
        return
    for step in range(start.step + 1, trainer.num_steps + 1):
        _step(trainer, step, progress)
        last = step == trainer.num_steps
        interrupted = False
        if last or step % trainer.eval_interval == 0:
            interrupted = not held_out.evaluate(step)
        stop = interrupted or trainer.should_stop(step)
        if stop or trainer.is_due(step):
            watch = trainer.dashboard.watch.state()
            trainer.save(RunState(step, evaluation_due=interrupted, watch=watch))
        if stop:
            return


def _step(trainer: PreferenceTrainer, step: int, progress: Progress) -> None:
    """Make one optimizer step and report it."""
    clock, model = Clock(), trainer.model
    places = np.arange((step - 1) * trainer.batch_size, step * trainer.batch_size)
    pairs = pairs_at(places, len(trainer.train_data), trainer.seed)
    batch = _share(trainer, trainer.train_data, pairs, places, "dpo")
    reference = _reference_draws(trainer, [batch], clock)[0]
    with clock("update"):
        trainer.clear_gradients()
        facts = _facts(trainer, batch, reference)
        draws, _, _ = accumulate_facts(
            model, batch.batches, facts, trainer.mode, 2 * trainer.batch_size
        )
        made = trainer.make_step(step, trainer.batch_size)
    columns = pair_columns(_terms(facts, draws), draws, batch.sequences, model.layout)
    scalars = step_scalars(columns, made)
    scalars |= _performance(trainer, batch, clock)
    scalars |= {f"time/{name}": spent for name, spent in clock.seconds.items()}
    shown = step % trainer.log_interval == 0 or step in (1, trainer.num_steps)
    if shown:
        scalars |= trainer.dashboard.hardware()
        trainer.dashboard.histograms({"preference/margin": columns["margin"]}, step)
    trainer.dashboard.report(scalars, step)
    if shown and trainer.dashboard.is_reporter:
        line = console_line(step, trainer.num_steps, scalars, sum(clock.seconds.values()))
        say(f"{line} | left {progress.time_left(step)}")


def _share(
    trainer: PreferenceTrainer, rows: PairRows, pairs: Places, numbers: Places, purpose: str
) -> PairBatch:
    """Draw the masks of this data-parallel rank's part of some pairs."""
    layout = trainer.model.layout
    share = len(pairs) // layout.dp_size
    mine = slice(layout.dp_rank * share, (layout.dp_rank + 1) * share)
    return pair_batch(
        trainer.model, rows, pairs[mine].tolist(), numbers[mine].tolist(),
        stream(trainer.seed, purpose), trainer.dpo, trainer.rows_per_batch,
    )  # fmt: skip


def _reference_draws(
    trainer: PreferenceTrainer, batches: Sequence[PairBatch], clock: Clock
) -> list[Tensor]:
    """Evaluate the ELBO draws of the reference under the batches' masks."""
    with clock("ref_elbo"), trainer.inference(), trainer.reference.in_model():
        return [_draws(trainer, batch) for batch in batches]


def _draws(trainer: PreferenceTrainer, batch: PairBatch) -> Tensor:
    return log_probabilities(trainer.model, batch.batches, batch.views, Dpo(trainer.dpo.beta))


def _facts(trainer: PreferenceTrainer, batch: PairBatch, reference: Tensor) -> Facts:
    n, length = len(batch.sequences), batch.sequences.completion_length
    return Facts(
        None, reference, torch.zeros(n), batch.views, length, _SETTINGS, None,
        Dpo(trainer.dpo.beta),
    )  # fmt: skip


def _terms(facts: Facts, draws: Tensor) -> Loss:
    return facts.objective.loss(draws, facts.given(draws, facts.tensors()))


def _performance(trainer: PreferenceTrainer, batch: PairBatch, clock: Clock) -> dict[str, float]:
    """Relate the operations of a step to its seconds."""
    board, blocks = trainer.dashboard, trainer.model.blocks
    if board.dimensions is None:
        return {}
    widths = [part.batch.tokens.size(1) for part in batch.batches]
    width = sum(widths) / len(widths)
    if blocks is not None:
        copies = batch.batches[0].batch.blocks
        assert copies is not None
        width /= copies.copies + 1
    lengths = batch.sequences.completion_lengths
    assert lengths is not None
    flops = preference_flops(
        board.dimensions, trainer.batch_size, round(width), float(lengths.double().mean()),
        trainer.dpo, trainer.mode,
    )  # fmt: skip
    return throughput_scalars(flops, clock.seconds, 1.0, board.devices, board.peak)


class _HeldOut:
    """The held-out pairs, always under the same masks."""

    def __init__(self, trainer: PreferenceTrainer) -> None:
        self._trainer = trainer
        self._reference: list[Tensor] | None = None

    def _batches(self, rows: PairRows, count: int) -> list[PairBatch]:
        """Cut the pairs into as many at a time as a step has, the last ones filled up."""
        size = self._trainer.batch_size
        parts = np.arange(-(-count // size) * size).clip(max=count - 1).reshape(-1, size)
        return [_share(self._trainer, rows, part, part, "dpo-held-out") for part in parts]

    def evaluate(self, step: int) -> bool:
        """Evaluate them and report; returns False if a signal broke it off."""
        trainer, rows = self._trainer, self._trainer.held_out
        if rows is None:
            return True
        count = min(trainer.dpo.eval_samples or len(rows), len(rows))
        batches, found = self._batches(rows, count), []
        if self._reference is None:
            self._reference = _reference_draws(trainer, batches, Clock())
        heartbeat = Heartbeat("evaluating held-out pairs")
        with trainer.inference():
            for batch, reference in zip(batches, self._reference, strict=True):
                if trainer.should_stop(None):
                    return False
                draws = _draws(trainer, batch)
                terms = _terms(_facts(trainer, batch, reference), draws)
                found.append(pair_columns(terms, draws, batch.sequences, trainer.model.layout))
                if trainer.dashboard.is_reporter:
                    heartbeat.beat()
        columns: Columns = {
            name: np.concatenate([part[name] for part in found])[:count] for name in found[0]
        }
        scalars = held_out_scalars(columns)
        trainer.dashboard.report(scalars, step)
        trainer.evaluated(step, scalars["eval/accuracy"])
        if trainer.dashboard.is_reporter:
            when = "before" if step == 0 else f"step {step}"
            say(
                f"held-out ({when}): loss {scalars['eval/loss']:.4f}, accuracy "
                f"{100 * scalars['eval/accuracy']:.1f}%, margin {scalars['eval/margin']:.3f} on "
                f"{count} pairs"
            )
        return True
