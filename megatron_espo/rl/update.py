"""The gradient of one ESPO update, through Megatron's forward-backward schedule.

exp() is not linear, so all draws of a sequence must meet before the ratio. Two exact ways:

* joint: all views of a sequence sit in one micro-batch, and the loss is computed there;
* two-pass: a pass without gradients gives every ELBO, hence the scalar c = d loss / d ELBO of
  each draw; a second pass back-propagates c * ELBO view by view, in any micro-batch, so that memory
  does not grow with the number of draws.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_espo.config import EspoConfig
from megatron_espo.diffusion.estimators import elbo_draws
from megatron_espo.diffusion.noise import ElboViews
from megatron_espo.model.handle import DiffusionModel
from megatron_espo.passes.batch import ViewBatch
from megatron_espo.passes.pipeline import run_model
from megatron_espo.rl.elbo import elbo_of_views, in_order_of_views, view_cross_entropy
from megatron_espo.rl.objective import elbo_gradient, espo_terms
from megatron_espo.transfer import on_device

LossFunction = Callable[[ViewBatch, Tensor], Tensor]


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
    observe: Callable[[Tensor], None] | None = None,
) -> Tensor:
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
        observe: with two_pass, gets the draws as the pass with gradients computes them: a second
            evaluation of the same policy under the same masks, float32 ``[n, m]`` on the host.

    Returns:
        float32 ``[n, m]`` on the host of the current policy's ELBO draws, on every rank.
    """
    n, m, v = views.weights.shape
    # The schedule divides by the number of micro-batches and multiplies by the context-parallel
    # size, and Megatron averages over the data- and context-parallel ranks; what is left is the
    # mean over the global batch.
    layout = model.layout
    scale = len(batches) * layout.dp_size / layout.cp_size / global_batch_size
    if config.gradient == "two_pass":
        draws = elbo_of_views(model, batches, views)
        old = draws if elbo_old is None else elbo_old
        gradient, _ = elbo_gradient(draws, old, elbo_ref, advantages, length, config)
        # d ELBO / d (summed cross entropy of a view) = -weight.
        factors = -(gradient[..., None] * views.weights).flatten() * scale
        sums = _forward_backward(model, batches, partial(_linear_loss, factors=factors))
        if observe is not None:
            observe(elbo_draws(sums.view(n, m, v), views.weights))
        return draws

    def joint_loss(batch: ViewBatch, sums: Tensor) -> Tensor:
        rows = batch.view_index.view(-1, m, v)
        sequence = rows[:, 0, 0] // (m * v)
        old, ref = (None if elbo is None else elbo[sequence] for elbo in (elbo_old, elbo_ref))
        known = (batch.weights.view(rows.shape), advantages[sequence], old, ref)
        weights, chosen, old, ref = on_device(known, sums.device)
        draws = elbo_draws(sums.view(rows.shape), weights)
        old = draws.detach() if old is None else old
        return espo_terms(draws, old, ref, chosen, length, config).loss.sum() * scale

    sums = _forward_backward(model, batches, joint_loss)
    return elbo_draws(sums.view(n, m, v), views.weights)


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
    model: DiffusionModel, batches: list[ViewBatch], loss_function: LossFunction
) -> Tensor:
    """Run Megatron's schedule with gradients.

    Returns:
        float32 ``[n*m*v]`` on the host: the views' summed cross entropy, on every rank.
    """

    def forward_step(
        iterator: Iterator[ViewBatch], chunk: torch.nn.Module
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]]:
        batch = next(iterator)
        output = run_model(
            chunk,
            batch.batch,
            partial(view_cross_entropy, tp_group=model.layout.tp),
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
    return in_order_of_views([entry["sums"] for entry in stored], batches, model)
