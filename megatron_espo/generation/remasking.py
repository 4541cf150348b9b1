"""Which masked positions a denoising step commits: schedules and orders (no process groups).

Orders of LLaDA's sampler: ``low_confidence``, ``random`` (arXiv 2502.09992, section 2.4).
Orders of Dream's sampler: ``origin``, ``maskgit_plus``, ``topk_margin``, ``entropy``.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from megatron_espo.config import RolloutConfig
from megatron_espo.parallel.vocab import TokenDraw

Remasking = Literal["low_confidence", "random", "origin", "maskgit_plus", "topk_margin", "entropy"]
REMASKING_ORDERS: tuple[str, ...] = get_args(Remasking)
DREAM_ORDERS = ("origin", "maskgit_plus", "topk_margin", "entropy")


def commit_counts(num_masked: int, steps: int) -> list[int]:
    """Split a block's masked tokens evenly over its steps, the remainder to the early steps.

    Args:
        num_masked: masked tokens when the block starts.
        steps: denoising steps of the block.

    Returns:
        Tokens to commit at each step.
    """
    base, remainder = divmod(num_masked, steps)
    return [base + (step < remainder) for step in range(steps)]


def dream_commit_counts(num_masked: int, steps: int, epsilon: float = 1e-3) -> list[int]:
    """Tokens that Dream commits at each step of its linear schedule.

    The share 1 - s/t of what is still masked, rounded down in float32 as Dream does, and
    everything at the last step; t runs over linspace(1, epsilon, steps + 1).

    Args:
        num_masked: masked tokens when the block starts.
        steps: denoising steps of the block.
        epsilon: last time of the schedule.

    Returns:
        Tokens to commit at each step; a step may commit none.
    """
    shares = dream_commit_shares(steps, epsilon)
    left = torch.tensor(float(num_masked))
    counts = []
    for step in range(steps):
        count = int(left) if step == steps - 1 else int(left * shares[step])
        counts.append(count)
        left = left - count
    return counts


def dream_commit_shares(steps: int, epsilon: float = 1e-3) -> Tensor:
    """Probability that a masked token is committed at each step: 1 - s/t, and 1 at the last.

    Returns:
        float32 ``[steps]``.
    """
    times = torch.linspace(1.0, epsilon, steps + 1)
    shares = 1 - times[1:] / times[:-1]
    shares[-1] = 1.0
    return shares


def commit_schedule(config: RolloutConfig) -> Tensor:
    """Tokens that each step of a block commits, by the schedule of the order: int64 ``[steps]``.

    With parallel decoding: the one that every step commits at least, but for those steps that
    leave it to the next one (--rollout-cache-unsure refresh).
    """
    if config.is_parallel:
        return torch.ones(2 * config.block_length, dtype=torch.int64)
    counts = dream_commit_counts if config.remasking in DREAM_ORDERS else commit_counts
    return torch.tensor(counts(config.block_length, config.steps_per_block))


def rank_by(order: Remasking, draw: TokenDraw) -> Tensor:
    """Score the candidates of a step; the highest are committed first.

    Args:
        order: an order that ranks by the model's output; ``random`` and ``origin`` do not.
        draw: the tokens drawn for the candidates, fields of shape ``[r]``.

    Returns:
        float32 ``[r]``.
    """
    if order == "low_confidence":
        return draw.log_confidence
    if order == "maskgit_plus":
        return draw.log_tempered
    score = draw.margin if order == "topk_margin" else draw.negative_entropy
    assert order in ("topk_margin", "entropy") and score is not None, order
    return score


def select_confident(
    scores: Tensor,
    confidence: Tensor,
    threshold: float | None,
    factor: float | None,
    least: int = 1,
) -> Tensor:
    """Choose what a step of parallel decoding commits (Fast-dLLM, arXiv 2505.22618, section 3.3).

    ``threshold``: the most confident candidate, and every other whose confidence is at least the
    threshold. ``factor``: the n most confident, n the largest number with
    (n + 1) (1 - confidence of the n-th) < factor, and at least one. Ties go to the earlier
    position.

    Args:
        scores: float ``[b, c]``, logarithms of the confidences, -inf where there is no candidate.
        confidence: float64 ``[b, c]``. Handed over, because ranks of one model must not differ by a
            bit and hosts may take exponentials differently.
        threshold: the threshold, or None for the factor's rule.
        factor: the factor, or None.
        least: committed in any case; 0 in a step that may leave it to the next one.

    Returns:
        bool ``[b, c]``; in a row without candidates nothing.
    """
    ranks = descending_ranks(scores)
    if threshold is not None:
        confident = confidence >= threshold
    else:
        assert factor is not None
        # The left side grows with n, so what holds for the n-th holds for those before it.
        confident = (ranks + 2) * (1 - confidence) < factor
    return (confident | (ranks < least)) & (scores > -torch.inf)


def select_highest(scores: Tensor, counts: Tensor | int) -> Tensor:
    """Mark the highest scores of each row; ties go to the earlier position.

    Args:
        scores: float ``[b, c]``.
        counts: entries to mark, one number or int64 ``[b]``.

    Returns:
        bool ``[b, c]``.
    """
    counts = torch.as_tensor(counts, device=scores.device).view(-1, 1)
    return descending_ranks(scores) < counts


def descending_ranks(scores: Tensor) -> Tensor:
    """Number the scores of each row from the highest, 0; ties go to the earlier position."""
    return scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
