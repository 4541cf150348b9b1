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
        complete: bool ``[n]`` on the host, whether nothing in that block is masked.
        undecided: bool ``[n]`` on the host, whether the last step of the row committed nothing.
        num_evaluations: int64 ``[n]`` on the host.
        num_committed: int64 ``[n]`` on the host, tokens that the model decided.
        confidence: float64 ``[n]``, summed probabilities of the committed tokens.
        work: float64 ``[n, 4]`` on the host, see Generation.
    """

    order: Tensor
    tokens: Tensor
    prompt_lengths: Tensor
    widths: list[int]
    sample_ids: Tensor
    masked: Tensor
    block: Tensor
    step: Tensor
    complete: Tensor
    undecided: Tensor
    num_evaluations: Tensor
    num_committed: Tensor
    confidence: Tensor
    work: Tensor

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
        host, number = index.cpu(), committed.sum(1).cpu()
        self.num_committed[host] += number
        self.undecided[host] = number == 0

    def want_whole_passes(self, index: Tensor, refresh_steps: int) -> Tensor:
        """Say which rows' next pass is over all their positions, not over a window.

        Args:
            index: int64 ``[a]`` on the host.
            refresh_steps: --rollout-cache-refresh-steps.

        Returns:
            bool ``[a]`` on the host: rows that begin a block, are due for a refresh, or could
            decide on nothing by the keys and values that they have.
        """
        step = self.step[index]
        due = step % refresh_steps == 0 if refresh_steps else step == 0
        return due | self.undecided[index]

    def count_pass(self, index: Tensor, positions: int, keys: int, head_rows: Tensor) -> None:
        """Note what a pass did for some rows.

        Args:
            index: int64 ``[b]`` on the host.
            positions: positions of each row that passed through the layers; twice as many where
                it passed twice.
            keys: positions that they attended to.
            head_rows: int64 ``[b]`` on the host, hidden states of each that reached the head.
        """
        passed = torch.full_like(head_rows, positions)
        self.work[index] += torch.stack((passed, passed * keys, head_rows, head_rows * keys), dim=1)

    def end_step(self, index: Tensor, num_blocks: int, stops: Tensor | None, fill: int) -> Tensor:
        """Count a step of some rows and find those that are final.

        Args:
            index: int64 ``[a]`` on the host, rows whose block was not complete.
            num_blocks: blocks of a completion.
            stops: int64, tokens that end a completion with the block that holds them; None: none.
            fill: what follows such a block.

        Returns:
            int64 ``[f]`` on the host.
        """
        self.step[index] += 1
        self.complete[index] = ~self.masked[index.to(self.masked.device)].any(1).cpu()
        done = index[self.complete[index]]
        final = self.block[done] == num_blocks - 1
        if stops is not None and len(done):
            rows = done.to(self.tokens.device)
            places = self.places(rows)
            stopped = torch.isin(self.tokens[rows[:, None], places], stops).any(1)
            self._fill_after(rows[stopped], places[stopped, -1], num_blocks, fill)
            final |= stopped.cpu()
        return done[final]

    def _fill_after(self, rows: Tensor, last: Tensor, num_blocks: int, fill: int) -> None:
        """Fill the completions of some rows after position ``last``, int64 ``[f]``."""
        ends = self.prompt_lengths[rows] + num_blocks * self.masked.size(1)
        position = torch.arange(self.tokens.size(1), device=self.tokens.device)
        rest = (position > last[:, None]) & (position < ends[:, None])
        self.tokens[rows] = self.tokens[rows].masked_fill(rest, fill)

    def enter_next_block(self, index: Tensor) -> None:
        """Let some rows, int64 ``[a]`` on the host, begin their next block."""
        self.block[index] += 1
        self.step[index] = 0
        self.complete[index] = False
        self.masked[index.to(self.masked.device)] = True


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
        complete=torch.zeros(n, dtype=torch.bool),
        undecided=torch.zeros(n, dtype=torch.bool),
        num_evaluations=torch.zeros(n, dtype=torch.int64),
        num_committed=torch.zeros(n, dtype=torch.int64),
        confidence=torch.zeros(n, dtype=torch.float64, device=device),
        work=torch.zeros(n, 4, dtype=torch.float64),
    )
