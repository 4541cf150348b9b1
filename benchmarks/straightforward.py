"""The published algorithm in plain PyTorch on transformers' Llama, as the thing to compare with.

Written for the benchmarks alone, from the papers: LLaDA's block-wise sampler (arXiv 2502.09992,
algorithm 5) and ESPO's coupled ELBO and clipped objective (arXiv 2512.03759). It computes the
logits of whole sequences, has no cache, gives each view of an ELBO a row of its own, and attends
with a full mask through transformers' scaled-dot-product attention. It is not slowed down on
purpose: no float64, no copy that the next line does not read, the cross entropy of masked
positions only.

Symbols: b rows, s positions, p prompt length, l completion length, m draws, n vocabulary.
"""

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM


def full_logits(llama: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    """Compute logits ``[b, s, n]``, every position seeing every other."""
    s = tokens.size(1)
    mask = torch.ones(1, 1, s, s, dtype=torch.bool)
    logits: Tensor = llama(input_ids=tokens, attention_mask=mask, use_cache=False).logits
    return logits


@torch.no_grad()
def generate(
    llama: LlamaForCausalLM,
    prompts: Tensor,
    mask_token_id: int,
    *,
    completion_length: int,
    block_length: int,
    denoising_steps: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sample completions block by block, in the low-confidence order.

    Args:
        llama: the model.
        prompts: int64 ``[b, p]``, of one length.
        mask_token_id: the mask token.
        completion_length: l.
        block_length: tokens per block.
        denoising_steps: model evaluations, split evenly over the blocks.
        temperature: 0 takes the most likely token.
        generator: of the Gumbel noise.

    Returns:
        int64 ``[b, l]``.
    """
    b, p = prompts.shape
    x = torch.full((b, p + completion_length), mask_token_id)
    x[:, :p] = prompts
    steps = denoising_steps // (completion_length // block_length)
    for start in range(p, p + completion_length, block_length):
        end = start + block_length
        base, remainder = divmod(block_length, steps)
        for step in range(steps):
            masked = x == mask_token_id
            logits = full_logits(llama, x).float()
            # The mask token itself is no answer: a position that drew it would stay masked.
            probability = logits.softmax(dim=-1)
            logits[..., mask_token_id] = float("-inf")
            if temperature > 0.0:
                noise = torch.empty_like(logits).exponential_(generator=generator)
                logits = logits.div_(temperature).sub_(noise.log_())
            chosen = logits.argmax(dim=-1)
            confidence = probability.gather(-1, chosen[..., None])[..., 0]
            confidence = torch.where(masked, confidence, float("-inf"))
            confidence[:, end:] = float("-inf")
            picked = confidence.topk(base + (step < remainder), dim=1).indices
            x.scatter_(1, picked, chosen.gather(1, picked))
    return x[:, p:]


def coupled_elbo(
    llama: LlamaForCausalLM,
    tokens: Tensor,
    prompt_length: int,
    masks: Tensor,
    mask_token_id: int,
    *,
    pass_per_mask: bool = False,
) -> Tensor:
    """Estimate the ELBO of completions by coupled pairs of masks.

    Args:
        llama: the model.
        tokens: int64 ``[b, s]``, prompt and completion.
        prompt_length: p.
        masks: bool ``[b, m, 2, l]``, a random subset and its complement per draw.
        mask_token_id: the mask token.
        pass_per_mask: run the model once per draw and side with b rows each, as the released code
            does, instead of once with all ``b * m * 2`` rows.

    Returns:
        float32 ``[b, m]`` with gradient, nats per sequence.
    """
    b, m, _, length = masks.shape
    completions = tokens[:, prompt_length:]

    def sums(rows: Tensor, masks: Tensor) -> Tensor:
        """Sum the cross entropy of each row's masked positions: ``[r]``."""
        noised = rows.clone()
        noised[:, prompt_length:][masks] = mask_token_id
        logits = full_logits(llama, noised)[:, prompt_length:]
        losses = functional.cross_entropy(
            logits[masks].float(), rows[:, prompt_length:][masks], reduction="none"
        )
        table = torch.zeros(masks.shape)
        table[masks] = losses
        return table.sum(dim=1)

    assert completions.shape == (b, length)
    if pass_per_mask:
        parts = [sums(tokens, masks[:, i, j]) for i in range(m) for j in range(2)]
        cross_entropy = torch.stack(parts, dim=1).view(b, m, 2)
    else:
        rows = tokens.repeat_interleave(2 * m, dim=0)
        cross_entropy = sums(rows, masks.flatten(0, 2)).view(b, m, 2)
    counts = masks.sum(dim=-1)
    weights = torch.where(counts > 0, (length + 1) / (2 * counts.clamp(min=1)), 0.0)
    return -(weights * cross_entropy).sum(dim=-1)


def espo_loss(elbo: Tensor, elbo_old: Tensor, advantages: Tensor, length: int) -> Tensor:
    """Compute the clipped sequence-level objective with a clip range of 0.2.

    Args:
        elbo: float32 ``[b, m]``, with gradient.
        elbo_old: float32 ``[b, m]`` of the sampling policy.
        advantages: float32 ``[b]``.
        length: l.

    Returns:
        The mean loss.
    """
    ratio = ((elbo.mean(1) - elbo_old.mean(1)) / length).exp()
    clipped = ratio.clamp(0.8, 1.2)
    return -torch.minimum(ratio * advantages, clipped * advantages).mean()
