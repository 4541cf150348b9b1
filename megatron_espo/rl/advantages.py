"""Advantages of the completions of a group."""

from torch import Tensor


def leave_one_out(rewards: Tensor, std_norm: bool = False, epsilon: float = 1e-6) -> Tensor:
    """Compare each completion's reward with the mean of the others' (RLOO; ESPO section 3).

    A_i = R_i - mean_{j != i} R_j = G/(G-1) (R_i - mean R).

    Args:
        rewards: float64 ``[p, G]``, one row per prompt, G >= 2.
        std_norm: divide by the group's standard deviation (GRPO); ESPO does not.
        epsilon: keeps a group of equal rewards from dividing by zero.

    Returns:
        float64 ``[p, G]``.
    """
    group_size = rewards.size(1)
    advantages = (rewards - rewards.mean(dim=1, keepdim=True)) * group_size / (group_size - 1)
    if std_norm:
        advantages = advantages / (rewards.std(dim=1, keepdim=True) + epsilon)
    return advantages
