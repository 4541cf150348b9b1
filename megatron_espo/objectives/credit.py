"""Advantages of a completion's tokens, from what its parts are worth."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Credit:
    """How an advantage is split over the tokens of a completion (objectives.ospo).

    Attributes:
        width: most neighbouring parts that are scored together, besides all of them.
        coalitions: most coalitions that are scored, that of no part among them.
        even: bring the weights of each part to the sum 1 (tasks.parts.owen_shapley).
        limit: largest advantage of a token, in standard deviations; 0 for none.
        blame: of a negative advantage the parts that are worth least take most.
    """

    width: int
    coalitions: int
    even: bool
    limit: float
    blame: bool


def split_advantages(
    advantages: Tensor, worth: Tensor, inside: Tensor, bound: float, blame: bool
) -> Tensor:
    """Split advantages over the tokens of parts; other tokens keep their completion's.

    With c the worth of a token, brought to [0, 1] by the least and the largest of the completion,
    A_k = A T c_k / sum c, T the number of tokens in parts: their mean is A. Where all are worth the
    same, or there is no part, A_k = A. With ``blame`` 1 - c stands for c where A < 0.

    Args:
        advantages: float64 ``[n]``.
        worth: float64 ``[n, l]``; not read outside of parts.
        inside: bool ``[n, l]``, the tokens of parts.
        bound: largest absolute value; tokens above it get it.
        blame: see above.

    Returns:
        float64 ``[n, l]``, without gradient.
    """
    low = worth.masked_fill(~inside, torch.inf).amin(dim=1, keepdim=True)
    high = worth.masked_fill(~inside, -torch.inf).amax(dim=1, keepdim=True)
    share = torch.where(high > low, (worth - low) / (high - low), 1.0)
    if blame:
        mirrored = (advantages[:, None] < 0) & (high > low)
        share = torch.where(mirrored, 1.0 - share, share)
    share = torch.where(inside, share, 0.0)
    number = inside.sum(dim=1, keepdim=True)
    share = share * number / share.sum(dim=1, keepdim=True).clamp(min=torch.finfo().tiny)
    split = torch.where(inside, share, 1.0) * advantages[:, None]
    return split.clamp(-bound, bound)
