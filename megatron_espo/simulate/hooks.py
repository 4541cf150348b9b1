"""Where the simulation takes hold of the entry points: phases, stand-ins, and what is cut short.

The job's own code runs; its functions are wrapped from outside. A run is cut to a few denoising
steps, micro-batches and updates of the full size, so that its peaks are those of the whole run.
"""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.datasets.utils import Split
from megatron.training import get_args
from megatron.training import training as megatron_training
from torch import Tensor

from megatron_espo.checkpoint import weights_mark
from megatron_espo.commands import evaluate as evaluation
from megatron_espo.commands import generate
from megatron_espo.dry_run.job import Job
from megatron_espo.evaluation import problems, scoring
from megatron_espo.generation import sampler
from megatron_espo.model import block_attention
from megatron_espo.objectives import objective_of, views_per_completion
from megatron_espo.parallel.layout import Layout, object_from_first_of_samples
from megatron_espo.rl import reports, run, scalars, state, trainer, update
from megatron_espo.rl.reference import ReferencePolicy
from megatron_espo.rl.types import Prompt, Rollout, SampledRollout, Sampling
from megatron_espo.simulate import stand_ins
from megatron_espo.simulate.experts import balance_experts
from megatron_espo.simulate.ledger import Ledger, size_of
from megatron_espo.simulate.repeats import repeat_alike
from megatron_espo.supervised import forward_step
from megatron_espo.training import espo, pretrain

# Imported for what is replaced in them.
_ENTRY_POINTS = (espo, pretrain, evaluation, generate)

# Denoising steps of what is not a rollout.
_STEPS_ELSEWHERE = 2
# Denoising steps between looks for signals: few, so that a short rollout has looks.
_STEPS_PER_LOOK = 2
# Drawn tokens until an end of text.
_MEAN_LENGTH = 100
_SAVE = "save_checkpoint"


class _Enough(Exception):
    """Ends a rollout after the steps that are simulated."""


def replace_everywhere(function: Any, replacement: Any) -> None:
    """Put a function in another's place in every module of the package that imported it."""
    name = function.__name__
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("megatron_espo.") and (
            getattr(module, name, None) is function
        ):
            setattr(module, name, replacement)


def install(job: Job, ledger: Ledger) -> None:
    """Wrap the entry points of this process.

    Args:
        job: what is run, and how far.
        ledger: the rank's books.
    """
    hooks = _Hooks(job, ledger)
    hooks.phases()
    hooks.sampling()
    hooks.reinforcement()
    hooks.pretraining()
    balance_experts()
    if job.repeat:
        repeat_alike(ledger)
    replace_everywhere(problems.load_workers, lambda config: stand_ins.StandInTask())
    stand_ins.replace_checkpoint_files(ledger)
    replace_everywhere(weights_mark.fingerprint, stand_ins.mark_of_base)


class _Hooks:
    """The wrappers of one rank."""

    def __init__(self, job: Job, ledger: Ledger) -> None:
        self.job, self.ledger = job, ledger
        self._draws = 0

    # ---- phases

    def _in_phase(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self.ledger.phase_of(name):
                return function(*args, **kwargs)

        return wrapped

    def phases(self) -> None:
        """Name the parts of a run."""
        for function, name in (
            ("setup_model_and_optimizer", "build"),
            ("load_checkpoint", "load"),
            ("evaluate_and_print_results", "evaluation"),
            ("training_log", "log"),
            ("post_training_step_callbacks", "log"),
            ("checkpoint_and_decide_exit", "stop?"),
        ):
            wrapped = self._in_phase(name, getattr(megatron_training, function))
            setattr(megatron_training, function, wrapped)
        for module in (megatron_training, state):
            setattr(module, _SAVE, self._in_phase("save", getattr(module, _SAVE)))
        for owner, method, name in (
            (ReferencePolicy, "__init__", "reference"),
            (ReferencePolicy, "save", "save"),
            (ReferencePolicy, "mix", "mix"),
            (state.StopRequest, "agreed", "stop?"),
        ):
            setattr(owner, method, self._in_phase(name, getattr(owner, method)))
        create = ReferencePolicy.__init__

        @functools.wraps(create)
        def weighed(own: Any, chunks: Any, *rest: Any) -> None:
            create(own, chunks, *rest)
            parameters = [p for chunk in chunks for p in chunk.parameters()]
            self.ledger.rank.facts["weights"] = sum(size_of(p.data) for p in parameters)

        setattr(ReferencePolicy, "__init__", weighed)  # noqa: B010
        clock, ledger = scalars.Clock.__call__, self.ledger

        @contextlib.contextmanager
        def timed(own: scalars.Clock, phase: str) -> Iterator[None]:
            with ledger.phase_of(phase), clock(own, phase):
                yield

        scalars.Clock.__call__ = timed  # type: ignore[method-assign, assignment]
        passes = self._in_phase("update: passes", update.accumulate_gradient)
        replace_everywhere(update.accumulate_gradient, passes)
        replace_everywhere(
            reports.evaluate_policy, self._in_phase("evaluation", reports.evaluate_policy)
        )

    # ---- sampling

    def sampling(self) -> None:
        """Draw tokens that the host knows, and stop after a few steps."""
        replace_everywhere(sampler._evaluate, self._evaluate)
        # There is nothing to compile for.
        block_attention._skips = False
        replace_everywhere(sampler.generate, self._generate)

    def _evaluate(self, model: Any, *rest: Any, **named: Any) -> Tensor:
        """Run the model, and draw tokens that all its ranks know; some rows end early."""
        shape = self._real_evaluate(model, *rest, **named).shape
        self._draws += 1
        owner, count = model.layout.dp_rank, shape.numel() // shape[0]
        tokens = stand_ins.draw("token", owner, self._draws, count, 0, 200)
        ends = stand_ins.draw("end of text", owner, self._draws, count, 0, _MEAN_LENGTH) == 0
        tokens = tokens.masked_fill(ends, model.stop_token_ids[0])
        chance = stand_ins.draw("confidence", owner, self._draws, count, 1, 1000) / 1001.0
        # Token, score, its probability, the token's probability.
        return torch.stack((tokens, chance.log(), chance, chance)).double().view(shape)

    _real_evaluate = staticmethod(sampler._evaluate)
    _real_generate = staticmethod(sampler.generate)

    def _generate(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        sample_ids: Tensor,
        config: Any,
        seed: int,
        purpose: str,
        on_step: Callable[[Tensor], None] | None = None,
        on_finished: Callable[[Tensor, Tensor], None] | None = None,
        record_steps: bool = False,
    ) -> Any:
        """Make the first denoising steps of a rollout; the rest of it is made up."""
        ledger, is_rollout = self.ledger, purpose == "rollout"
        # Other copies of the model end after other numbers of steps.
        most = self.job.denoising_steps + model.layout.dp_rank % 2
        most = most if is_rollout else _STEPS_ELSEWHERE
        blocks = config.completion_length // config.block_length
        facts = ledger.rank.facts
        if is_rollout:
            facts["denoising_steps"] = config.denoising_steps
            facts["rollout_rows"] = len(prompts)
            facts["rollout_batch"] = config.micro_batch_size
            every = config.cache_refresh_steps or config.steps_per_block
            facts["whole_passes"] = blocks * -(-config.steps_per_block // every)
            if config.cache == "exact":
                # Prompts are taken in at the first step; each block but the last one after its own.
                facts["whole_passes"] = 1
                facts["denoising_steps"] += blocks - 1
        asked = config
        if not config.is_parallel:
            # So that the steps that are run reach the next block.
            config = dataclasses.replace(
                config, denoising_steps=min(config.denoising_steps, 2 * blocks)
            )
        steps, before = 0, _cost(ledger)
        # Evaluation and generation have no phases of their own.
        phase = ledger.phase_of("sampling") if ledger.is_outside else contextlib.nullcontext()

        def watch(tokens: Tensor) -> None:
            nonlocal steps, before
            steps += 1
            ledger.count("denoising step")
            now = _cost(ledger)
            if is_rollout:
                step = {name: now[name] - before[name] for name in now}
                ledger.rank.steps.append(step)
            if on_step is not None:
                on_step(tokens)
            before = _cost(ledger)
            if steps >= most:
                raise _Enough

        try:
            with phase:
                return self._real_generate(
                    model, prompts, sample_ids, config, seed, purpose, watch, on_finished,
                    record_steps,
                )  # fmt: skip
        except _Enough:
            known = torch.empty(0)
            if record_steps:
                known = stand_ins.step_map(asked, model.blocks is not None)
            return self._made_up(model, len(prompts), config, on_finished, known)

    def _made_up(
        self, model: Any, n: int, config: Any, on_finished: Any, commit_steps: Tensor
    ) -> Any:
        length, owner = config.completion_length, model.layout.dp_rank
        self._draws += 1
        completions = stand_ins.draw("completion", owner, self._draws, n * length, 0, 200)
        completions = completions.view(n, length)
        ends = stand_ins.draw("end", owner, self._draws, n, length // 4, length)
        over = torch.arange(length)[None] >= ends[:, None]
        completions = completions.masked_fill(over, model.eos_token_id)
        if on_finished is not None:
            on_finished(torch.arange(n), completions)
        each = torch.full((n,), config.denoising_steps)
        work = torch.ones(n, 4, dtype=torch.float64)
        committed = torch.full((n,), length)
        return sampler.Generation(
            completions, each, committed, torch.full((n,), 0.5), work,
            commit_steps.int().expand(n, -1),
        )  # fmt: skip

    # ---- ESPO

    def reinforcement(self) -> None:
        """Give ESPO its problems, the longest prompt on every rank, and few micro-batches."""
        run._STEPS_PER_LOOK = _STEPS_PER_LOOK
        replace_everywhere(problems.load_task_data, self._task_data)
        replace_everywhere(trainer._prompts, self._prompts)
        replace_everywhere(trainer._sample_rollout, self._rollout)
        replace_everywhere(reports.report_rollout, self._report)
        replace_everywhere(scoring.score_completions, _scores_everywhere)

    def _task_data(
        self, task: Any, path: str | None, tokenizer: Any, args: Any, count: int = 0, **_: Any
    ) -> Any:
        if path is None:
            return None
        examples = task.read(path)
        examples = examples[:count] if count else examples
        room = args.seq_length - args.rollout_completion_length
        lengths = stand_ins.draw("room", 0, 0, len(examples), max(room // 8, 1), room)
        encoded = [(65,) * length for length in lengths.tolist()]
        return problems.TaskData(examples, encoded)

    _real_prompts = staticmethod(trainer._prompts)
    _real_rollout = staticmethod(trainer._sample_rollout)
    _real_report = staticmethod(reports.report_rollout)

    def _prompts(self, own: Any, number: int, refills: Any = ()) -> list[Prompt]:
        prompts = self._real_prompts(own, number, refills)
        owner = own.model.layout.dp_rank
        room = max(len(p) for p in own.train_data.encoded)
        lengths = stand_ins.draw("length", owner, number, len(prompts), max(room // 8, 1), room)
        lengths[0] = room
        return [
            dataclasses.replace(prompt, token_ids=(65,) * length)
            for prompt, length in zip(prompts, lengths.tolist(), strict=True)
        ]

    def _rollout(self, own: Any, number: int, clock: Any) -> Sampling | None:
        """Keep as many completions as the simulated micro-batches of an update take."""
        sampling = self._real_rollout(own, number, clock)
        if sampling is None:
            return None
        views, rows = views_per_completion(own.espo), own.rows_per_batch
        # Of objectives that look at groups, whole ones.
        alone = objective_of(own.espo).scope == "completion"
        group = 1 if alone else own.espo.group_size
        n = len(sampling.rollout.sample_ids)
        total = n * views // rows
        least = max(self.job.micro_batches, 2 * own.model.layout.pp_size)
        stages = own.model.layout.pp_size

        def suits(kept: int) -> bool:
            batches, left = divmod(kept * views, rows)
            whole_groups = kept % group == 0
            return whole_groups and left == 0 and batches >= least and batches % stages == 0

        kept = next((kept for kept in range(1, n) if suits(kept)), n)
        facts = self.ledger.rank.facts
        facts["micro_batches"] = total
        facts["simulated_micro_batches"] = kept * views // rows

        def score() -> Rollout:
            whole = sampling.score()
            # Made-up rewards do not say which completions have no gradient: all of them have one.
            signs = torch.ones_like(whole.advantages)
            signs[1::2] = -1.0
            by_token = whole.token_advantages
            if by_token is not None:
                by_token = signs[:, None].expand_as(by_token).clone()
            self._whole = dataclasses.replace(whole, advantages=signs, token_advantages=by_token)
            return _first(self._whole, kept)

        return Sampling(_first(sampling.rollout, kept), score)

    def _report(self, own: Any, number: int, prepared: Any, *rest: Any) -> None:
        """Report on whole groups."""
        prepared = dataclasses.replace(prepared, rollout=self._whole)
        self._real_report(own, number, prepared, *rest)

    # ---- pre-training and fine-tuning

    def pretraining(self) -> None:
        """Give Megatron's loop rows, and tell its passes from its optimizer."""
        hooks = self

        def build(num_samples: Any, vp_stage: int | None = None) -> Any:
            args = get_args()
            with_prompts = args.sft_train_data is not None
            sets = []
            for count, split in zip(num_samples, Split, strict=True):
                rows = stand_ins.StandInRows(
                    max(count or 0, 1), args.seq_length, with_prompts, split
                )
                sets.append(rows if count else None)
            return tuple(sets)

        build.is_distributed = True  # type: ignore[attr-defined]
        replace_everywhere(pretrain.build_datasets, build)
        step = megatron_training.train_step

        @functools.wraps(step)
        def train_step(*args: Any, **kwargs: Any) -> Any:
            given = list(args)
            if len(given) > 6:
                given[6] = hooks._in_phase("update: passes", given[6])
            hooks.ledger.count("update")
            with hooks.ledger.phase_of("update"):
                return step(*given, **kwargs)

        megatron_training.train_step = train_step
        replace_everywhere(forward_step.noise_batch, self._counted(forward_step.noise_batch))

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.ledger.count("micro-batch")
            return function(*args, **kwargs)

        return wrapped


def _scores_everywhere(
    task: Any, examples: Sequence[Any], texts: Sequence[str], layout: Layout, *_: Any
) -> Any:
    """Score on every rank what one of them would score and send."""
    scores = [task.score(e, text) for e, text in zip(examples, texts, strict=True)]
    return object_from_first_of_samples(scores, layout)


def _first[R: SampledRollout](rollout: R, n: int) -> R:
    """Cut a rollout to its first completions."""
    cut: dict[str, Any] = {}
    for field in dataclasses.fields(rollout):
        value = getattr(rollout, field.name)
        if field.name == "sequences":
            value = dataclasses.replace(
                value, tokens=value.tokens[:n], prompt_lengths=value.prompt_lengths[:n]
            )
        elif value is not None:
            value = value[:n]
        cut[field.name] = value
    return type(rollout)(**cut)


def _cost(ledger: Ledger) -> dict[str, float]:
    """What has been spent in all phases so far."""
    phases = ledger.rank.phases.values()
    return {
        "seconds": sum(p.seconds for p in phases),
        "communication": sum(sum(p.communication.values()) for p in phases),
        "flops": sum(p.flops for p in phases),
        "kernels": sum(p.kernels for p in phases),
        "waits": sum(p.num_waits for p in phases),
    }
