"""The published algorithm in plain PyTorch on transformers' Llama, as the thing to compare with.

Written for the benchmarks alone, from the papers: LLaDA's block-wise sampler (arXiv 2502.09992,
algorithm 5) and ESPO's coupled ELBO and clipped objective (arXiv 2512.03759). It computes the
logits of whole sequences, has no cache, gives each view of an ELBO a row of its own, and attends
with a full mask through transformers' scaled-dot-product attention. It is not slowed down on
purpose: no float64, no copy that the next line does not read, the cross entropy of masked
positions only.

Symbols: b rows, s positions, p prompt length, l completion length, m draws, n vocabulary.
"""

from collections.abc import Sequence

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


def espo_loss(
    elbo: Tensor,
    elbo_old: Tensor,
    advantages: Tensor,
    length: int,
    elbo_ref: Tensor | None = None,
    kl_coef: float = 0.0,
) -> Tensor:
    """Compute the clipped sequence-level objective with a clip range of 0.2 and the k2 penalty.

    Args:
        elbo: float32 ``[b, m]``, with gradient.
        elbo_old: float32 ``[b, m]`` of the sampling policy.
        advantages: float32 ``[b]``.
        length: l.
        elbo_ref: float32 ``[b, m]`` of the reference policy; None: no penalty.
        kl_coef: weight of the penalty.

    Returns:
        The loss of each completion, ``[b]``.
    """
    ratio = ((elbo.mean(1) - elbo_old.mean(1)) / length).exp()
    clipped = ratio.clamp(0.8, 1.2)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    if elbo_ref is not None:
        loss = loss + kl_coef * (elbo.mean(1) - elbo_ref.mean(1)).square() / (2 * length)
    return loss


def coupled_masks(
    completions: int, draws: int, length: int, generator: torch.Generator | None = None
) -> Tensor:
    """Draw random subsets of k ~ U{0..l} positions with their complements.

    Args:
        completions: b.
        draws: m.
        length: l.
        generator: of the draw.

    Returns:
        bool ``[b, m, 2, l]``.
    """
    counts = torch.randint(0, length + 1, (completions, draws, 1), generator=generator)
    order = torch.rand(completions, draws, length, generator=generator).argsort(dim=-1)
    chosen = order.argsort(dim=-1) < counts
    return torch.stack((chosen, ~chosen), dim=2)


def updates(
    llama: LlamaForCausalLM,
    reference: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    tokens: Tensor,
    prompt_length: int,
    masks: Sequence[Tensor],
    mask_token_id: int,
    advantages: Tensor,
    kl_coef: float,
    rows_per_batch: int,
) -> tuple[Tensor, Tensor]:
    """Learn from a rollout: the frozen policies' ELBOs, then an optimizer step for each of masks.

    Args:
        llama: the policy.
        reference: the policy that it is pulled to.
        optimizer: of the policy.
        tokens: int64 ``[b, s]``, prompts and completions.
        prompt_length: p.
        masks: bool ``[b, m, 2, l]`` of each update.
        mask_token_id: the mask token.
        advantages: float32 ``[b]``.
        kl_coef: weight of the penalty.
        rows_per_batch: rows of a micro-batch, whose gradients are added.

    Returns:
        ELBOs ``[u, b, m]`` of the sampling policy (the first update's are those of the update
        itself, where it is still the policy) and of the reference.
    """
    b, m, _, length = masks[0].shape
    parts = torch.split(torch.arange(b), max(rows_per_batch // (2 * m), 1))

    def elbos(model: LlamaForCausalLM, masks: Tensor, rows: Tensor) -> Tensor:
        return coupled_elbo(model, tokens[rows], prompt_length, masks[rows], mask_token_id)

    with torch.no_grad():
        old = [torch.cat([elbos(llama, each, rows) for rows in parts]) for each in masks[1:]]
        ref = [torch.cat([elbos(reference, each, rows) for rows in parts]) for each in masks]
    old.insert(0, torch.zeros_like(ref[0]))
    for number, each in enumerate(masks):
        optimizer.zero_grad(set_to_none=False)
        for rows in parts:
            elbo = elbos(llama, each, rows)
            if number == 0:
                old[0][rows] = elbo.detach()
            loss = espo_loss(
                elbo, old[number][rows], advantages[rows], length, ref[number][rows], kl_coef
            )
            torch.autograd.backward(loss.sum() / b)
        torch.nn.utils.clip_grad_norm_(llama.parameters(), 1.0)
        optimizer.step()
    return torch.stack(old), torch.stack(ref)
