"""The ESPO loop (arXiv 2512.03759, algorithm 1): rollout, score, ELBOs, updates.

It owns its step, because rollouts need all pipeline stages at once, and calls Megatron for the
model passes, the optimizer, the scheduler and checkpoints.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from megatron_espo.config import EspoConfig, RolloutConfig
from megatron_espo.data.batch import ViewBatch, view_batches
from megatron_espo.diffusion.noise import ElboViews, elbo_views
from megatron_espo.model.handle import DiffusionModel
from megatron_espo.monitor.metrics import gather_columns, statistics
from megatron_espo.monitor.progress import Progress
from megatron_espo.monitor.tensorboard import write_samples, write_scalars
from megatron_espo.random import stream
from megatron_espo.rl.elbo import elbo_of_views
from megatron_espo.rl.evaluate import Evaluation, evaluate_task
from megatron_espo.rl.losses import EspoTerms, espo_terms
from megatron_espo.rl.prompts import prompts_of_rollout
from megatron_espo.rl.reference import ReferencePolicy
from megatron_espo.rl.rollout import local_share, sample, score_rollout
from megatron_espo.rl.types import Rollout
from megatron_espo.rl.update import accumulate_gradient
from megatron_espo.tasks.base import Example, Task


@dataclass(frozen=True)
class TaskData:
    """A task's problems with their prompts as token ids.

    Attributes:
        examples: the problems.
        encoded: their prompts.
    """

    examples: Sequence[Example]
    encoded: Sequence[tuple[int, ...]]


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
        writer: TensorBoard writer on the reporting rank, else None.
        inference: context in which the policy is evaluated without gradients.
        save: called when a rollout ends with the number of optimizer steps and whether the run
            stops here; saves if it is time.
        should_stop: asked when a rollout ends, with the number of optimizer steps; True ends the
            run early, saved.
    """

    model: DiffusionModel
    reference: ReferencePolicy | None
    optimizer: Any
    scheduler: Any
    tokenizer: PreTrainedTokenizerFast
    task: Task
    train_data: TaskData
    eval_data: TaskData | None
    espo: EspoConfig
    rollout: RolloutConfig
    seed: int
    rows_per_batch: int
    writer: Any
    inference: Callable[[], AbstractContextManager[None]]
    save: Callable[[int, bool], None]
    should_stop: Callable[[int], bool]


def train(trainer: Trainer, first_step: int) -> None:
    """Run ESPO to the end.

    Args:
        trainer: the parts.
        first_step: optimizer steps done before; a multiple of the updates per rollout.
    """
    espo = trainer.espo
    mu = espo.updates_per_rollout
    first = first_step // mu
    progress = Progress(first, espo.num_rollouts)
    if first == 0:
        _evaluate(trainer, 0, "before")
    for number in range(first, espo.num_rollouts):
        clock = _Clock()
        rollout = _make_rollout(trainer, number, clock)
        scalars = _update_policy(trainer, number, rollout, clock)
        done = (number + 1) * mu
        scalars |= _rollout_scalars(trainer, rollout, clock)
        write_scalars(trainer.writer, scalars, done)
        write_samples(
            trainer.writer, rollout, _prompt_texts(trainer, rollout), done, espo.samples_to_log
        )
        _print_line(trainer, number, scalars, progress)
        last = number + 1 == espo.num_rollouts
        if last or (espo.eval_interval and (number + 1) % espo.eval_interval == 0):
            _evaluate(trainer, done, "after" if last else f"rollout {number + 1}")
        # Asked once: the ranks agree on the answer, and a signal may come at any moment.
        stop = trainer.should_stop(done)
        trainer.save(done, stop)
        if stop:
            break


def _make_rollout(trainer: Trainer, number: int, clock: "_Clock") -> Rollout:
    espo, data = trainer.espo, trainer.train_data
    prompts = local_share(
        prompts_of_rollout(
            number, espo.prompts_per_rollout, data.examples, data.encoded, trainer.seed
        ),
        trainer.model.layout,
    )
    with clock("rollout"), trainer.inference():
        generation, sample_ids = sample(
            trainer.model, prompts, trainer.rollout, espo.group_size, trainer.seed
        )
    with clock("reward"):
        return score_rollout(
            trainer.model, trainer.task, trainer.tokenizer, prompts, generation, sample_ids, espo
        )


@dataclass(frozen=True)
class _Update:
    """The noise of one inner update and what the frozen policies say under it."""

    views: ElboViews
    batches: list[ViewBatch]
    elbo_old: Tensor | None
    elbo_ref: Tensor | None


def _prepare_updates(
    trainer: Trainer, number: int, rollout: Rollout, clock: "_Clock"
) -> list[_Update]:
    """Draw the masks of all inner updates and evaluate the frozen policies under them.

    All old and reference ELBOs come before the first step. The first update needs no old ELBO:
    there the current policy is the sampling policy.
    """
    espo = trainer.espo
    noise = []
    for update in range(espo.updates_per_rollout):
        views = elbo_views(
            espo.elbo_estimator,
            stream(trainer.seed, "elbo", number, update),
            rollout.sample_ids,
            rollout.indices,
            espo.completions_per_rollout,
            rollout.sequences.completion_length,
            espo.num_mc,
            independent_draws=espo.kl_estimator == "k2_unbiased",
        )
        batches = view_batches(
            rollout.sequences,
            views,
            trainer.model.mask_token_id,
            trainer.model.vocab_size,
            trainer.rows_per_batch,
        )
        noise.append((views, batches))
    old: list[Tensor | None] = [None] * len(noise)
    reference: list[Tensor | None] = [None] * len(noise)
    with clock("old_elbo"), trainer.inference():
        for update, (views, batches) in enumerate(noise[1:], start=1):
            old[update] = elbo_of_views(trainer.model, batches, views)
    if trainer.reference is not None:
        with clock("ref_elbo"), trainer.inference(), trainer.reference.in_model():
            for update, (views, batches) in enumerate(noise):
                reference[update] = elbo_of_views(trainer.model, batches, views)
    return [
        _Update(views, batches, old[i], reference[i]) for i, (views, batches) in enumerate(noise)
    ]


def _update_policy(
    trainer: Trainer, number: int, rollout: Rollout, clock: "_Clock"
) -> dict[str, float]:
    """Make the rollout's optimizer steps; returns what to report of them."""
    espo, length = trainer.espo, rollout.sequences.completion_length
    updates = _prepare_updates(trainer, number, rollout, clock)
    elbos: list[Tensor] = []
    scalars: dict[str, float] = {}
    for place, update in enumerate(updates):
        step = number * espo.updates_per_rollout + place + 1
        with clock("update"):
            for chunk in trainer.model.chunks:
                chunk.zero_grad_buffer()
            trainer.optimizer.zero_grad()
            draws = accumulate_gradient(
                trainer.model,
                update.batches,
                update.views,
                update.elbo_old,
                update.elbo_ref,
                rollout.advantages,
                length,
                espo,
                espo.completions_per_rollout,
            )
            succeeded, grad_norm, _ = trainer.optimizer.step()
            if succeeded:
                # Megatron's schedule counts samples: the rows of one update.
                trainer.scheduler.step(increment=espo.completions_per_rollout)
            old = draws if update.elbo_old is None else update.elbo_old
            terms = espo_terms(draws, old, update.elbo_ref, rollout.advantages, length, espo)
        elbos.append(old.mean(dim=1))
        scalars = _update_scalars(trainer, terms, draws, grad_norm, bool(succeeded), place)
        write_scalars(trainer.writer, scalars, step)
        if (
            trainer.reference is not None
            and espo.reference_mix_interval
            and step % espo.reference_mix_interval == 0
        ):
            trainer.reference.mix(espo.reference_mix)
    if len(elbos) > 1:
        # The same policy under mu independent sets of masks: the estimator's own noise.
        spread = torch.stack(elbos).var(dim=0) / length**2
        gathered = gather_columns({"variance": spread.tolist()}, trainer.model.layout)
        scalars["elbo/mc_variance_per_token"] = float(gathered["variance"].mean())
    return scalars


def _update_scalars(
    trainer: Trainer,
    terms: EspoTerms,
    draws: Tensor,
    grad_norm: float | None,
    succeeded: bool,
    place: int,
) -> dict[str, float]:
    length = trainer.rollout.completion_length
    columns = gather_columns(
        {
            "loss": terms.loss.tolist(),
            "ratio": terms.ratio.tolist(),
            "kl": terms.kl.tolist(),
            "clip_low": terms.clipped_low.double().tolist(),
            "clip_high": terms.clipped_high.double().tolist(),
            "elbo": (draws.mean(dim=1) / length).tolist(),
        },
        trainer.model.layout,
    )
    scalars = {
        "policy/loss": float(columns["loss"].mean()),
        **statistics(columns, "ratio", "policy/ratio"),
        "policy/kl_per_token": float(columns["kl"].mean()),
        "policy/clip_fraction_low": float(columns["clip_low"].mean()),
        "policy/clip_fraction_high": float(columns["clip_high"].mean()),
        "policy/grad_norm": float(grad_norm if grad_norm is not None else 0.0),
        "policy/learning_rate": float(trainer.optimizer.param_groups[0]["lr"]),
        "policy/skipped_step": float(not succeeded),
        **statistics(columns, "elbo", "elbo/per_token"),
    }
    if place == 0:
        scalars["policy/ratio_first_update/max_deviation"] = float(
            abs(columns["ratio"] - 1.0).max()
        )
    return scalars


def _rollout_scalars(trainer: Trainer, rollout: Rollout, clock: "_Clock") -> dict[str, float]:
    espo, layout = trainer.espo, trainer.model.layout
    groups = rollout.rewards.view(-1, espo.group_size)
    metrics = sorted({name for score in rollout.scores for name in score.metrics})
    columns = gather_columns(
        {
            "reward": rollout.rewards.tolist(),
            "correct": [float(score.correct) for score in rollout.scores],
            "no_spread": (groups.amax(1) == groups.amin(1)).double().tolist(),
            "length": rollout.completion_lengths.double().tolist(),
            **{
                f"metric/{name}": [s.metrics[name] for s in rollout.scores if name in s.metrics]
                for name in metrics
            },
        },
        layout,
    )
    seconds = clock.seconds
    generated = espo.completions_per_rollout * trainer.rollout.completion_length
    return {
        "reward/mean": float(columns["reward"].mean()),
        "reward/std": float(columns["reward"].std()),
        "reward/correct": float(columns["correct"].mean()),
        "reward/zero_std_groups": float(columns["no_spread"].mean()),
        **{
            f"reward/{name.removeprefix('metric/')}": float(values.mean())
            for name, values in columns.items()
            if name.startswith("metric/")
        },
        **statistics(columns, "length", "rollout/completion_length"),
        "rollout/num_evaluations": float(rollout.num_evaluations),
        "performance/tokens_per_second": generated / sum(seconds.values()),
        "performance/rollout_tokens_per_second": generated / max(seconds["rollout"], 1e-9),
        **{f"time/{name}": value for name, value in seconds.items()},
    }


def _prompt_texts(trainer: Trainer, rollout: Rollout) -> list[str]:
    if trainer.writer is None:
        return []
    rows = zip(rollout.sequences.tokens, rollout.sequences.prompt_lengths, strict=True)
    return [trainer.tokenizer.decode(row[:length].tolist()) for row, length in rows]


def _evaluate(trainer: Trainer, step: int, when: str) -> Evaluation | None:
    if trainer.eval_data is None:
        return None
    with trainer.inference():
        result = evaluate_task(
            trainer.model,
            trainer.task,
            trainer.eval_data.examples,
            trainer.eval_data.encoded,
            trainer.tokenizer,
            trainer.rollout,
            trainer.seed,
        )
    write_scalars(
        trainer.writer,
        {"eval/accuracy": result.accuracy, "eval/reward": result.reward},
        step,
    )
    if trainer.model.layout.is_reporter:
        print(
            f"held-out ({when}): accuracy {100 * result.accuracy:.1f}%, reward "
            f"{result.reward:.3f} on {result.num_problems} problems",
            flush=True,
        )
    return result


def _print_line(
    trainer: Trainer, number: int, scalars: dict[str, float], progress: Progress
) -> None:
    if not trainer.model.layout.is_reporter:
        return
    phases = ", ".join(
        f"{name.removeprefix('time/')} {value:.2f}"
        for name, value in scalars.items()
        if name.startswith("time/")
    )
    total = sum(value for name, value in scalars.items() if name.startswith("time/"))
    print(
        f"rollout {number + 1}/{trainer.espo.num_rollouts} | "
        f"reward {scalars['reward/mean']:.3f} ± {scalars['reward/std']:.3f} | "
        f"correct {100 * scalars['reward/correct']:.1f}% | "
        f"ratio {scalars['policy/ratio/min']:.3f}-{scalars['policy/ratio/max']:.3f} | "
        f"kl {scalars['policy/kl_per_token']:.2e} | grad {scalars['policy/grad_norm']:.3f} | "
        f"{total:.2f}s ({phases}) | left {progress.time_left(number + 1)}",
        flush=True,
    )


class _Clock:
    """Wall-clock seconds by phase; every phase ends with its results on the host."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        spent = time.perf_counter() - started
        self.seconds[phase] = self.seconds.get(phase, 0.0) + spent
