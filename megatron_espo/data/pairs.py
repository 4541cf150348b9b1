"""Preference data: reading files of prompts with a chosen and a rejected completion."""

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_espo.config import SpelledTokens
from megatron_espo.data.encoding import PromptEncoder
from megatron_espo.data.jsonl import read_jsonl
from megatron_espo.data.sft import tokenize_record
from megatron_espo.data.tokenizer import FastTokenizer, SpecialIds
from megatron_espo.errors import UserError

_SIDES = ("chosen", "rejected")


@dataclass(frozen=True, eq=False)
class PairRows:
    """The pairs of a file that fit, tokenized, in one flat array.

    Attributes:
        path: the file.
        ids: special ids of the tokenizer.
        completion_length: tokens of every completion, or None where each has its own.
        tokens: int32, prompt, chosen and rejected completion of all pairs, one after another.
        starts: int64 ``[3 n + 1]``, where each of these parts starts.
        num_skipped: pairs that do not fit and are left out.
    """

    path: str
    ids: SpecialIds
    completion_length: int | None
    tokens: NDArray[np.int32]
    starts: NDArray[np.int64]
    num_skipped: int

    def __len__(self) -> int:
        """Return n, the number of pairs that fit."""
        return len(self.starts) // 3

    def pair(self, index: int) -> tuple[NDArray[np.int32], ...]:
        """Return the prompt, the chosen and the rejected completion of a pair."""
        a, b, c, d = self.starts[3 * index : 3 * index + 4]
        parts = self.tokens[a:b], self.tokens[b:c], self.tokens[c:d]
        return parts[0], self._filled(parts[1]), self._filled(parts[2])

    def prompt_lengths(self) -> NDArray[np.int64]:
        """Return the tokens of each prompt: int64 ``[n]``."""
        return np.diff(self.starts)[::3]

    def completion_lengths(self) -> NDArray[np.int64]:
        """Return the tokens of each completion, what fills it up included: int64 ``[n, 2]``."""
        own = np.diff(self.starts).reshape(-1, 3)[:, 1:]
        return own if self.completion_length is None else np.full_like(own, self.completion_length)

    def _filled(self, completion: NDArray[np.int32]) -> NDArray[np.int32]:
        if self.completion_length is None:
            return completion
        room = self.completion_length - len(completion)
        return np.pad(completion, (0, room), constant_values=self.ids.eos_token_id)


def read_pairs(
    path: str | Path,
    tokenizer: FastTokenizer,
    ids: SpecialIds,
    *,
    seq_length: int,
    completion_length: int | None = None,
    skip_long: bool = False,
    spelled: SpelledTokens = "refuse",
    shortest_prompt: int = 0,
) -> PairRows:
    """Read and tokenize a file of preference pairs.

    A line is {"prompt", "chosen", "rejected"}. Texts are taken as they are, as in fine-tuning. A
    prompt of chat messages is written in the tokenizer's chat format, and its completions are texts
    or lists of one assistant message; without a prompt, "chosen" and "rejected" are conversations
    that differ in their last message.

    Args:
        path: JSONL.
        tokenizer: must have a chat format if the file holds messages.
        ids: its special ids.
        seq_length: most tokens of a prompt with a completion.
        completion_length: tokens of every completion; None: as many as it has.
        skip_long: whether to leave out pairs that do not fit instead of refusing the file.
        spelled: what to do with special tokens that messages spell; see PromptConfig.
        shortest_prompt: fewest tokens of a prompt.

    Returns:
        The pairs that fit.

    Raises:
        UserError: a line is not a pair or does not fit.
    """
    tokens, starts, num_skipped = array("i"), array("q", [0]), 0
    encoder = PromptEncoder(tokenizer, spelled, ids.mask_token_id, ids.stop_token_ids)
    for number, record in read_jsonl(path):
        try:
            parts = _tokenize(record, tokenizer, encoder, ids, completion_length)
        except UserError as error:
            raise UserError(f"{path}:{number}: {error}") from error
        if len(parts[0]) < shortest_prompt:
            raise UserError(
                f"{path}:{number}: the prompt is empty, and with --logit-shift nothing predicts a "
                "row's first token; give it a prompt"
            )
        problem = _misfit(parts, seq_length, completion_length)
        if problem and not skip_long:
            raise UserError(f"{path}:{number}: {problem} or pass --dpo-skip-long")
        if problem:
            num_skipped += 1
            continue
        for part in parts:
            tokens.extend(part)
            starts.append(len(tokens))
    if len(starts) == 1:
        raise UserError(
            f"{path}: none of the {num_skipped} pairs fits; raise --seq-length {seq_length}"
            + (f" or --dpo-completion-length {completion_length}" if completion_length else "")
        )
    flat, places = np.array(tokens, dtype=np.int32), np.array(starts, dtype=np.int64)
    return PairRows(str(path), ids, completion_length, flat, places, num_skipped)


def _tokenize(
    record: Mapping[str, Any],
    tokenizer: FastTokenizer,
    encoder: PromptEncoder,
    ids: SpecialIds,
    completion_length: int | None,
) -> list[list[int]]:
    """Return the ids of the prompt and of both completions of a line."""
    parts: list[list[int]] = []
    for side, example in zip(_SIDES, _examples(record), strict=True):
        try:
            prompt, completion = tokenize_record(example, tokenizer, encoder)
        except UserError as error:
            raise UserError(f'"{side}": {error}') from error
        if ids.mask_token_id in prompt or ids.mask_token_id in completion:
            raise UserError("spells the mask token; take it out of the text")
        # Without room for an end of sequence a completion of the fixed length needs none.
        if completion[-1:] != [ids.eos_token_id] and len(completion) != completion_length:
            completion.append(ids.eos_token_id)
        parts = parts or [prompt]
        if parts[0] != prompt:
            raise UserError("the chosen and the rejected one answer different prompts; correct it")
        parts.append(completion)
    if parts[1] == parts[2]:
        raise UserError("the chosen and the rejected completion are the same; remove the line")
    return parts


def _examples(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Write a line as two lines of fine-tuning."""
    prompt = record.get("prompt")
    before = [] if prompt is None else _messages(prompt)
    for side in _SIDES:
        answer = record.get(side)
        if isinstance(prompt, str) and isinstance(answer, str):
            yield {"prompt": prompt, "completion": answer}
            continue
        if prompt is not None and isinstance(answer, str):
            answer = [{"role": "assistant", "content": answer}]
        after = _messages(answer)
        if before is None or after is None:
            raise UserError(
                'needs "prompt", "chosen" and "rejected" as texts or as lists of messages; '
                f'"{side}" or its prompt is neither: correct it'
            )
        if not after or not after[-1].get("content"):
            raise UserError(f'"{side}" is empty; remove the line')
        if prompt is not None and len(after) != 1:
            raise UserError(f'"{side}" must be one assistant message after the prompt; correct it')
        yield {"messages": [*before, *after]}


def _messages(value: object) -> list[Mapping[str, Any]] | None:
    """Return a list of messages, or None for anything else."""
    if isinstance(value, list) and all(isinstance(message, Mapping) for message in value):
        return value
    return None


def _misfit(
    parts: Sequence[Sequence[int]], seq_length: int, completion_length: int | None
) -> str | None:
    """Say why a pair does not fit and what to change, or return None."""
    prompt, longest = len(parts[0]), max(len(part) for part in parts[1:])
    if completion_length is not None and longest > completion_length:
        return (
            f"a completion has {longest} tokens, end of sequence included, and does not fit "
            f"--dpo-completion-length {completion_length}; raise it"
        )
    longest = completion_length or longest
    if prompt + longest > seq_length:
        return (
            f"prompt ({prompt} tokens) and completion ({longest}) do not fit --seq-length "
            f"{seq_length}; raise it"
        )
    return None
