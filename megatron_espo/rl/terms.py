"""What an objective is a function of: log-probabilities of views, and all that is given with them.

Symbols: n completions of this rank, m draws, v views per draw, l completion length, k completions
of a micro-batch, R views of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_espo.config import EspoConfig
from megatron_espo.diffusion.estimators import elbo_draws
from megatron_espo.diffusion.noise import ElboViews
from megatron_espo.model.handle import DiffusionModel
from megatron_espo.monitor.metrics import gather_columns
from megatron_espo.objectives import Given, Objective
from megatron_espo.parallel.layout import Layout
from megatron_espo.passes.batch import ViewBatch
from megatron_espo.rl.elbo import evaluate_views


class Answers(NamedTuple):
    """Which tokens of completions answer.

    Attributes:
        tokens: bool ``[n, l]``, those up to the first end of sequence, it included.
        mean: of their number over the completions of all ranks.
    """

    tokens: Tensor
    mean: float


def answers_of(completion_lengths: Tensor, length: int, layout: Layout) -> Answers:
    """Mark the tokens that answer, with all data-parallel ranks together.

    Args:
        completion_lengths: int64 ``[n]``, tokens before the end of sequence.
        length: l.
        layout: process groups.

    Returns:
        The answers of this rank's completions.
    """
    counts = (completion_lengths + 1).clamp(max=length)
    columns = gather_columns({"tokens": counts.tolist()}, layout)
    return Answers(torch.arange(length)[None] < counts[:, None], float(columns["tokens"].mean()))


def empty_values(views: ElboViews, objective: Objective) -> Tensor:
    """Make room for the cross entropy of all views: float32 ``[n*m*v]``, or ``[n*m*v, l]``."""
    shape: Sequence[int] = (views.weights.numel(),)
    if objective.per_token:
        shape = (*shape, views.mask_indices.size(-1))
    return torch.zeros(shape)


def combine(cross_entropy: Tensor, weights: Tensor, objective: Objective) -> Tensor:
    """Turn the cross entropy of views into what the objective takes; the gradient passes through.

    Args:
        cross_entropy: float32 ``[k*m*v]``, or ``[k*m*v, l]`` for an objective of tokens.
        weights: float32 ``[k, m, v]``.
        objective: the objective.

    Returns:
        float32 ``[k, m]``, or ``[k, m, v, l]``; ``[k, m, l]`` where each token is predicted once.
    """
    if objective.per_token:
        table = -cross_entropy.view(*weights.shape, -1)
        return table.sum(dim=2) if objective.each_token_once else table
    return elbo_draws(cross_entropy.view_as(weights), weights)


def log_probabilities(
    model: DiffusionModel, batches: list[ViewBatch], views: ElboViews, objective: Objective
) -> Tensor:
    """Evaluate views without gradients.

    Args:
        model: the model.
        batches: all views, cut into micro-batches.
        views: their masks and weights.
        objective: says whether tokens or whole draws are wanted.

    Returns:
        float32 ``[n, m]``, or ``[n, m, v, l]``, on the host.
    """
    values = empty_values(views, objective)
    evaluate_views(values, batches, model, objective.per_token)
    return combine(values, views.weights, objective)


def mean_log_probability(logp: Tensor, views: ElboViews) -> Tensor:
    """Bring what an objective takes down to one number per completion.

    Args:
        logp: float32 ``[n, m]``, ``[n, m, l]`` or ``[n, m, v, l]``.
        views: its masks.

    Returns:
        float32 ``[n]`` in nats per completion of l tokens: the mean over draws, or l times the mean
        over masked tokens.
    """
    if logp.dim() == 2:
        return logp.mean(dim=1)
    if logp.dim() == 3:
        return logp.sum(dim=2).mean(dim=1)
    masked = views.mask_indices.flatten(1).sum(dim=1).clamp(min=1)
    return logp.flatten(1).sum(dim=1) / masked * logp.size(-1)


@dataclass(frozen=True)
class Facts:
    """All that a loss is given of this rank's n completions, on the host; see `Given`.

    Attributes:
        old: like the log-probabilities; None where the policy's own ones stand for it.
        reference: likewise; None without a penalty.
        advantages: float32 ``[n]``.
        views: masks and weights.
        length: l.
        espo: settings.
        answers: which tokens answer; None: all.
        objective: the objective.
        token_advantages: float32 ``[n, l]``, for objectives that split advantages over tokens.
    """

    old: Tensor | None
    reference: Tensor | None
    advantages: Tensor
    views: ElboViews
    length: int
    espo: EspoConfig
    answers: Answers | None
    objective: Objective
    token_advantages: Tensor | None = None

    def tensors(self, rows: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """What :meth:`given` makes a Given of, for some completions or all."""
        every = (
            self.old,
            self.reference,
            self.advantages,
            self.token_advantages,
            self._groups(),
            None if self.answers is None else self.answers.tokens,
            self.views.mask_indices if self.objective.per_token else None,
            self.views.predicted if self.objective.per_token else None,
            self.views.weights,
        )
        if rows is None:
            return every
        return tuple(None if value is None else value[rows] for value in every)

    def given(self, logp: Tensor, tensors: Sequence[Tensor | None]) -> Given:
        """Put together what a loss of these log-probabilities is given.

        Args:
            logp: the policy's, which stand for the old ones where there are none.
            tensors: from :meth:`tensors`, on the device of ``logp``.
        """
        old, reference, advantages, by_token, group, answer, masks, predicted, weights = tensors
        assert advantages is not None and weights is not None
        if answer is None:
            shape = (len(advantages), self.length)
            answer = torch.ones(shape, dtype=torch.bool, device=logp.device)
        return Given(
            old=logp.detach() if old is None else old,
            reference=reference,
            advantages=advantages,
            group=group,
            answer=answer,
            mean_answer=float(self.length) if self.answers is None else self.answers.mean,
            masks=masks,
            weights=weights,
            length=self.length,
            espo=self.espo,
            predicted=predicted,
            token_advantages=by_token,
        )

    def _groups(self) -> Tensor | None:
        """The advantages of each completion's group, of ranks that hold whole groups."""
        if self.objective.scope == "completion":
            return None
        size = self.espo.group_size
        return self.advantages.view(-1, size).repeat_interleave(size, dim=0)
