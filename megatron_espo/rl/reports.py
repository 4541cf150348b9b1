"""What a run says of its rollouts, and of the policy on held-out problems."""

from collections.abc import Sequence

from megatron_espo.console import say
from megatron_espo.diffusion.noise import ElboViews
from megatron_espo.evaluation.completing import evaluate_task
from megatron_espo.monitor.progress import Progress
from megatron_espo.rl.rollout import take_failures
from megatron_espo.rl.run import Trainer, look_out, precision
from megatron_espo.rl.samples_table import write_samples
from megatron_espo.rl.scalars import (
    Clock,
    console_line,
    elbo_noise_scalars,
    failure_scalars,
    rollout_columns,
    rollout_scalars,
)
from megatron_espo.rl.terms import mean_log_probability
from megatron_espo.rl.types import PreparedRollout


def report_rollout(
    trainer: Trainer,
    number: int,
    prepared: PreparedRollout,
    scalars: dict[str, float],
    clock: Clock,
    progress: Progress,
    left_out: Sequence[float],
    views: Sequence[ElboViews],
) -> None:
    """Write what a rollout did; ``left_out`` is a share of each update in this process."""
    espo, rollout, layout = trainer.espo, prepared.rollout, trainer.model.layout
    board = trainer.dashboard
    length = rollout.sequences.completion_length
    done = (number + 1) * espo.updates_per_rollout
    old = zip(prepared.elbo_old, views, strict=True)
    elbos = [mean_log_probability(part, v) for part, v in old if part is not None]
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


def evaluation_follows(trainer: Trainer, rollouts: int) -> bool:
    """Whether the policy is evaluated after so many rollouts."""
    interval = trainer.espo.eval_interval
    last = rollouts == trainer.espo.num_rollouts
    return last or bool(interval and rollouts % interval == 0)


def evaluate_policy(trainer: Trainer, step: int) -> bool:
    """Evaluate on the held-out problems; returns True if a signal broke it off."""
    if trainer.eval_data is None:
        return False
    with trainer.inference(), precision(trainer, "rollout"):
        result = evaluate_task(
            trainer.model,
            trainer.task,
            trainer.eval_data.examples,
            trainer.eval_data.encoded,
            trainer.tokenizer,
            trainer.rollout,
            trainer.seed,
            look_out(trainer, "evaluating held-out problems"),
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
