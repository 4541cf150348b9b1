"""The ESPO loop (arXiv 2512.03759, algorithm 1): rollout, score, ELBOs, updates.

Another objective (--espo-objective) has the same loop: its log-probabilities stand for ELBOs.

It owns its step, because rollouts need all pipeline stages at once, and calls Megatron for the
model passes, the optimizer, the scheduler and checkpoints.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from torch import Tensor

from megatron_espo.console import say
from megatron_espo.diffusion.noise import ElboViews
from megatron_espo.evaluation.scoring import decode_completions, score_completions
from megatron_espo.generation.sampler import Interrupted
from megatron_espo.monitor.progress import Progress
from megatron_espo.objectives import num_draws, objective_of
from megatron_espo.objectives.masks import Ask
from megatron_espo.parallel.layout import raised_on_all
from megatron_espo.passes.batch import ViewBatch
from megatron_espo.random import stream
from megatron_espo.rl.credit import coalitions_of, with_credit
from megatron_espo.rl.elbo import block_offsets, cut_views
from megatron_espo.rl.prompts import further_prompts, prompts_of_rollout
from megatron_espo.rl.provenance import prompts_digest
from megatron_espo.rl.refill import Completed, Unscored, refill
from megatron_espo.rl.reports import evaluate_policy, evaluation_follows, report_rollout
from megatron_espo.rl.resume import record_rollout, restore_rollout
from megatron_espo.rl.rollout import (
    ScoringAhead,
    local_share,
    place_completions,
    sample,
    with_scores,
)
from megatron_espo.rl.routing import noted_as, routing_scalars, watch_routing
from megatron_espo.rl.run import RunState, Trainer, look_out, precision
from megatron_espo.rl.scalars import (
    Clock,
    first_ratio_scalars,
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
from megatron_espo.rl.types import (
    PreparedRollout,
    Prompt,
    Refill,
    Rollout,
    SampledRollout,
    Sampling,
)
from megatron_espo.rl.update import accumulate_gradient
from megatron_espo.tasks.base import Score


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
    if (start.step == 0 or start.evaluation_due) and evaluate_policy(trainer, start.step):
        return
    record = start.rollout
    for number in range(start.step // mu, espo.num_rollouts):
        clock = Clock()
        first = max(start.step - number * mu, 0)
        if record is None:
            sampling = _sample_rollout(trainer, number, clock)
            if sampling is None:
                trainer.save(RunState(number * mu, watch=trainer.dashboard.watch.state()))
                return
            noise = _draw_noise(trainer, number, sampling.rollout)
            # Reward workers go on scoring meanwhile.
            frozen = _evaluate_frozen_policies(trainer, noise, clock)
            prepared = PreparedRollout(sampling.score(), *frozen)
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
                views = [part.views for part in noise]
                report_rollout(trainer, number, prepared, scalars, clock, progress, left_out, views)
                stop = evaluation_follows(trainer, number + 1) and evaluate_policy(trainer, done)
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


def _sample_rollout(trainer: Trainer, number: int, clock: Clock) -> Sampling | None:
    """Sample a rollout; None where the run is told to stop.

    Its scores are waited for when they are asked for, except where further prompts hang on them.
    """
    espo, model = trainer.espo, trainer.model
    unscored = _complete(trainer, local_share(_prompts(trainer, number), model.layout), clock)
    if unscored is None:
        return None
    if not espo.refill:
        sampled = place_completions(model, unscored.prompts, unscored.generation, espo.group_size)

        def score() -> Rollout:
            done = unscored.scored()
            scored = with_scores(sampled, done.texts, done.scores, espo)
            return with_credit(scored, model, trainer.tokenizer, espo)

        return Sampling(sampled, score)
    data, count = trainer.train_data, espo.prompts_per_rollout
    further = further_prompts(number, count, data.examples, data.encoded, trainer.seed, data.shares)

    def complete(prompts: Sequence[Prompt]) -> Completed | None:
        part = _complete(trainer, prompts, clock)
        return None if part is None else part.scored()

    refilled = refill(
        unscored.scored(), further[: espo.refill], complete, espo.group_size, model.layout,
        model.stop_token_ids,
    )  # fmt: skip
    if refilled is None:
        return None
    done, refills, discarded = refilled
    rollout = with_scores(
        place_completions(model, done.prompts, done.generation, espo.group_size),
        done.texts, done.scores, espo, refills, discarded,
    )  # fmt: skip
    rollout = with_credit(rollout, model, trainer.tokenizer, espo)
    return Sampling(rollout, lambda: rollout)


def _complete(trainer: Trainer, prompts: Sequence[Prompt], clock: Clock) -> Unscored | None:
    """Sample completions and begin to score them; None where the run is told to stop."""
    espo, generation, model = trainer.espo, None, trainer.model
    examples = [prompt.example for prompt in prompts for _ in range(espo.group_size)]
    ahead = ScoringAhead(
        trainer.task, examples, trainer.tokenizer, model.stop_token_ids, model.layout,
        coalitions_of(espo),
    )  # fmt: skip
    with (
        clock("rollout"),
        trainer.inference(),
        precision(trainer, "rollout"),
        suppress(Interrupted),
    ):
        generation = sample(
            model,
            prompts,
            trainer.rollout,
            espo.group_size,
            trainer.seed,
            look_out(trainer, "sampling a rollout"),
            ahead,
            objective_of(espo).masks(espo).of_steps,
        )
    # One copy of the model may have seen the signal while another finished: they agree here.
    if trainer.should_stop(None) or generation is None:
        ahead.cancel()
        return None
    completions = generation.completions

    def score() -> tuple[list[str], list[Score]]:
        with clock("reward"):
            texts = decode_completions(completions, trainer.tokenizer, model.stop_token_ids)
            with raised_on_all(model.layout):
                scores = score_completions(
                    trainer.task, examples, texts, model.layout, ahead.futures, coalitions_of(espo)
                )
            return texts, scores

    return Unscored(prompts, generation, score)


class _Noise(NamedTuple):
    """The masks of one inner update, cut into micro-batches, and what cuts some of them.

    Which tokens answer belongs to the rollout; None for objectives that do not ask.
    """

    views: ElboViews
    batches: list[ViewBatch]
    recut: Callable[..., list[ViewBatch]]
    answers: Answers | None


def _draw_noise(trainer: Trainer, number: int, rollout: SampledRollout) -> list[_Noise]:
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
            commit_steps=rollout.commit_steps if masks.of_steps else None,
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
    trainer: Trainer, noise: Sequence[_Noise], clock: Clock
) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
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
        with clock("old_elbo"), trainer.inference(), precision(trainer, "elbo"):
            old[1:] = evaluate("old", noise[1:])
    if trainer.reference is not None:
        visit = trainer.reference.in_model
        with clock("ref_elbo"), trainer.inference(), precision(trainer, "elbo"), visit():
            reference = evaluate("reference", noise)
    return tuple(old), tuple(reference)


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
        trainer.clear_gradients()
        elbo_ref = prepared.elbo_ref[place]
        with precision(trainer, "elbo"), noted_as("current", [noise.batches]):
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
                rollout.token_advantages,
            )
        made = trainer.make_step(step, espo.completions_per_rollout)
        if place == 0 and objective.compares_with_old:
            prepared = replace(prepared, elbo_old=(draws, *prepared.elbo_old[1:]))
        facts = Facts(
            prepared.elbo_old[place], elbo_ref, rollout.advantages, noise.views, length, espo,
            noise.answers, objective, rollout.token_advantages,
        )  # fmt: skip
        terms = objective.loss(draws, facts.given(draws, facts.tensors()))
    elbo = mean_log_probability(draws, noise.views)
    columns = update_columns(terms, elbo, left_out, length, model.layout)
    scalars = update_scalars(columns, made)
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
