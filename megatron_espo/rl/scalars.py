"""What the ESPO loop reports of a rollout and of its updates."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_espo.config import EspoConfig
from megatron_espo.monitor.metrics import Columns, gather_columns, statistics
from megatron_espo.objectives import Loss
from megatron_espo.parallel.layout import Layout
from megatron_espo.rewards.workers import Failures
from megatron_espo.rl.types import Discarded, Rollout

# What objectives report by these names, and the scalars that they are.
_NAMES = {
    "ratio": "policy/ratio",
    "kl": "policy/kl_per_token",
    "clip_low": "policy/clip_fraction_low",
    "clip_high": "policy/clip_fraction_high",
    "effective_sample_size": "policy/effective_sample_size",
}


class Clock:
    """Wall-clock seconds by phase; every phase ends with its results on the host."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the time inside the context to a phase."""
        started = time.perf_counter()
        yield
        spent = time.perf_counter() - started
        self.seconds[phase] = self.seconds.get(phase, 0.0) + spent


def update_columns(
    terms: Loss, elbo: Tensor, left_out: int, length: int, layout: Layout
) -> Columns:
    """Gather what an optimizer step says of each completion of the global batch.

    Args:
        terms: loss terms of this rank's completions.
        elbo: float32 ``[n]``, their log-probability under the current policy, in nats.
        left_out: how many of them had no backward pass.
        length: completion length.
        layout: process groups.

    Returns:
        Columns, equal on all ranks.
    """
    return gather_columns(
        {
            **{name: values.double().tolist() for name, values in terms.statistics.items()},
            "loss": terms.loss.tolist(),
            "elbo": (elbo / length).tolist(),
            "left_out": [float(left_out)],
        },
        layout,
    )


class Made(NamedTuple):
    """An optimizer step.

    Attributes:
        succeeded: whether the optimizer made it.
        grad_norm: norm before clipping, or None where Megatron gives none.
        learning_rate: the next step's, once the scheduler has moved.
    """

    succeeded: bool
    grad_norm: float | None
    learning_rate: float


def update_scalars(columns: Columns, made: Made) -> dict[str, float]:
    """Summarise an optimizer step.

    Args:
        columns: from :func:`update_columns`.
        made: the step.

    Returns:
        Named numbers, equal on all ranks.
    """
    own: dict[str, float] = {}
    for name in columns.keys() - {"loss", "elbo", "left_out"}:
        if name == "ratio" or name not in _NAMES:
            own |= statistics(columns, name, f"policy/{name}")
        else:
            own[_NAMES[name]] = float(columns[name].mean())
    if "ratio" in columns and "effective_sample_size" not in columns:
        ratio = columns["ratio"]
        own["policy/effective_sample_size"] = float(
            ratio.sum() ** 2 / (len(ratio) * (ratio**2).sum())
        )
    return {
        "policy/loss": float(columns["loss"].mean()),
        **own,
        "policy/without_backward": float(columns["left_out"].sum()) / len(columns["loss"]),
        **optimizer_scalars(made),
        **statistics(columns, "elbo", "elbo/per_token"),
    }


def optimizer_scalars(made: Made) -> dict[str, float]:
    """Name what an optimizer step was like."""
    return {
        "policy/grad_norm": float(made.grad_norm if made.grad_norm is not None else 0.0),
        "policy/learning_rate": made.learning_rate,
        "policy/skipped_step": float(not made.succeeded),
    }


def first_ratio_scalars(
    draws: Tensor, again: Tensor | None, length: int, layout: Layout
) -> dict[str, float]:
    """Measure how far the ratio of a rollout's first update is off 1.

    There the sampling policy is the current one, whose ELBO the loss takes for both. What can
    differ is a second evaluation of it: the pass with gradients.

    Args:
        draws: float32 ``[n, m]``, ELBO draws without gradients; or ``[n, m, v, l]``, tokens.
        again: the same with gradients, or None with one pass only.
        length: completion length.
        layout: process groups.

    Returns:
        The largest distance over all completions.
    """
    apart = torch.zeros(len(draws))
    if again is not None and draws.dim() == 2:
        apart = (again - draws).mean(dim=1) / length
    elif again is not None:
        apart = (again - draws).flatten(1).abs().amax(dim=1)
    columns = gather_columns({"deviation": apart.double().expm1().abs().tolist()}, layout)
    return {"policy/ratio_first_update/max_deviation": float(columns["deviation"].max())}


def elbo_noise_scalars(elbos: Sequence[Tensor], length: int, layout: Layout) -> dict[str, float]:
    """Measure the ELBO estimator's own noise: one policy under mu independent sets of masks.

    Args:
        elbos: per update float32 ``[n]``, the sampling policy's ELBO in nats per completion.
        length: completion length.
        layout: process groups.

    Returns:
        The variance per completion in nats per token squared; nothing for a single update.
    """
    if len(elbos) < 2:
        return {}
    spread = torch.stack(list(elbos)).var(dim=0) / length**2
    gathered = gather_columns({"variance": spread.tolist()}, layout)
    return {"elbo/mc_variance_per_token": float(gathered["variance"].mean())}


def identical_completions(completions: Tensor, group_size: int) -> list[float]:
    """Mark the completions that another one of their group equals.

    Args:
        completions: int64 ``[n, l]``, group by group.
        group_size: completions of a group.

    Returns:
        1 or 0 for each.
    """
    groups = completions.unflatten(0, (-1, group_size))
    same = (groups[:, :, None] == groups[:, None]).all(dim=-1).sum(dim=-1)
    found: list[float] = (same > 1).flatten().double().tolist()
    return found


def rollout_columns(rollout: Rollout, espo: EspoConfig, layout: Layout) -> Columns:
    """Gather what a rollout says of each of its completions, of replaced ones, too.

    Args:
        rollout: this rank's completions.
        espo: ESPO settings.
        layout: process groups.

    Returns:
        Columns, equal on all ranks.
    """
    # What was sampled is reported whether or not it is learnt from.
    parts: list[Rollout | Discarded] = [rollout]
    if rollout.discarded is not None:
        parts.append(rollout.discarded)
    scores = [score for part in parts for score in part.scores]
    rewards = torch.tensor([score.reward for score in scores], dtype=torch.float64)
    groups = rewards.view(-1, espo.group_size)
    own: dict[str, list[float]] = {}
    for score in scores:
        # Metrics of several tasks stay apart.
        within = "" if score.task is None else f"{score.task}/"
        for name, value in score.metrics.items():
            own.setdefault(f"metric/{within}{name}", []).append(value)
        if score.task is not None:
            own.setdefault(f"reward of {score.task}", []).append(score.reward)
            own.setdefault(f"correct of {score.task}", []).append(float(score.correct))

    def sampled(name: str) -> list[float]:
        values: list[float] = torch.cat([getattr(part, name) for part in parts]).double().tolist()
        return values

    columns: dict[str, Sequence[float]] = {
        "reward": rewards.tolist(),
        "advantage": rollout.advantages.double().tolist(),
        "correct": [float(score.correct) for score in scores],
        "no_spread": (groups.amax(1) == groups.amin(1)).double().tolist(),
        "identical": identical_completions(rollout.sequences.completions(), espo.group_size),
        "length": sampled("completion_lengths"),
        "nfe": sampled("num_evaluations"),
        "committed": sampled("num_committed"),
        "confidence": sampled("mean_confidence"),
        "work": sampled("work"),
        **own,
    }
    return gather_columns(columns, layout)


def rollout_scalars(
    columns: Columns, task: str, espo: EspoConfig, length: int, clock: Clock
) -> dict[str, float]:
    """Summarise a rollout over all its completions.

    Args:
        columns: from :func:`rollout_columns`.
        task: the task's name.
        espo: ESPO settings.
        length: completion length.
        clock: seconds of the rollout's phases.

    Returns:
        Named numbers; those under ``time/`` and ``performance/`` are this rank's.
    """
    seconds = clock.seconds
    generated = len(columns["reward"]) * length
    further = len(columns["reward"]) // espo.group_size - espo.prompts_per_rollout
    return {
        "reward/mean": float(columns["reward"].mean()),
        "reward/std": float(columns["reward"].std()),
        "reward/correct": float(columns["correct"].mean()),
        **_by_task(columns, task),
        "reward/zero_std_groups": float(columns["no_spread"].mean()),
        **{
            f"reward/{name.removeprefix('metric/')}": float(values.mean())
            for name, values in columns.items()
            if name.startswith("metric/")
        },
        **statistics(columns, "length", "rollout/completion_length"),
        "rollout/nfe": float(columns["nfe"].mean()),
        "rollout/tokens_per_step": float(columns["committed"].sum() / columns["nfe"].sum()),
        "rollout/confidence": float(columns["confidence"].mean()),
        "rollout/identical_completions": float(np.mean(columns["identical"])),
        **({"rollout/further_prompts": float(further)} if espo.refill else {}),
        "performance/tokens_per_second": generated / sum(seconds.values()),
        **(
            {"performance/rollout_tokens_per_second": generated / max(seconds["rollout"], 1e-9)}
            if "rollout" in seconds
            else {}  # sampled before the run was resumed
        ),
        **{f"time/{name}": value for name, value in seconds.items()},
    }


def _by_task(columns: Columns, task: str) -> dict[str, float]:
    """Summarise rewards task by task: those of a run of several, or of several runs."""
    tasks = [name.removeprefix("reward of ") for name in columns if name.startswith("reward of ")]
    if not tasks:
        # Runs of different tasks in one TensorBoard stay apart.
        return {
            f"reward/by_task/{task}/mean": float(columns["reward"].mean()),
            f"reward/by_task/{task}/correct": float(columns["correct"].mean()),
        }
    scalars: dict[str, float] = {}
    for name in tasks:
        rewards = columns[f"reward of {name}"]
        scalars |= {
            f"reward/by_task/{name}/mean": float(rewards.mean()),
            f"reward/by_task/{name}/correct": float(columns[f"correct of {name}"].mean()),
            f"reward/by_task/{name}/share": len(rewards) / len(columns["reward"]),
        }
    return scalars


def failure_scalars(failures: Failures) -> dict[str, float]:
    """Name what went wrong in reward workers since the last report.

    Args:
        failures: counted over all ranks.

    Returns:
        Named numbers.
    """
    return {
        "reward/timeouts": float(failures.timeouts),
        "reward/crashes": float(failures.crashes),
    }


def console_line(number: int, total: int, scalars: Mapping[str, float], time_left: str) -> str:
    """Write a rollout's line for the console.

    Args:
        number: rollouts done.
        total: rollouts of the run.
        scalars: the rollout's numbers and those of its last update.
        time_left: for people.

    Returns:
        The line.
    """
    times = {
        name.removeprefix("time/"): value
        for name, value in scalars.items()
        if name.startswith("time/")
    }
    phases = ", ".join(f"{name} {value:.2f}" for name, value in times.items())
    # Of several tasks only those have a share.
    shares = [name.removesuffix("/share") for name in scalars if name.endswith("/share")]
    tasks = ", ".join(
        f"{tag.removeprefix('reward/by_task/')} {100 * scalars[f'{tag}/correct']:.1f}%"
        for tag in shares
    )
    policy = [
        f"ratio {scalars['policy/ratio/min']:.3f}-{scalars['policy/ratio/max']:.3f} | "
        if "policy/ratio/min" in scalars
        else "",
        f"kl {scalars['policy/kl_per_token']:.2e} | " if "policy/kl_per_token" in scalars else "",
    ]
    return (
        f"rollout {number}/{total} | "
        f"reward {scalars['reward/mean']:.3f} ± {scalars['reward/std']:.3f} | "
        f"correct {100 * scalars['reward/correct']:.1f}%{f' ({tasks})' if tasks else ''} | "
        f"{''.join(policy)}grad {scalars['policy/grad_norm']:.3f} | "
        f"{sum(times.values()):.2f}s ({phases}) | left {time_left}"
    )
