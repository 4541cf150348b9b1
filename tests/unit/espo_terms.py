"""The ESPO objective by its old arguments, for the tests that know it alone."""

from types import SimpleNamespace

import torch
from torch import Tensor

from megatron_espo.config import EspoConfig
from megatron_espo.objectives import Given, Loss, loss_gradient
from megatron_espo.objectives.espo import Espo


def given(
    elbo: Tensor,
    old: Tensor,
    reference: Tensor | None,
    advantages: Tensor,
    length: int,
    espo: EspoConfig,
) -> Given:
    answer = torch.ones(len(elbo), length, dtype=torch.bool)
    weights = torch.ones(*elbo.shape, 1)
    return Given(
        old, reference, advantages, None, answer, float(length), None, weights, length, espo
    )


def named(found: Loss) -> SimpleNamespace:
    own = found.statistics
    return SimpleNamespace(
        loss=found.loss,
        ratio=own["ratio"],
        kl=own["kl"],
        clipped_low=own["clip_low"],
        clipped_high=own["clip_high"],
    )


def espo_terms(elbo: Tensor, *arguments) -> SimpleNamespace:
    return named(Espo().loss(elbo, given(elbo, *arguments)))


def elbo_gradient(elbo: Tensor, *arguments) -> tuple[Tensor, SimpleNamespace]:
    gradient, found = loss_gradient(Espo(), elbo, given(elbo, *arguments))
    return gradient, named(found)
