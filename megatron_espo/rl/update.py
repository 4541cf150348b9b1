"""The gradient of one update, through Megatron's forward-backward schedule.

exp() is not linear, so all draws of a sequence must meet before the ratio. Two exact ways:

* joint: all views of a sequence sit in one micro-batch, and the loss is computed there;
* two-pass: a pass without gradients gives every ELBO, hence the scalar c = d loss / d ELBO of
  each draw; a second pass back-propagates c * ELBO view by view, in any micro-batch, so that memory
  does not grow with the number of draws.

An objective of tokens goes the same ways with the log-probability of each masked token in place of
a draw's ELBO. The derivative of a linear one is known without the first of two passes.

Without a KL penalty the gradient of some sequences is exactly zero: the advantage is, or the ratio
is clipped. They have no backward pass. Data-parallel ranks may then have different numbers of
micro-batches, since none of their collectives belongs to a micro-batch but the last one's, which
every rank has; the scale is that of the global batch in any case. Where they share experts, all
have as many as the one with most.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_espo.config import EspoConfig
from megatron_espo.diffusion.noise import ElboViews
from megatron_espo.model.handle import DiffusionModel
from megatron_espo.model.head import masked_cross_entropy, view_cross_entropy
from megatron_espo.objectives import Objective, chosen_gradient, loss_gradient, objective_of
from megatron_espo.parallel.layout import (
    any_over_samples,
    most_over_experts,
    union_over_samples,
)
from megatron_espo.passes.batch import ViewBatch, fill_up
from megatron_espo.passes.pipeline import run_model
from megatron_espo.rl.elbo import evaluate_views, put_in_order
from megatron_espo.rl.terms import Answers, Facts, combine, empty_values, log_probabilities
from megatron_espo.transfer import on_device

LossFunction = Callable[[ViewBatch, Tensor], Tensor]


class Accumulated(NamedTuple):
    """What an update says besides its gradient, the same on all ranks of these sequences.

    Attributes:
        draws: float32 on the host, the current policy's log-probabilities as the objective takes
            them: ELBO draws ``[n, m]``, or tokens ``[n, m, v, l]`` or ``[n, m, l]``.
        again: likewise, the same as the pass with gradients computed them, where a pass without
            gradients had come before; else None.
        left_out: sequences without a backward pass, because their gradient is exactly zero.
    """

    draws: Tensor
    again: Tensor | None
    left_out: int


@dataclass(frozen=True)
class _Update:
    """What an update is made of; see :func:`accumulate_gradient`."""

    model: DiffusionModel
    batches: list[ViewBatch]
    facts: Facts
    global_batch_size: int
    recut: Callable[..., list[ViewBatch]] | None

    @property
    def objective(self) -> Objective:
        return self.facts.objective

    def scale(self, num_batches: int) -> float:
        """Factor on a sequence's loss.

        The schedule divides by the number of micro-batches and multiplies by the context-parallel
        size, and Megatron averages over the data- and context-parallel ranks; what is left is the
        mean over the global batch.
        """
        layout = self.model.layout
        return num_batches * layout.dp_size / layout.cp_size / self.global_batch_size

    def choose(self, needed: Tensor) -> tuple[Tensor, list[ViewBatch]]:
        """Cut the micro-batches of the pass with gradients.

        Args:
            needed: bool ``[n]``, the sequences whose gradient is not zero.

        Returns:
            bool ``[n]``, the sequences of that pass, and its micro-batches: whole ones, and rounds
            of them for virtual pipeline stages, filled up with others. There is at least one, in
            which a rank takes part in what all ranks do together.
        """
        # Ranks that share experts make as many passes.
        least = most_over_experts(int(needed.sum()), self.model.layout, self.model.device)
        if self.recut is None or least == len(needed):
            return torch.ones_like(needed), self.batches
        rows = len(self.batches[0].view_index)
        rows *= self.model.layout.pp_size if len(self.model.chunks) > 1 else 1
        per_sequence = self.facts.views.weights[0].numel()
        multiple = rows // math.gcd(rows, per_sequence)
        lengths = torch.zeros(len(needed), dtype=torch.int64)
        for batch in self.batches:
            lengths[batch.view_index // per_sequence] = batch.view_lengths
        chosen = fill_up(needed, lengths, multiple, least)
        if bool(chosen.all()):
            return chosen, self.batches
        return chosen, self.recut(chosen=chosen.nonzero()[:, 0])

    def evaluate_others(self, values: Tensor, chosen: Tensor) -> None:
        """Evaluate the sequences that have no backward pass, for what is reported of them."""
        if bool(chosen.all()):
            return
        assert self.recut is not None
        batches = self.recut(chosen=(~chosen).nonzero()[:, 0])
        evaluate_views(values, batches, self.model, self.objective.per_token)


def accumulate_gradient(
    model: DiffusionModel,
    batches: list[ViewBatch],
    views: ElboViews,
    elbo_old: Tensor | None,
    elbo_ref: Tensor | None,
    advantages: Tensor,
    length: int,
    config: EspoConfig,
    global_batch_size: int,
    recut: Callable[..., list[ViewBatch]] | None = None,
    answers: Answers | None = None,
    token_advantages: Tensor | None = None,
) -> Accumulated:
    """Add the gradient of the mean loss over the global batch to the model's gradient buffers.

    Args:
        model: the policy, in training mode; the caller has zeroed the buffers.
        batches: all views of this rank's n sequences.
        views: their masks and weights.
        elbo_old: the sampling policy's log-probabilities on the host, float32 ``[n, m]``, or
            ``[n, m, v, l]`` for an objective of tokens; None where the current policy is the
            sampling policy (the first update of a rollout: the ratio is exactly 1).
        elbo_ref: likewise the reference policy's, or None without a KL penalty.
        advantages: float32 ``[n]`` on the host.
        length: completion length.
        config: ESPO settings, the objective among them.
        global_batch_size: sequences over all data-parallel ranks.
        recut: makes micro-batches of the sequences ``chosen`` (int64 ``[k]``) like ``batches``;
            without it all of ``batches`` have a backward pass.
        answers: which tokens answer; None: all.
        token_advantages: float32 ``[n, l]`` on the host, for objectives that ask for them.

    Returns:
        What was found out on the way.
    """
    facts = Facts(
        elbo_old, elbo_ref, advantages, views, length, config, answers, objective_of(config),
        token_advantages,
    )  # fmt: skip
    mode = chosen_gradient(config, len(batches[0].view_index))
    return accumulate_facts(model, batches, facts, mode, global_batch_size, recut)


def accumulate_facts(
    model: DiffusionModel,
    batches: list[ViewBatch],
    facts: Facts,
    mode: Literal["joint", "two_pass"],
    global_batch_size: int,
    recut: Callable[..., list[ViewBatch]] | None = None,
) -> Accumulated:
    """Do what :func:`accumulate_gradient` does with an objective that is in hand.

    Args:
        model: the policy, in training mode; the caller has zeroed the buffers.
        batches: all views of this rank's n sequences.
        facts: what the loss is given, and the objective.
        mode: the way to the gradient; joint only with whole groups of the objective's scope in each
            micro-batch, side by side.
        global_batch_size: sequences over all data-parallel ranks.
        recut: see :func:`accumulate_gradient`.

    Returns:
        What was found out on the way.
    """
    update = _Update(model, batches, facts, global_batch_size, recut)
    if mode == "two_pass":
        return _linear(update) if facts.objective.linear else _two_passes(update)
    return _joint(update)


def _factors(gradient: Tensor, update: _Update) -> Tensor:
    """Turn d loss / d log-probabilities into d loss / d cross entropy of the views."""
    if update.objective.per_token:
        if update.objective.each_token_once:
            # The views that do not predict a token do not look at its factor.
            views = update.facts.views.weights.size(2)
            gradient = gradient[:, :, None].expand(-1, -1, views, -1)
        return -gradient.flatten(0, 2)
    # d ELBO / d (summed cross entropy of a view) = -weight.
    return -(gradient[..., None] * update.facts.views.weights).flatten()


def _backward(update: _Update, gradient: Tensor, needed: Tensor) -> tuple[Tensor, Tensor]:
    """Back-propagate what is known of the loss, view by view.

    Returns:
        bool ``[n]``, the sequences that had a backward pass, and the cross entropy of their views.
    """
    views, model, objective = update.facts.views, update.model, update.objective
    if update.recut is not None and update.facts.reference is None:
        # Whatever the last bits of their ELBOs are, they must make the same micro-batches.
        needed = union_over_samples(needed, model.layout, model.device)
    chosen, batches = update.choose(needed)
    factors = _factors(gradient, update) * update.scale(len(batches))
    values = empty_values(views, objective)
    loss = partial(_linear_loss, factors=factors)
    _forward_backward(values, model, batches, loss, objective)
    return chosen, values


def _two_passes(update: _Update) -> Accumulated:
    facts, objective = update.facts, update.objective
    draws = log_probabilities(update.model, update.batches, facts.views, objective)
    gradient, _ = loss_gradient(objective, draws, facts.given(draws, facts.tensors()))
    needed = (gradient != 0).flatten(1).any(dim=1)
    chosen, values = _backward(update, gradient, needed)
    again = combine(values, facts.views.weights, objective)
    again = torch.where(chosen.view(-1, *[1] * (again.dim() - 1)), again, draws)
    return Accumulated(draws, again, int((~chosen).sum()))


def _linear(update: _Update) -> Accumulated:
    """One pass, view by view: the derivative is the same whatever the log-probabilities are."""
    facts, objective = update.facts, update.objective
    weights = facts.views.weights
    nothing = combine(empty_values(facts.views, objective), weights, objective)
    gradient, _ = loss_gradient(objective, nothing, facts.given(nothing, facts.tensors()))
    needed = (gradient != 0).flatten(1).any(dim=1)
    chosen, values = _backward(update, gradient, needed)
    update.evaluate_others(values, chosen)
    return Accumulated(combine(values, weights, objective), None, int((~chosen).sum()))


def _joint(update: _Update) -> Accumulated:
    model, facts, objective = update.model, update.facts, update.objective
    n, m, v = facts.views.weights.shape
    needed = torch.ones(n, dtype=torch.bool)
    if facts.reference is None and objective.idle_without_advantage:
        needed = facts.advantages != 0
    chosen, batches = update.choose(needed)
    left_out = int((~chosen).sum())
    values = empty_values(facts.views, objective)
    update.evaluate_others(values, chosen)
    scale = update.scale(len(batches))
    # The last micro-batch's backward pass is the one in which gradients are reduced.
    may_clip = facts.reference is None and facts.old is not None and model.layout.pp_size == 1
    may_clip = may_clip and model.layout.experts is None

    def loss(batch: ViewBatch, found: Tensor) -> Tensor:
        nonlocal left_out
        sequence = batch.view_index.view(-1, m * v)[:, 0] // (m * v)
        known = on_device(facts.tensors(sequence), found.device)
        weights = known[-1]
        assert weights is not None
        logp = combine(found, weights, objective)
        terms = objective.loss(logp, facts.given(logp, known))
        if may_clip and terms.idle is not None and batch is not batches[-1]:
            zero = bool(terms.idle.all())
            if not any_over_samples(not zero, model.layout, model.device):
                # The schedule passes nothing back from a loss that asks for no gradient.
                left_out += len(sequence)
                return terms.loss.detach().sum() * scale
        return terms.loss.sum() * scale

    _forward_backward(values, model, batches, loss, objective)
    return Accumulated(combine(values, facts.views.weights, objective), None, left_out)


def check_gradient(norm: float | None, succeeded: bool, step: int) -> None:
    """Stop a run whose gradient is not finite: its weights are of no use any more.

    Megatron can look at every bucket of the gradient before it is reduced, for which the host waits
    each time. The norm is read anyway, is of all ranks, and is not finite if anything in them is.

    Args:
        norm: of the whole gradient before clipping, the same on every rank; None where the
            optimizer found something in the gradient that is not finite before it took the norm.
        succeeded: whether the optimizer made its step.
        step: number of the step.

    Raises:
        RuntimeError: on every rank.
    """
    if succeeded and norm is not None and math.isfinite(norm):
        return
    found = "inf or nan" if norm is None else str(norm)
    raise RuntimeError(
        f"the gradient's norm at optimizer step {step} is {found}; "
        "the step is not saved. Go on from the last checkpoint; if it happens there again, with a "
        "smaller --lr or --espo-kl-coef."
    )


def _linear_loss(batch: ViewBatch, found: Tensor, *, factors: Tensor) -> Tensor:
    return (found * on_device(factors[batch.view_index], found.device)).sum()


def _forward_backward(
    values: Tensor,
    model: DiffusionModel,
    batches: list[ViewBatch],
    loss_function: LossFunction,
    objective: Objective,
) -> None:
    """Run Megatron's schedule with gradients.

    Args:
        values: gets the views' cross entropy, see `put_in_order`.
        model: the model.
        batches: the micro-batches.
        loss_function: of a micro-batch and its views' cross entropy.
        objective: says whether that is a sum or one of each token.
    """
    cross_entropy = masked_cross_entropy if objective.per_token else view_cross_entropy

    def forward_step(
        iterator: Iterator[ViewBatch], chunk: torch.nn.Module
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]]:
        batch = next(iterator)
        output = run_model(
            chunk,
            batch.batch,
            cross_entropy(model.layout.tp),
            model.logit_shift,
        )

        def loss(found: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return loss_function(batch, found), {"found": found.detach()}

        return output, loss

    chunks: Any = list(model.chunks)
    shape = batches[0].batch.tokens.shape
    iterators = [iter(batches) for _ in chunks]
    stored = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(batches),
        seq_length=shape[1],
        micro_batch_size=shape[0],
        forward_only=False,
    )
    put_in_order(values, [entry["found"] for entry in stored], batches, model)
