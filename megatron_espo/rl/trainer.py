"""The ESPO loop (arXiv 2512.03759, algorithm 1): rollout, score, ELBOs, updates.

Another objective (--espo-objective) has the same loop: its log-probabilities stand for ELBOs.

It owns its step, because rollouts need all pipeline stages at once, and calls Megatron for the
model passes, the optimizer, the scheduler and checkpoints.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from megatron_espo.config import EspoConfig, RolloutConfig
from megatron_espo.console import say
from megatron_espo.data.tokenizer import FastTokenizer
from megatron_espo.diffusion.noise import ElboViews
from megatron_espo.evaluation.completing import evaluate_task
from megatron_espo.evaluation.problems import TaskData
from megatron_espo.evaluation.scoring import decode_completions, score_completions
from megatron_espo.generation.sampler import Interrupted
from megatron_espo.model.fp8 import Phase, fp8_phase
from megatron_espo.model.handle import DiffusionModel
from megatron_espo.monitor.dashboard import Dashboard
from megatron_espo.monitor.progress import Heartbeat, Progress
from megatron_espo.monitor.watch import WatchState
from megatron_espo.objectives import num_draws, objective_of
from megatron_espo.objectives.masks import Ask
from megatron_espo.parallel.layout import raised_on_all
from megatron_espo.passes.batch import ViewBatch
from megatron_espo.random import stream
from megatron_espo.rl.elbo import block_offsets, cut_views
from megatron_espo.rl.prompts import further_prompts, prompts_of_rollout
from megatron_espo.rl.provenance import prompts_digest
from megatron_espo.rl.reference import Reference
from megatron_espo.rl.refill import Completed, Refilled, refill
from megatron_espo.rl.resume import RolloutRecord, record_rollout, restore_rollout
from megatron_espo.rl.rollout import (
    ScoringAhead,
    assemble_rollout,
    local_share,
    sample,
    take_failures,
)
from megatron_espo.rl.routing import noted_as, routing_scalars, watch_routing
from megatron_espo.rl.samples_table import write_samples
from megatron_espo.rl.scalars import (
    Clock,
    console_line,
    elbo_noise_scalars,
    failure_scalars,
    first_ratio_scalars,
    rollout_columns,
    rollout_scalars,
    update_columns,
    update_scalars,
)
from megatron_espo.rl.terms import (
    Answers,
    Facts,
    answers_of,
    log_probabilities,
    mean_log_probability,
)
from megatron_espo.rl.types import PreparedRollout, Prompt, Refill, Rollout
from megatron_espo.rl.update import accumulate_gradient, check_gradient
from megatron_espo.tasks.base import Task

# Denoising steps between looks at whether the run was told to stop: a look costs a collective.
_STEPS_PER_LOOK = 8


@dataclass(frozen=True)
class RunState:
    """Where a run is: what it saves, and what it resumes from.

    Attributes:
        step: optimizer steps done.
        rollout: the rollout in hand when ``step`` lies inside one, else None.
        evaluation_due: whether the evaluation that belongs to this step is still to be done.
        watch: what the warnings remember, or None at the start.
        accuracy: on the held-out problems, if this step was evaluated.
    """

    step: int
    rollout: RolloutRecord | None = None
    evaluation_due: bool = False
    watch: WatchState | None = None
    accuracy: float | None = None


@dataclass(frozen=True)
class Trainer:
    """Everything the loop works with, and what it asks of Megatron.

    Attributes:
        model: the policy.
        reference: the reference policy, or None without a KL penalty.
        optimizer: Megatron's optimizer.
        scheduler: Megatron's learning-rate scheduler.
        tokenizer: the tokenizer.
        task: the task.
        train_data: problems to train on.
        eval_data: held-out problems, or None.
        espo: ESPO settings.
        rollout: sampling settings.
        seed: the run's seed.
        rows_per_batch: views per model pass.
        dashboard: where reports go.
        check_gradient: whether a gradient that is not finite ends the run.
        inference: context in which the policy is evaluated without gradients.
        is_due: asked after every optimizer step whether it is time to save.
        save: saves the run at a position.
        evaluated: gets the held-out accuracy of a step, before ``is_due`` is asked for it.
        should_stop: asked with the number of steps after each, and with None after sampling; True
            ends the run, saved. All ranks ask together and get the same answer.
        interrupted: whether a signal asks to stop; the ranks of one copy of the model ask together.
    """

    model: DiffusionModel
    reference: Reference | None
    optimizer: Any
    scheduler: Any
    tokenizer: FastTokenizer
    task: Task
    train_data: TaskData
    eval_data: TaskData | None
    espo: EspoConfig
    rollout: RolloutConfig
    seed: int
    rows_per_batch: int
    dashboard: Dashboard
    check_gradient: bool
    inference: Callable[[], AbstractContextManager[None]]
    is_due: Callable[[int], bool]
    save: Callable[[RunState], None]
    evaluated: Callable[[int, float], None]
    should_stop: Callable[[int | None], bool]
    interrupted: Callable[[], bool]


def train(trainer: Trainer, start: RunState) -> None:
    """Run ESPO to the end, or until it is told to stop.

    A run that resumes makes the same steps to the bit as one that never stopped: sampling and
    evaluation that were broken off are done again, finished parts of a rollout are taken up.

    Args:
        trainer: the parts.
        start: where to begin.
    """
    espo, mu = trainer.espo, trainer.espo.updates_per_rollout
    progress = Progress(start.step, espo.num_rollouts * mu)
    if start.step >= espo.num_rollouts * mu and trainer.model.layout.is_reporter:
        say(
            f"The run has made all steps of its {espo.num_rollouts} rollouts; raise "
            "--espo-num-rollouts to go on."
        )
    if (start.step == 0 or start.evaluation_due) and _evaluate(trainer, start.step):
        return
    record = start.rollout
    for number in range(start.step // mu, espo.num_rollouts):
        clock = Clock()
        first = max(start.step - number * mu, 0)
        if record is None:
            rollout = _make_rollout(trainer, number, clock)
            if rollout is None:
                trainer.save(RunState(number * mu, watch=trainer.dashboard.watch.state()))
                return
            noise = _draw_noise(trainer, number, rollout)
            prepared = _evaluate_frozen_policies(trainer, rollout, noise, clock)
        else:
            refills = [Refill(*pair) for pair in record.get("refills", ())]
            prompts = local_share(_prompts(trainer, number, refills), trainer.model.layout)
            prepared = restore_rollout(record, prompts, trainer.model, trainer.tokenizer, espo)
            noise = _draw_noise(trainer, number, prepared.rollout)
            record = None
        left_out: list[float] = []
        for place in range(first, mu):
            prepared, scalars = _update(trainer, number, place, prepared, noise[place], clock)
            left_out.append(scalars["policy/without_backward"])
            done = number * mu + place + 1
            if place + 1 < mu:
                position = RunState(done)
                stop = trainer.should_stop(done)
            else:
                _report(trainer, number, prepared, scalars, clock, progress, left_out, noise)
                stop = _evaluation_follows(trainer, number + 1) and _evaluate(trainer, done)
                position = RunState(done, evaluation_due=stop)
                stop = stop or trainer.should_stop(done)
            if stop or trainer.is_due(done):
                inside = None
                if place + 1 < mu:
                    digest = prompts_digest(_prompts(trainer, number, prepared.rollout.refills))
                    inside = record_rollout(prepared, trainer.model.layout, digest)
                watch = trainer.dashboard.watch.state()
                trainer.save(replace(position, rollout=inside, watch=watch))
            if stop:
                return


def _prompts(trainer: Trainer, number: int, refills: Sequence[Refill] = ()) -> list[Prompt]:
    """The prompts of a rollout, of all ranks."""
    data, count = trainer.train_data, trainer.espo.prompts_per_rollout
    return prompts_of_rollout(
        number, count, data.examples, data.encoded, trainer.seed, data.shares, refills
    )


def _fp8(trainer: Trainer, phase: Phase) -> AbstractContextManager[None]:
    """The context of a phase, which computes in FP8 or does not."""
    return fp8_phase(trainer.model.chunks, phase, trainer.espo.fp8_phases)


def _look_out(trainer: Trainer, what: str) -> Callable[[Tensor], None]:
    """Make a hook for the sampler that breaks it off after a signal, and says that it goes on."""
    steps, heartbeat = 0, Heartbeat(what)

    def look(tokens: Tensor) -> None:
        nonlocal steps
        steps += 1
        if trainer.dashboard.is_reporter:
            heartbeat.beat()
        if steps % _STEPS_PER_LOOK == 0 and trainer.interrupted():
            raise Interrupted

    return look


def _make_rollout(trainer: Trainer, number: int, clock: Clock) -> Rollout | None:
    """Sample and score a rollout; None where the run is told to stop."""
    espo, model = trainer.espo, trainer.model
    completed = _complete(trainer, local_share(_prompts(trainer, number), model.layout), clock)
    if completed is None:
        return None
    refilled = Refilled(completed, (), None)
    if espo.refill:
        data, count = trainer.train_data, espo.prompts_per_rollout
        further = further_prompts(
            number, count, data.examples, data.encoded, trainer.seed, data.shares
        )
        complete = partial(_complete, trainer, clock=clock)
        again = refill(
            completed, further[: espo.refill], complete, espo.group_size, model.layout,
            model.stop_token_ids,
        )  # fmt: skip
        if again is None:
            return None
        refilled = again
    done, refills, discarded = refilled
    return assemble_rollout(
        model, done.prompts, done.generation, done.texts, done.scores, espo, refills, discarded
    )


def _complete(trainer: Trainer, prompts: Sequence[Prompt], clock: Clock) -> Completed | None:
    """Sample and score completions; None where the run is told to stop."""
    espo, generation, model = trainer.espo, None, trainer.model
    examples = [prompt.example for prompt in prompts for _ in range(espo.group_size)]
    ahead = ScoringAhead(
        trainer.task, examples, trainer.tokenizer, model.stop_token_ids, model.layout
    )
    with clock("rollout"), trainer.inference(), _fp8(trainer, "rollout"), suppress(Interrupted):
        generation = sample(
            model,
            prompts,
            trainer.rollout,
            espo.group_size,
            trainer.seed,
            _look_out(trainer, "sampling a rollout"),
            ahead,
        )
    # One copy of the model may have seen the signal while another finished: they agree here.
    if trainer.should_stop(None) or generation is None:
        ahead.cancel()
        return None
    with clock("reward"):
        texts = decode_completions(generation.completions, trainer.tokenizer, model.stop_token_ids)
        with raised_on_all(model.layout):
            scores = score_completions(trainer.task, examples, texts, model.layout, ahead.futures)
        return Completed(prompts, generation, texts, scores)


class _Noise(NamedTuple):
    """The masks of one inner update, cut into micro-batches, and what cuts some of them.

    Which tokens answer belongs to the rollout; None for objectives that do not ask.
    """

    views: ElboViews
    batches: list[ViewBatch]
    recut: Callable[..., list[ViewBatch]]
    answers: Answers | None


def _draw_noise(trainer: Trainer, number: int, rollout: Rollout) -> list[_Noise]:
    """Draw the masks of all inner updates, the same ones whenever a rollout is taken up."""
    espo, noise = trainer.espo, []
    objective, length = objective_of(espo), rollout.sequences.completion_length
    masks, answers = objective.masks(espo), None
    offsets = block_offsets(trainer.model, rollout.sequences)
    if objective.per_token:
        answers = answers_of(rollout.completion_lengths, length, trainer.model.layout)
    for place in range(espo.updates_per_rollout):
        ask = Ask(
            key=stream(trainer.seed, "elbo", number, place),
            sample_ids=rollout.sample_ids,
            indices=rollout.indices,
            total=espo.completions_per_rollout,
            length=length,
            num_draws=num_draws(espo),
            answers=(rollout.completion_lengths + 1).clamp(max=length),
            prompt_width=int(rollout.sequences.prompt_lengths.max()),
            block_length=trainer.rollout.block_length,
            offsets=offsets,
        )
        views, prompts = masks.draw(ask), masks.prompt_masks(ask)
        if trainer.model.logit_shift and prompts is not None:
            prompts[..., 0] = False  # such a model has never seen it masked
        recut = partial(
            cut_views,
            trainer.model,
            rollout.sequences,
            views,
            trainer.rows_per_batch,
            prompt_masks=prompts,
        )
        noise.append(_Noise(views, watch_routing(recut(), trainer.model), recut, answers))
    return noise


def _evaluate_frozen_policies(
    trainer: Trainer, rollout: Rollout, noise: Sequence[_Noise], clock: Clock
) -> PreparedRollout:
    """Evaluate all old and reference ELBOs, before the first step.

    The first update needs no old ELBO: there the current policy is the sampling policy.
    """
    objective = objective_of(trainer.espo)
    old: list[Tensor | None] = [None] * len(noise)
    reference: list[Tensor | None] = [None] * len(noise)
    passed = [n.batches for n in noise]

    def evaluate(policy: str, noise: Sequence[_Noise]) -> list[Tensor | None]:
        with noted_as(policy, passed):
            return [log_probabilities(trainer.model, n.batches, n.views, objective) for n in noise]

    if objective.compares_with_old:
        with clock("old_elbo"), trainer.inference(), _fp8(trainer, "elbo"):
            old[1:] = evaluate("old", noise[1:])
    if trainer.reference is not None:
        visit = trainer.reference.in_model
        with clock("ref_elbo"), trainer.inference(), _fp8(trainer, "elbo"), visit():
            reference = evaluate("reference", noise)
    return PreparedRollout(rollout, tuple(old), tuple(reference))


def _update(
    trainer: Trainer,
    number: int,
    place: int,
    prepared: PreparedRollout,
    noise: _Noise,
    clock: Clock,
) -> tuple[PreparedRollout, dict[str, float]]:
    """Make one optimizer step.

    Returns:
        The rollout with the old ELBO of this update, and what to report.
    """
    espo, rollout, model = trainer.espo, prepared.rollout, trainer.model
    objective, length = objective_of(espo), rollout.sequences.completion_length
    step = number * espo.updates_per_rollout + place + 1
    with clock("update"):
        for chunk in model.chunks:
            chunk.zero_grad_buffer()
        trainer.optimizer.zero_grad()
        elbo_ref = prepared.elbo_ref[place]
        with _fp8(trainer, "elbo"), noted_as("current", [noise.batches]):
            draws, again, left_out = accumulate_gradient(
                model,
                noise.batches,
                noise.views,
                prepared.elbo_old[place],
                elbo_ref,
                rollout.advantages,
                length,
                espo,
                espo.completions_per_rollout,
                noise.recut,
                noise.answers,
            )
        succeeded, norm, _ = trainer.optimizer.step()
        grad_norm = None if norm is None else float(norm)  # waits until the gradient is there
        if trainer.check_gradient:
            check_gradient(grad_norm, bool(succeeded), step)
        if succeeded:
            # Megatron's schedule counts samples: the rows of one update.
            trainer.scheduler.step(increment=espo.completions_per_rollout)
        if place == 0 and objective.compares_with_old:
            prepared = replace(prepared, elbo_old=(draws, *prepared.elbo_old[1:]))
        facts = Facts(
            prepared.elbo_old[place], elbo_ref, rollout.advantages, noise.views, length, espo,
            noise.answers, objective,
        )  # fmt: skip
        terms = objective.loss(draws, facts.given(draws, facts.tensors()))
    rate = float(trainer.optimizer.param_groups[0]["lr"])
    elbo = mean_log_probability(draws, noise.views)
    columns = update_columns(terms, elbo, left_out, length, model.layout)
    scalars = update_scalars(columns, grad_norm, bool(succeeded), rate)
    if place == 0:
        # The ratio of a rollout's first update must be 1.
        scalars |= first_ratio_scalars(draws, again, length, model.layout)
    scalars |= routing_scalars(noise.batches, model)
    trainer.dashboard.report(scalars, step)
    if place + 1 == espo.updates_per_rollout and "ratio" in columns:
        trainer.dashboard.histograms({"policy/ratio": columns["ratio"]}, step)
    interval = espo.reference_mix_interval
    if trainer.reference is not None and interval and step % interval == 0:
        # With overlapped parameter gathers, this rank holds the others' shards only from here on.
        with trainer.inference():
            trainer.reference.mix(espo.reference_mix)
    return prepared, scalars


def _report(
    trainer: Trainer,
    number: int,
    prepared: PreparedRollout,
    scalars: dict[str, float],
    clock: Clock,
    progress: Progress,
    left_out: Sequence[float],
    noise: Sequence[_Noise],
) -> None:
    """Write what a rollout did; ``left_out`` is a share of each update in this process."""
    espo, rollout, layout = trainer.espo, prepared.rollout, trainer.model.layout
    board = trainer.dashboard
    length = rollout.sequences.completion_length
    done = (number + 1) * espo.updates_per_rollout
    old = zip(prepared.elbo_old, noise, strict=True)
    elbos = [mean_log_probability(part, n.views) for part, n in old if part is not None]
    mine = elbo_noise_scalars(elbos, length, layout)
    columns = rollout_columns(rollout, espo, layout)
    mine |= rollout_scalars(columns, trainer.task.name, espo, length, clock)
    mine |= failure_scalars(take_failures(trainer.task, layout))
    width = rollout.sequences.tokens.size(1)
    work = columns["work"].sum(axis=0).tolist()
    mine |= board.throughput(width, espo, trainer.rollout, clock.seconds, left_out, work)
    mine |= board.hardware()
    board.report(mine, done)
    names = {
        "reward": "reward/completions",
        "advantage": "reward/advantage",
        "length": "rollout/completion_length",
    }
    board.histograms({name: columns[column] for column, name in names.items()}, done)
    if board.writer is not None:
        rows = zip(rollout.sequences.tokens, rollout.sequences.prompt_lengths, strict=True)
        prompts = [trainer.tokenizer.decode(row[:end].tolist()) for row, end in rows]
        write_samples(board.writer, rollout, prompts, done, espo.samples_to_log)
    if layout.is_reporter:
        left = progress.time_left(done)
        say(console_line(number + 1, espo.num_rollouts, scalars | mine, left))


def _evaluation_follows(trainer: Trainer, rollouts: int) -> bool:
    """Whether the policy is evaluated after so many rollouts."""
    interval = trainer.espo.eval_interval
    last = rollouts == trainer.espo.num_rollouts
    return last or bool(interval and rollouts % interval == 0)


def _evaluate(trainer: Trainer, step: int) -> bool:
    """Evaluate on the held-out problems; returns True if a signal broke it off."""
    if trainer.eval_data is None:
        return False
    with trainer.inference(), _fp8(trainer, "rollout"):
        result = evaluate_task(
            trainer.model,
            trainer.task,
            trainer.eval_data.examples,
            trainer.eval_data.encoded,
            trainer.tokenizer,
            trainer.rollout,
            trainer.seed,
            _look_out(trainer, "evaluating held-out problems"),
        )
    if result is None:
        return True
    scalars = {"eval/accuracy": result.accuracy, "eval/reward": result.reward}
    for name, part in result.by_task.items():
        scalars[f"eval/by_task/{name}/accuracy"] = part.accuracy
        scalars[f"eval/by_task/{name}/reward"] = part.reward
    trainer.dashboard.report(scalars, step)
    trainer.evaluated(step, result.accuracy)
    if trainer.model.layout.is_reporter:
        mu, last = trainer.espo.updates_per_rollout, trainer.espo.num_rollouts
        number = step // mu
        when = "before" if step == 0 else "after" if number == last else f"rollout {number}"
        tasks = ", ".join(f"{n} {100 * p.accuracy:.1f}%" for n, p in result.by_task.items())
        say(
            f"held-out ({when}): accuracy {100 * result.accuracy:.1f}%, reward "
            f"{result.reward:.3f} on {result.num_problems} problems{f' ({tasks})' if tasks else ''}"
        )
    return False
