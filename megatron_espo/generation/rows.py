"""The completions of one call to the sampler: their tokens, and how far each has come.

Each row has its own block and step, so rows that finish early can leave and others can enter.
Nothing here runs the model.

Symbols: n rows, a rows in flight, s positions, l completion length, k block length.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_espo.config import RolloutConfig
from megatron_espo.data.batch import round_up
from megatron_espo.model.handle import DiffusionModel
from megatron_espo.random import stream, uniform


@dataclass
class Rows:
    """Rows in the order of their prompts' lengths, longest first.

    Attributes:
        order: int64 ``[n]`` on the host, the caller's number of each row.
        tokens: int64 ``[n, s]``: [prompt][completion][padding].
        prompt_lengths: int64 ``[n]``.
        widths: positions of prompt and completion per row, on the host.
        sample_ids: int64 ``[n]``.
        masked: bool ``[n, k]``, masked positions of each row's block.
        block: int64 ``[n]`` on the host, the block that the row is in.
        step: int64 ``[n]`` on the host, the denoising step of that block.
        num_evaluations: int64 ``[n]`` on the host.
        confidence: float64 ``[n]``, summed probabilities of the committed tokens.
    """

    order: Tensor
    tokens: Tensor
    prompt_lengths: Tensor
    widths: list[int]
    sample_ids: Tensor
    masked: Tensor
    block: Tensor
    step: Tensor
    num_evaluations: Tensor
    confidence: Tensor

    def places(self, index: Tensor) -> Tensor:
        """Positions of the current blocks of some rows: int64 ``[a, k]``."""
        k = self.masked.size(1)
        starts = self.prompt_lengths[index] + self.block[index.cpu()].to(index.device) * k
        return starts[:, None] + torch.arange(k, device=index.device)

    def completions(self, index: Tensor, length: int) -> Tensor:
        """The completions of some rows: int64 ``[a, l]``."""
        places = self.prompt_lengths[index, None] + torch.arange(length, device=index.device)
        return self.tokens[index[:, None], places]

    def noise(self, index: Tensor, seed: int, purpose: str) -> Tensor:
        """Draw the uniform numbers of a step for some rows.

        They depend on the seed, the purpose, and each row's sample id, block and step.

        Returns:
            float64 ``[a, 2, k]``: for the tokens, and for orders that are random.
        """
        k = self.masked.size(1)
        host = index.cpu()
        blocks, starts = self.block[host], (self.step[host] * 2 * k).to(index.device)
        noise = torch.empty(len(index), 2 * k, dtype=torch.float64, device=index.device)
        for block in blocks.unique().tolist():
            rows = (blocks == block).nonzero()[:, 0].to(index.device)
            key = stream(seed, f"token/{purpose}", block)
            noise[rows] = uniform(key, self.sample_ids[index[rows]], 2 * k, starts[rows])
        return noise.view(-1, 2, k)

    def commit(self, index: Tensor, chosen: Tensor, confidence: Tensor) -> None:
        """Put the tokens of a step into some rows.

        Args:
            index: int64 ``[a]``.
            chosen: int64 ``[a, k]``, tokens for places of the block, or -1.
            confidence: float64 ``[a, k]``, their probabilities; read where a token was chosen.
        """
        committed, places = chosen >= 0, self.places(index)
        rows = index[:, None]
        self.tokens[rows, places] = torch.where(committed, chosen, self.tokens[rows, places])
        self.masked[index] &= ~committed
        self.confidence[index] += torch.where(committed, confidence, 0.0).sum(1)

    def advance(self, index: Tensor, num_blocks: int) -> Tensor:
        """Count a step of some rows, and go to the next block where one is complete.

        Args:
            index: int64 ``[a]`` on the host.
            num_blocks: blocks of a completion.

        Returns:
            int64 ``[f]`` on the host: those whose last block is complete.
        """
        self.step[index] += 1
        complete = index[~self.masked[index.to(self.masked.device)].any(1).cpu()]
        self.block[complete] += 1
        self.step[complete] = 0
        self.masked[complete.to(self.masked.device)] = True
        return complete[self.block[complete] == num_blocks]


def lay_out_rows(
    model: DiffusionModel,
    prompts: Sequence[Sequence[int]],
    sample_ids: Tensor,
    config: RolloutConfig,
) -> Rows:
    """Lay out [prompt][masks][padding] rows, longest first.

    Args:
        model: special tokens, padding and device.
        prompts: token ids per row.
        sample_ids: int64 ``[n]`` on the host.
        config: sampling settings.

    Returns:
        The rows, before their first step.
    """
    n, length = len(prompts), config.completion_length
    order = sorted(range(n), key=lambda i: -len(prompts[i]))
    s = round_up(len(prompts[order[0]]) + length, model.pad_multiple)
    tokens = torch.full((n, s), model.pad_token_id)
    for row, i in zip(tokens, order, strict=True):
        prompt = torch.tensor(prompts[i], dtype=torch.int64)
        row[: len(prompt)] = prompt
        row[len(prompt) : len(prompt) + length] = model.mask_token_id
    lengths = torch.tensor([len(prompts[i]) for i in order], dtype=torch.int64)
    device = model.device
    return Rows(
        order=torch.tensor(order),
        tokens=tokens.to(device),
        prompt_lengths=lengths.to(device),
        widths=(lengths + length).tolist(),
        sample_ids=sample_ids[order].to(device),
        masked=torch.ones(n, config.block_length, dtype=torch.bool, device=device),
        block=torch.zeros(n, dtype=torch.int64),
        step=torch.zeros(n, dtype=torch.int64),
        num_evaluations=torch.zeros(n, dtype=torch.int64),
        confidence=torch.zeros(n, dtype=torch.float64, device=device),
    )
