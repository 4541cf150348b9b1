"""What the ESPO loop works with, and where a run is."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_espo.config import EspoConfig, RolloutConfig
from megatron_espo.data.tokenizer import FastTokenizer
from megatron_espo.evaluation.problems import TaskData
from megatron_espo.generation.sampler import Interrupted
from megatron_espo.model.fp8 import Phase, fp8_phase
from megatron_espo.model.handle import DiffusionModel
from megatron_espo.monitor.dashboard import Dashboard
from megatron_espo.monitor.progress import Heartbeat
from megatron_espo.monitor.watch import WatchState
from megatron_espo.rl.reference import Reference
from megatron_espo.rl.resume import RolloutRecord
from megatron_espo.rl.scalars import Made
from megatron_espo.rl.update import check_gradient
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
class Loop:
    """What any loop works with, and what it asks of Megatron.

    Attributes:
        model: the policy.
        optimizer: Megatron's optimizer.
        scheduler: Megatron's learning-rate scheduler.
        seed: the run's seed.
        rows_per_batch: views of a micro-batch.
        dashboard: where reports go.
        check_gradient: whether a gradient that is not finite ends the run.
        inference: context in which the policy is evaluated without gradients.
        is_due: asked after every optimizer step whether it is time to save.
        save: saves the run at a position.
        evaluated: gets the held-out accuracy of a step, before ``is_due`` is asked for it.
        should_stop: asked with the number of steps after each, and with None in between; True ends
            the run, saved. All ranks ask together and get the same answer.
    """

    model: DiffusionModel
    optimizer: Any
    scheduler: Any
    seed: int
    rows_per_batch: int
    dashboard: Dashboard
    check_gradient: bool
    inference: Callable[[], AbstractContextManager[None]]
    is_due: Callable[[int], bool]
    save: Callable[[RunState], None]
    evaluated: Callable[[int, float], None]
    should_stop: Callable[[int | None], bool]

    def clear_gradients(self) -> None:
        """Begin an optimizer step."""
        for chunk in self.model.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def make_step(self, step: int, samples: int) -> Made:
        """Let the optimizer make a step with the gradients that are there.

        Args:
            step: its number.
            samples: rows of it, which Megatron's schedule counts.

        Raises:
            UserError: the gradient is not finite.
        """
        succeeded, norm, _ = self.optimizer.step()
        grad_norm = None if norm is None else float(norm)  # waits until the gradient is there
        if self.check_gradient:
            check_gradient(grad_norm, bool(succeeded), step)
        if succeeded:
            self.scheduler.step(increment=samples)
        return Made(bool(succeeded), grad_norm, float(self.optimizer.param_groups[0]["lr"]))


@dataclass(frozen=True)
class Trainer(Loop):
    """Everything ESPO's loop works with.

    Attributes:
        reference: the reference policy, or None without a KL penalty.
        tokenizer: the tokenizer.
        task: the task.
        train_data: problems to train on.
        eval_data: held-out problems, or None.
        espo: ESPO settings.
        rollout: sampling settings.
        interrupted: whether a signal asks to stop; the ranks of one copy of the model ask together.
    """

    reference: Reference | None
    tokenizer: FastTokenizer
    task: Task
    train_data: TaskData
    eval_data: TaskData | None
    espo: EspoConfig
    rollout: RolloutConfig
    interrupted: Callable[[], bool]


def precision(trainer: Trainer, phase: Phase) -> AbstractContextManager[None]:
    """The context of a phase, which computes in FP8 or does not."""
    return fp8_phase(trainer.model.chunks, phase, trainer.espo.fp8_phases)


def look_out(trainer: Trainer, what: str) -> Callable[[Tensor], None]:
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
