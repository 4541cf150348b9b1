"""Losses of masked-diffusion pre-training and supervised fine-tuning."""

from torch import Tensor


def weighted_token_loss(cross_entropy: Tensor, weights: Tensor, lengths: Tensor) -> Tensor:
    """Average the weighted cross entropy over rows, each divided by its own length.

    Equal to sum(w * CE) / (B * L) for rows of one length; with SFT, the length is that of the
    completion (LLaDA, arXiv 2502.09992, algorithms 1 and 2). Because rows weigh the same, the mean
    over micro-batches of equal size is the mean over the batch, in every layout.

    Args:
        cross_entropy: float32 ``[b, s]``, zero where nothing is masked; carries the gradient.
        weights: float32 ``[b]``, 1/p or L/l; ``[b, s]`` where tokens have their own.
        lengths: int64 ``[b]``, maskable tokens of each row.

    Returns:
        float32 scalar.
    """
    if weights.dim() == 2:
        return ((cross_entropy * weights).sum(dim=1) / lengths).mean()
    return (cross_entropy.sum(dim=1) * weights / lengths).mean()
