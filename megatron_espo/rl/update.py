"""The gradient of one ESPO update, through Megatron's forward-backward schedule.

exp() is not linear, so all draws of a sequence must meet before the ratio. Two exact ways:

* joint: all views of a sequence sit in one micro-batch, and the loss is computed there;
* two-pass: a pass without gradients gives every ELBO, hence the scalar c = d loss / d ELBO of
  each draw; a second pass back-propagates c * ELBO view by view, in any micro-batch, so that memory
  does not grow with the number of draws.

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
from typing import Any, NamedTuple

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_espo.config import EspoConfig
from megatron_espo.diffusion.estimators import elbo_draws
from megatron_espo.diffusion.noise import ElboViews
from megatron_espo.model.handle import DiffusionModel
from megatron_espo.model.head import view_cross_entropy
from megatron_espo.parallel.layout import (
    any_over_samples,
    most_over_experts,
    union_over_samples,
)
from megatron_espo.passes.batch import ViewBatch, fill_up
from megatron_espo.passes.pipeline import run_model
from megatron_espo.rl.elbo import elbo_of_views, evaluate_views, put_in_order
from megatron_espo.rl.objective import elbo_gradient, espo_terms
from megatron_espo.transfer import on_device

LossFunction = Callable[[ViewBatch, Tensor], Tensor]


class Accumulated(NamedTuple):
    """What an update says besides its gradient, the same on all ranks of these sequences.

    Attributes:
        draws: float32 ``[n, m]`` on the host, the current policy's ELBO draws.
        again: float32 ``[n, m]`` on the host, the same draws as the pass with gradients computed
            them, where a pass without gradients had come before; else None.
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
    views: ElboViews
    elbo_old: Tensor | None
    elbo_ref: Tensor | None
    advantages: Tensor
    length: int
    config: EspoConfig
    global_batch_size: int
    recut: Callable[..., list[ViewBatch]] | None

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
        per_sequence = self.views.weights[0].numel()
        multiple = rows // math.gcd(rows, per_sequence)
        lengths = torch.zeros(len(needed), dtype=torch.int64)
        for batch in self.batches:
            lengths[batch.view_index // per_sequence] = batch.batch.lengths
        chosen = fill_up(needed, lengths, multiple, least)
        if bool(chosen.all()):
            return chosen, self.batches
        return chosen, self.recut(chosen=chosen.nonzero()[:, 0])


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
) -> Accumulated:
    """Add the gradient of the mean loss over the global batch to the model's gradient buffers.

    Args:
        model: the policy, in training mode; the caller has zeroed the buffers.
        batches: all views of this rank's n sequences.
        views: their masks and weights.
        elbo_old: float32 ``[n, m]`` on the host, or None where the current policy is the sampling
            policy (the first update of a rollout: the ratio is exactly 1).
        elbo_ref: float32 ``[n, m]`` on the host, or None without a KL penalty.
        advantages: float32 ``[n]`` on the host.
        length: completion length.
        config: ESPO settings.
        global_batch_size: sequences over all data-parallel ranks.
        recut: makes micro-batches of the sequences ``chosen`` (int64 ``[k]``) like ``batches``;
            without it all of ``batches`` have a backward pass.

    Returns:
        What was found out on the way.
    """
    update = _Update(
        model, batches, views, elbo_old, elbo_ref, advantages, length, config,
        global_batch_size, recut,
    )  # fmt: skip
    if config.chosen_gradient(len(batches[0].view_index)) == "two_pass":
        return _two_passes(update)
    return _joint(update)


def _two_passes(update: _Update) -> Accumulated:
    model, views = update.model, update.views
    draws = elbo_of_views(model, update.batches, views)
    old = draws if update.elbo_old is None else update.elbo_old
    gradient, _ = elbo_gradient(
        draws, old, update.elbo_ref, update.advantages, update.length, update.config
    )
    needed = (gradient != 0).any(dim=1)
    if update.recut is not None and update.elbo_ref is None:
        # Whatever the last bits of their ELBOs are, they must make the same micro-batches.
        needed = union_over_samples(needed, model.layout, model.device)
    chosen, batches = update.choose(needed)
    # d ELBO / d (summed cross entropy of a view) = -weight.
    factors = -(gradient[..., None] * views.weights).flatten() * update.scale(len(batches))
    sums = torch.zeros(views.weights.numel())
    _forward_backward(sums, model, batches, partial(_linear_loss, factors=factors))
    again = elbo_draws(sums.view_as(views.weights), views.weights)
    again = torch.where(chosen[:, None], again, draws)
    return Accumulated(draws, again, int((~chosen).sum()))


def _joint(update: _Update) -> Accumulated:
    model, views, config = update.model, update.views, update.config
    n, m, v = views.weights.shape
    elbo_old, elbo_ref, advantages = update.elbo_old, update.elbo_ref, update.advantages
    needed = torch.ones(n, dtype=torch.bool) if elbo_ref is not None else advantages != 0
    chosen, batches = update.choose(needed)
    left_out = int((~chosen).sum())
    sums = torch.zeros(views.weights.numel())
    if left_out:
        assert update.recut is not None
        evaluate_views(sums, update.recut(chosen=(~chosen).nonzero()[:, 0]), model)
    scale = update.scale(len(batches))
    # The last micro-batch's backward pass is the one in which gradients are reduced.
    may_clip = elbo_ref is None and elbo_old is not None and model.layout.pp_size == 1
    may_clip = may_clip and model.layout.experts is None

    def loss(batch: ViewBatch, sums: Tensor) -> Tensor:
        nonlocal left_out
        rows = batch.view_index.view(-1, m, v)
        sequence = rows[:, 0, 0] // (m * v)
        old, ref = (None if elbo is None else elbo[sequence] for elbo in (elbo_old, elbo_ref))
        known = (batch.weights.view(rows.shape), advantages[sequence], old, ref)
        weights, own, old, ref = on_device(known, sums.device)
        draws = elbo_draws(sums.view(rows.shape), weights)
        old = draws.detach() if old is None else old
        terms = espo_terms(draws, old, ref, own, update.length, config)
        if may_clip and batch is not batches[-1]:
            zero = bool((terms.clipped_low | terms.clipped_high | (own == 0)).all())
            if not any_over_samples(not zero, model.layout, model.device):
                # The schedule passes nothing back from a loss that asks for no gradient.
                left_out += len(sequence)
                return terms.loss.detach().sum() * scale
        return terms.loss.sum() * scale

    _forward_backward(sums, model, batches, loss)
    return Accumulated(elbo_draws(sums.view(n, m, v), views.weights), None, left_out)


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


def _linear_loss(batch: ViewBatch, sums: Tensor, *, factors: Tensor) -> Tensor:
    return (sums * on_device(factors[batch.view_index], sums.device)).sum()


def _forward_backward(
    values: Tensor, model: DiffusionModel, batches: list[ViewBatch], loss_function: LossFunction
) -> None:
    """Run Megatron's schedule with gradients.

    Args:
        values: gets the views' summed cross entropy, see `put_in_order`.
        model: the model.
        batches: the micro-batches.
        loss_function: of a micro-batch and its views' summed cross entropy.
    """

    def forward_step(
        iterator: Iterator[ViewBatch], chunk: torch.nn.Module
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]]:
        batch = next(iterator)
        output = run_model(
            chunk,
            batch.batch,
            view_cross_entropy(model.layout.tp),
            model.logit_shift,
        )

        def loss(sums: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return loss_function(batch, sums), {"sums": sums.detach()}

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
    put_in_order(values, [entry["sums"] for entry in stored], batches, model)
