"""Editing: tokens of the open block are replaced after they were committed (LLaDA2.1, 2602.08676).

A step predicts every token of the completion in the open block, committed or not. Beside the masks
that parallel decoding fills, each committed token is replaced by another one that the step predicts
with more than a threshold (tokens to tokens, section 2). Once nothing is masked, further steps edit
alone, until one changes nothing or as many were made as are allowed.

Neither the prompt nor a finished block is edited: the published ``generate`` reads the predictions
of the open block alone (modeling_llada2_moe.py of inclusionAI/LLaDA2.1-mini). So keys and values of
finished blocks stay exact.
"""

from torch import Tensor


def select_edits(
    drawn: Tensor, likelihood: Tensor, current: Tensor, editable: Tensor, threshold: float
) -> Tensor:
    """Choose committed tokens that a step replaces.

    Args:
        drawn: int64 ``[a, k]``, tokens that the step drew.
        likelihood: float64 ``[a, k]``, their probabilities. Handed over by one rank, as
            :func:`megatron_espo.generation.remasking.select_confident` says.
        current: int64 ``[a, k]``, tokens that stand there.
        editable: bool ``[a, k]``, committed tokens of the completion.
        threshold: an edit wants a probability above it.

    Returns:
        bool ``[a, k]``.
    """
    return editable & (drawn != current) & (likelihood > threshold)
