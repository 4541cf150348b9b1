"""Advantages of the completions of a group (--espo-advantage)."""

from collections.abc import Callable
from functools import cache
from typing import cast

import torch
from torch import Tensor

from megatron_espo.errors import UserError
from megatron_espo.own_code import load_own

Advantage = Callable[[Tensor], Tensor]
"""Of rewards, float64 ``[p, G]``, one row per prompt; gives float64 ``[p, G]``."""


def leave_one_out(rewards: Tensor) -> Tensor:
    """Compare each completion's reward with the mean of the others' (RLOO; ESPO section 3).

    A_i = R_i - mean_{j != i} R_j = G/(G-1) (R_i - mean R).

    Args:
        rewards: float64 ``[p, G]``, one row per prompt, G >= 2.

    Returns:
        float64 ``[p, G]``.
    """
    group_size = rewards.size(1)
    return centred(rewards) * group_size / (group_size - 1)


def std(rewards: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Divide :func:`leave_one_out` by the group's standard deviation (GRPO); ESPO does not.

    Args:
        rewards: as there.
        epsilon: keeps a group of equal rewards from dividing by zero.

    Returns:
        float64 ``[p, G]``.
    """
    return leave_one_out(rewards) / (rewards.std(dim=1, keepdim=True) + epsilon)


def centred(rewards: Tensor) -> Tensor:
    """Take the group's mean off (d1, wd1, SPG): A_i = R_i - mean R, ``[p, G]``."""
    return rewards - rewards.mean(dim=1, keepdim=True)


BUILT_IN: dict[str, Advantage] = {"leave-one-out": leave_one_out, "std": std, "centred": centred}


@cache
def load_advantage(name: str) -> Advantage:
    """Return what --espo-advantage names.

    Args:
        name: a built-in name; FILE.py or a module with a function ``advantage``, or
            ``FILE.py:function`` and ``module.function``.

    Returns:
        The function, checked on two small groups.

    Raises:
        UserError: there is no such function, or it is not one of rewards.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    flag = f"--espo-advantage {name}"
    unknown = UserError(
        f"{flag}: no such advantage; use one of {', '.join(BUILT_IN)}, a FILE.py with a function "
        "advantage, or my_module.my_function"
    )
    found = load_own(name, "--espo-advantage", "advantage", unknown)
    found = getattr(found, "advantage", found)
    if not callable(found):
        raise unknown
    function = cast(Advantage, found)
    try:
        tried = function(torch.tensor([[0.0, 1.0], [0.5, 0.5]], dtype=torch.float64))
    # Whatever a user's function raises means that it does not work.
    except Exception as error:
        raise UserError(f"{flag}: fails on the rewards [[0, 1], [0.5, 0.5]]: {error!r}") from error
    if not isinstance(tried, Tensor) or tried.shape != (2, 2) or not bool(tried.isfinite().all()):
        raise UserError(
            f"{flag}: of rewards [[0, 1], [0.5, 0.5]] it must make a finite tensor of that shape, "
            f"not {tried}"
        )
    return function
