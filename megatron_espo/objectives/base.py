"""What an objective is: the masks it asks for, and a pure function to a loss per completion.

Symbols: b completions, m draws, v views per draw, l completion length, G completions of a group.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from megatron_espo.config import EspoConfig, RolloutConfig
from megatron_espo.errors import UserError
from megatron_espo.objectives.credit import Credit
from megatron_espo.objectives.masks import ElboMasks, Masks

Scope = Literal["completion", "advantages", "group"]


def setting(default: float, low: float = -math.inf, high: float = math.inf) -> Any:
    """Make a field of an objective whose values lie in a range; an int default takes ints alone.

    Args:
        default: what holds where --espo-objective-args says nothing; its type is that of values.
        low: smallest value.
        high: largest value.
    """
    return field(default=default, metadata={"range": (low, high)})


@dataclass(frozen=True)
class Given:
    """What a loss is computed from besides the policy's log-probabilities; without gradients.

    Attributes:
        old: the sampling policy's log-probabilities, in the policy's shape; the policy's own ones
            at a rollout's first update, and for objectives that do not compare with them.
        reference: the reference policy's; None without a KL penalty (--espo-kl-coef 0).
        advantages: float ``[b]``.
        group: float ``[b, G]``, the advantages of all completions of each one's group; None in the
            scope ``completion``.
        answer: bool ``[b, l]``, the tokens up to the first end of sequence, it included.
        mean_answer: their mean number per completion of the global batch.
        masks: bool ``[b, m, v, l]``, the masked tokens; None for objectives of whole completions.
        weights: float ``[b, m, v]``, as drawn with the masks.
        length: l.
        espo: the run's settings: clip range, KL penalty.
        predicted: bool ``[b, m, v, l]``, the masked tokens that each view predicts; None for
            objectives of whole completions, and where every view predicts all that it masks.
        token_advantages: float ``[b, l]``, the advantages split over tokens; None where the
            objective has no `Objective.credit`.
    """

    old: Tensor
    reference: Tensor | None
    advantages: Tensor
    group: Tensor | None
    answer: Tensor
    mean_answer: float
    masks: Tensor | None
    weights: Tensor
    length: int
    espo: EspoConfig
    predicted: Tensor | None = None
    token_advantages: Tensor | None = None

    def tokens(self) -> Tensor:
        """The masks, in an objective of tokens."""
        assert self.masks is not None, "set per_token = True to be given masks"
        return self.masks


class Loss(NamedTuple):
    """What an objective says of each completion.

    Attributes:
        loss: float ``[b]``, with gradient; the loss of an update is its mean over the global batch.
        statistics: name -> float ``[b]``, without gradient. ``ratio``, ``kl`` (nats per token),
            ``clip_low`` and ``clip_high`` (shares) and ``effective_sample_size`` (share of the
            completion's own tokens) are reported under ESPO's names, others as policy/NAME.
        idle: bool ``[b]``, the gradient is exactly zero; None: not known.
    """

    loss: Tensor
    statistics: Mapping[str, Tensor]
    idle: Tensor | None = None


@dataclass(frozen=True)
class Objective:
    """Base class of objectives. Fields of a subclass are settings (--espo-objective-args).

    Attributes:
        per_token: the loss takes float ``[b, m, v, l]``, the log-probability of each masked token
            and 0 for the others; else ``[b, m]``, of each draw the weighted sum over its views of
            the log-probabilities summed over masked tokens (an ELBO, with an ELBO's weights).
        each_token_once: of an objective of tokens, that its views predict every token once between
            them: the loss takes float ``[b, m, l]``, the log-probability of each token (0 of one
            that none predicts).
        scope: what a completion's loss depends on besides itself: nothing, the advantages of its
            group, or its group's log-probabilities, too. With ``group``, rows come whole groups at
            a time, and only with two-pass gradients.
        compares_with_old: it uses the sampling policy's log-probabilities, which cost a pass for
            every update but the first.
        idle_without_advantage: without a KL penalty a completion without advantage has no gradient.
        linear: the loss is linear in the log-probabilities, so that its derivative is known before
            any pass: two-pass gradients have one pass.
        honours: which of clip_eps_low, clip_eps_high, kl_coef, kl_estimator, num_mc,
            elbo_estimator have an effect; ``k2_unbiased`` if that estimator has.
    """

    per_token: ClassVar[bool] = False
    each_token_once: ClassVar[bool] = False
    scope: ClassVar[Scope] = "completion"
    compares_with_old: ClassVar[bool] = True
    idle_without_advantage: ClassVar[bool] = False
    linear: ClassVar[bool] = False
    honours: ClassVar[frozenset[str]] = frozenset({"num_mc", "elbo_estimator"})

    def masks(self, espo: EspoConfig) -> Masks:
        """Say which views of a completion the loss needs."""
        return ElboMasks(espo.elbo_estimator, espo.kl_estimator == "k2_unbiased")

    def credit(self) -> Credit | None:
        """Say how advantages are split over tokens by the parts of a completion that a task scores.

        Returns:
            The split, of which `Given.token_advantages` come; None for none, the default.
        """
        return None

    def fitted(self, rollout: RolloutConfig, block_size: int | None) -> tuple[str, ...]:
        """Say which of its settings follow from a run's others.

        Args:
            rollout: how completions are sampled, checked.
            block_size: tokens of a block of the model; None where all positions see each other.

        Returns:
            "NAME=VALUE", as in --espo-objective-args.

        Raises:
            UserError: the objective is not for such a run.
        """
        return ()

    def loss(self, logp: Tensor, given: Given) -> Loss:
        """Compute the loss of each completion.

        Args:
            logp: the policy's log-probabilities in nats, with gradient; see ``per_token``.
            given: everything else.

        Returns:
            The loss and what to report.
        """
        raise NotImplementedError


def need_blocks(name: str, other: str, block_size: int | None) -> int:
    """Refuse a model whose positions all see each other.

    Args:
        name: of the objective.
        other: an objective for such a model.
        block_size: tokens of a block of the model, or None.

    Returns:
        The tokens of a block.

    Raises:
        UserError: there are no blocks.
    """
    if block_size is None:
        raise UserError(
            f"--espo-objective {name} is for models whose tokens come block by block "
            f"(--attention-mask); use {other}."
        )
    return block_size


def loss_gradient(objective: Objective, logp: Tensor, given: Given) -> tuple[Tensor, Loss]:
    """Differentiate the summed loss with respect to the log-probabilities, for two-pass gradients.

    Args:
        objective: gives the loss; its settings are fixed by now.
        logp: float, values without gradient.
        given: everything else.

    Returns:
        d(sum of losses)/d(logp), shaped like ``logp``, and the loss, detached.
    """
    with torch.enable_grad():
        leaf = logp.detach().requires_grad_()
        found = objective.loss(leaf, given)
        (gradient,) = torch.autograd.grad(found.loss.sum(), leaf)
    return gradient, found._replace(loss=found.loss.detach())
