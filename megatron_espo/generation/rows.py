"""The completions of one call to the sampler: their tokens, and how far each has come.

Each row has its own block and step, so rows that finish early can leave and others can enter.
Nothing here runs the model, and everything is on the host: a step sends its tokens to the device
and reads back what was drawn.

Symbols: n rows, a rows in flight, s positions, l completion length, k block length.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_espo.config import RolloutConfig
from megatron_espo.model.handle import DiffusionModel
from megatron_espo.passes.shapes import round_up
from megatron_espo.random import stream, uniform

# Steps whose random numbers are drawn at once: a draw is some hundred operations, however small.
_STEPS_DRAWN = 16


@dataclass
class Edits:
    """How far the editing of each row's block has come (generation.editing).

    Attributes:
        changed: bool ``[n]``, whether the last step of the row replaced a token.
        post_steps: int64 ``[n]``, steps in that block that began without a mask.
        likelihood: float64 ``[n, k]``, probabilities of that block's committed tokens.
        most_post_steps: steps that a block makes at most once nothing in it is masked.
    """

    changed: Tensor
    post_steps: Tensor
    likelihood: Tensor
    most_post_steps: int

    def commit(
        self, index: Tensor, committed: Tensor, masked: Tensor, confidence: Tensor
    ) -> Tensor:
        """Note a step of some rows; returns what it adds to probabilities, float64 ``[a, k]``.

        A token that is replaced takes its probability along.
        """
        before = self.likelihood[index]
        self.likelihood[index] = torch.where(committed, confidence, before)
        self.changed[index] = (committed & ~masked).any(1)
        self.post_steps[index] += ~masked.any(1)
        return confidence - before

    def are_over(self, index: Tensor) -> Tensor:
        """Say which rows' blocks are not edited again once nothing is masked: bool ``[a]``."""
        made = self.post_steps[index]
        return (made >= self.most_post_steps) | ((made > 0) & ~self.changed[index])

    def forget(self, index: Tensor) -> None:
        """Let some rows begin another block."""
        self.post_steps[index] = 0
        self.likelihood[index] = 0.0


@dataclass
class Rows:
    """Rows in the order of their prompts' lengths, longest first; on the host.

    Attributes:
        order: int64 ``[n]``, the caller's number of each row.
        tokens: int64 ``[n, s]``: [prompt][completion][padding].
        completions: int64 ``[n, l]``, in the caller's order; the mask token where nothing is
            committed yet.
        commit_steps: int32 ``[n, l]``, likewise in the caller's order, see Generation; None where
            they are not recorded.
        prompt_lengths: int64 ``[n]``.
        offsets: int64 ``[n]``, prompt tokens that lie in the first block: 0 where blocks begin with
            the completion, the rest of the prompt's last block where they are counted from
            position 0 of the row.
        widths: positions of prompt and completion per row.
        sample_ids: int64 ``[n]``.
        masked: bool ``[n, k]``, masked positions of each row's block.
        block: int64 ``[n]``, the block that the row is in.
        step: int64 ``[n]``, the denoising step of that block.
        complete: bool ``[n]``, whether that block is final: nothing is masked, or will be edited.
        edits: of that block's committed tokens; None where they stay.
        undecided: bool ``[n]``, whether the last step of the row committed nothing.
        numbers: float64 ``[n, d, 2, k]``, the uniform numbers of d steps of each row.
        num_evaluations: int64 ``[n]``.
        num_committed: int64 ``[n]``, tokens that the model decided.
        confidence: float64 ``[n]``, summed probabilities of the committed tokens.
        work: float64 ``[n, 4]``, see Generation.
    """

    order: Tensor
    tokens: Tensor
    completions: Tensor
    commit_steps: Tensor | None
    prompt_lengths: Tensor
    offsets: Tensor
    widths: list[int]
    sample_ids: Tensor
    masked: Tensor
    block: Tensor
    step: Tensor
    complete: Tensor
    edits: Edits | None
    undecided: Tensor
    numbers: Tensor
    num_evaluations: Tensor
    num_committed: Tensor
    confidence: Tensor
    work: Tensor

    def starts(self, index: Tensor) -> Tensor:
        """Where the current blocks of some rows start: int64 ``[a]``."""
        first = self.prompt_lengths[index] - self.offsets[index]
        return first + self.block[index] * self.masked.size(1)

    def last_blocks(self, index: Tensor) -> Tensor:
        """The last blocks of some rows: int64 ``[a]``."""
        length = self.completions.size(1)
        return (self.offsets[index] + length - 1) // self.masked.size(1)

    def _completion_columns(self, index: Tensor) -> Tensor:
        """Columns of the completion that the places of current blocks are: int64 ``[a, k]``.

        Below 0 in the prompt, and not below l after the completion.
        """
        k = self.masked.size(1)
        return (self.block[index] * k - self.offsets[index])[:, None] + torch.arange(k)

    def places(self, index: Tensor) -> Tensor:
        """Say which places of some rows' blocks belong to the completion: bool ``[a, k]``."""
        columns = self._completion_columns(index)
        return (columns >= 0) & (columns < self.completions.size(1))

    def block_tokens(self, index: Tensor) -> Tensor:
        """Give the tokens that some rows' blocks have: int64 ``[a, k]``, padding after the end."""
        columns = self.starts(index)[:, None] + torch.arange(self.masked.size(1))
        return self.tokens[index].gather(1, columns.clamp(max=self.tokens.size(1) - 1))

    def noise(self, index: Tensor, seed: int, purpose: str) -> Tensor:
        """Give the uniform numbers of a step for some rows; asked for at each of their steps.

        They depend on the seed, the purpose, and each row's sample id, block and step. Those of
        several steps are drawn at once.

        Args:
            index: int64 ``[a]``.
            seed: the run's seed.
            purpose: name of these draws.

        Returns:
            float64 ``[a, 2, k]``: for the tokens, and for orders that are random.
        """
        drawn, _, k = self.numbers.shape[1:]
        turn = self.step[index] % drawn
        due = index[turn == 0]
        for block in self.block[due].unique().tolist():
            rows = due[self.block[due] == block]
            key = stream(seed, f"token/{purpose}", block)
            ids, starts = self.sample_ids[rows], self.step[rows] * 2 * k
            self.numbers[rows] = uniform(key, ids, drawn * 2 * k, starts).view(-1, drawn, 2, k)
        return self.numbers[index, turn]

    def commit(self, index: Tensor, chosen: Tensor, confidence: Tensor) -> None:
        """Put the tokens of a step into some rows.

        Args:
            index: int64 ``[a]``.
            chosen: int64 ``[a, k]``, tokens for places of the block, or -1.
            confidence: float64 ``[a, k]``, their probabilities; read where a token was chosen.
        """
        committed, masked = chosen >= 0, self.masked[index]
        row, column = committed.nonzero(as_tuple=True)
        rows, tokens = index[row], chosen[row, column]
        self.tokens[rows, self.starts(rows) + column] = tokens
        columns = self.block[rows] * chosen.size(1) + column - self.offsets[rows]
        self.completions[self.order[rows], columns] = tokens
        if self.commit_steps is not None:
            # A token that is committed once more was decided by the last of these steps.
            steps = self.num_evaluations[rows].int()
            self.commit_steps[self.order[rows], columns] = steps
        if self.edits is not None:
            confidence = self.edits.commit(index, committed, masked, confidence)
        self.confidence[index] += torch.where(committed, confidence, 0.0).sum(1)
        number = (committed & masked).sum(1)
        self.num_committed[index] += number
        self.undecided[index] = number == 0
        self.masked[index] &= ~committed

    def want_whole_passes(self, index: Tensor, refresh_steps: int) -> Tensor:
        """Say which rows' next pass is over all their positions, not over a window.

        Args:
            index: int64 ``[a]``.
            refresh_steps: --rollout-cache-refresh-steps.

        Returns:
            bool ``[a]``: rows that begin a block, are due for a refresh, or could
            decide on nothing by the keys and values that they have.
        """
        step = self.step[index]
        due = step % refresh_steps == 0 if refresh_steps else step == 0
        return due | self.undecided[index]

    def count_pass(self, index: Tensor, positions: int, keys: int, head_rows: Tensor) -> None:
        """Note what a pass did for some rows.

        Args:
            index: int64 ``[b]``.
            positions: positions of each row that passed through the layers; twice as many where
                it passed twice.
            keys: positions that they attended to.
            head_rows: int64 ``[b]``, hidden states of each that reached the head.
        """
        passed = torch.full_like(head_rows, positions)
        self.work[index] += torch.stack((passed, passed * keys, head_rows, head_rows * keys), dim=1)

    def end_step(self, index: Tensor, stops: Tensor | None, fill: int) -> Tensor:
        """Count a step of some rows and find those that are final.

        Args:
            index: int64 ``[a]``, rows whose block was not complete.
            stops: int64, tokens that end a completion with the block that holds them; None: none.
            fill: what follows such a block.

        Returns:
            int64 ``[f]``.
        """
        self.step[index] += 1
        complete = ~self.masked[index].any(1)
        if self.edits is not None:
            complete &= self.edits.are_over(index)
        self.complete[index] = complete
        done = index[self.complete[index]]
        final = self.block[done] == self.last_blocks(done)
        if stops is not None and len(done):
            columns, length = self._completion_columns(done), self.completions.size(1)
            tokens = self.completions[self.order[done, None], columns.clamp(0, length - 1)]
            stopped = (torch.isin(tokens, stops) & self.places(done)).any(1)
            ends = columns[:, -1] + 1
            for row, end in zip(done[stopped].tolist(), ends[stopped].tolist(), strict=True):
                self.completions[self.order[row], end:] = fill  # no pass will read its tokens
            final |= stopped
        return done[final]

    def enter_next_block(self, index: Tensor) -> None:
        """Let some rows, int64 ``[a]``, begin their next block."""
        self.block[index] += 1
        self.step[index] = 0
        self.complete[index] = False
        if self.edits is not None:
            self.edits.forget(index)
        self.masked[index] = self.places(index)


def lay_out_rows(
    model: DiffusionModel,
    prompts: Sequence[Sequence[int]],
    sample_ids: Tensor,
    config: RolloutConfig,
    num_steps: int,
    record_steps: bool = False,
) -> Rows:
    """Lay out [prompt][masks][padding] rows, longest first.

    Args:
        model: special tokens and padding.
        prompts: token ids per row.
        sample_ids: int64 ``[n]`` on the host.
        config: sampling settings.
        num_steps: denoising steps of a block at most.
        record_steps: whether to note at which step each token is committed.

    Returns:
        The rows, before their first step.
    """
    n, length = len(prompts), config.completion_length
    order = sorted(range(n), key=lambda i: -len(prompts[i]))
    longest = len(prompts[order[0]]) + length
    s = max(model.shapes.width(longest), model.shapes.sampled_width(longest))
    if model.blocks is not None:  # windows reach to the ends of blocks
        s = round_up(s, model.blocks.size) + int(model.logit_shift)
        s = round_up(s, model.shapes.multiple)
    tokens = torch.full((n, s), model.pad_token_id)
    for row, i in zip(tokens, order, strict=True):
        prompt = torch.tensor(prompts[i], dtype=torch.int64)
        row[: len(prompt)] = prompt
        row[len(prompt) : len(prompt) + length] = model.mask_token_id
    lengths = torch.tensor([len(prompts[i]) for i in order], dtype=torch.int64)
    k, drawn = config.block_length, min(num_steps, _STEPS_DRAWN)
    offsets = torch.zeros_like(lengths) if model.blocks is None else lengths % k
    rows = Rows(
        order=torch.tensor(order),
        tokens=tokens,
        completions=torch.full((n, length), model.mask_token_id),
        commit_steps=torch.full((n, length), -1, dtype=torch.int32) if record_steps else None,
        prompt_lengths=lengths,
        offsets=offsets,
        widths=(lengths + length).tolist(),
        sample_ids=sample_ids[order],
        masked=torch.ones(n, k, dtype=torch.bool),
        block=torch.full((n,), -1),
        step=torch.zeros(n, dtype=torch.int64),
        complete=torch.zeros(n, dtype=torch.bool),
        edits=_no_edits(n, config) if config.is_editing else None,
        undecided=torch.zeros(n, dtype=torch.bool),
        numbers=torch.empty(n, drawn, 2, k, dtype=torch.float64),
        num_evaluations=torch.zeros(n, dtype=torch.int64),
        num_committed=torch.zeros(n, dtype=torch.int64),
        confidence=torch.zeros(n, dtype=torch.float64),
        work=torch.zeros(n, 4, dtype=torch.float64),
    )
    rows.enter_next_block(torch.arange(n))
    return rows


def _no_edits(n: int, config: RolloutConfig) -> Edits:
    """The state before the first edit."""
    return Edits(
        changed=torch.zeros(n, dtype=torch.bool),
        post_steps=torch.zeros(n, dtype=torch.int64),
        likelihood=torch.zeros(n, config.block_length, dtype=torch.float64),
        most_post_steps=config.max_post_steps,
    )
