"""Supervised fine-tuning data: reading files of prompts and completions."""

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_espo.config import SpelledTokens
from megatron_espo.data.encoding import PromptEncoder, encode, encode_prompt, render_chat
from megatron_espo.data.jsonl import read_jsonl
from megatron_espo.data.tokenizer import TURN_ENDS, FastTokenizer, SpecialIds
from megatron_espo.errors import UserError


@dataclass(frozen=True)
class SftExample:
    """One line of a fine-tuning file."""

    line: int
    prompt: list[int]
    completion: list[int]
    """Ends with the end-of-sequence token."""


@dataclass(frozen=True, eq=False)
class SftRows:
    """The examples of a fine-tuning file that fit a row, tokenized.

    One flat array: Python lists would be copied page by page into every loader process.

    Attributes:
        path: the file.
        ids: special ids of the tokenizer.
        seq_length: most tokens of a row.
        completion_length: tokens of every completion, or None where each has its own.
        tokens: int32, prompt and completion of all examples, one after another.
        starts: int64 ``[n + 1]``, where each of them starts.
        prompt_lengths: int64 ``[n]``.
        num_skipped: examples that do not fit and are left out.
    """

    path: str
    ids: SpecialIds
    seq_length: int
    completion_length: int | None
    tokens: NDArray[np.int32]
    starts: NDArray[np.int64]
    prompt_lengths: NDArray[np.int64]
    num_skipped: int

    def __len__(self) -> int:
        """Return n, the number of examples that fit."""
        return len(self.prompt_lengths)

    def lengths(self) -> NDArray[np.int64]:
        """Return the tokens of each example, int64 ``[n]``, without what fills its row up."""
        if self.completion_length is not None:
            return self.prompt_lengths + self.completion_length
        return np.diff(self.starts)


def read_rows(
    path: str | Path,
    tokenizer: FastTokenizer,
    ids: SpecialIds,
    *,
    seq_length: int,
    completion_length: int | None = None,
    skip_long: bool = False,
    spelled: SpelledTokens = "refuse",
) -> SftRows:
    """Read and tokenize a fine-tuning file.

    Args:
        path: JSONL of {"prompt", "completion"} or {"messages"}.
        tokenizer: must have a chat format if the file holds messages.
        ids: its special ids.
        seq_length: most tokens of a row.
        completion_length: tokens of every completion; None: as many as it has.
        skip_long: whether to leave out examples that do not fit instead of refusing the file.
        spelled: what to do with special tokens that messages spell; see PromptConfig.

    Returns:
        The examples that fit.

    Raises:
        UserError: a line is not an example or does not fit.
    """
    if completion_length is not None and not 0 < completion_length <= seq_length:
        raise UserError(
            f"--sft-completion-length {completion_length} must lie between 1 and "
            f"--seq-length {seq_length}"
        )
    tokens, starts, prompts, num_skipped = array("i"), array("q", [0]), array("q"), 0
    for example in read_examples(path, tokenizer, ids, spelled):
        if len(example.completion) - 1 == completion_length:
            # It fills the fixed length: there is no room for an end of sequence, and no need.
            example = replace(example, completion=example.completion[:-1])
        problem = _misfit(example, seq_length, completion_length)
        if problem and not skip_long:
            raise UserError(f"{path}:{example.line}: {problem} or pass --sft-skip-long")
        if problem:
            num_skipped += 1
            continue
        tokens.extend(example.prompt + example.completion)
        starts.append(len(tokens))
        prompts.append(len(example.prompt))
    if not prompts:
        raise UserError(
            f"{path}: none of the {num_skipped} examples fits; raise --seq-length "
            f"{seq_length} or --sft-completion-length {completion_length}"
        )
    return SftRows(
        path=str(path),
        ids=ids,
        seq_length=seq_length,
        completion_length=completion_length,
        tokens=np.array(tokens, dtype=np.int32),
        starts=np.array(starts, dtype=np.int64),
        prompt_lengths=np.array(prompts, dtype=np.int64),
        num_skipped=num_skipped,
    )


def read_examples(
    path: str | Path, tokenizer: FastTokenizer, ids: SpecialIds, spelled: SpelledTokens = "refuse"
) -> Iterator[SftExample]:
    """Yield the tokenized examples of a JSONL file.

    A line is {"prompt": text, "completion": text}, taken as it is, or {"messages": [...]} in chat
    form: the last message, the assistant's, is the completion, its end of turn included. Text may
    write the special tokens of a format by hand, messages may not.

    Args:
        path: the file.
        tokenizer: must have a chat format if the file holds messages.
        ids: its special ids.
        spelled: what to do with special tokens that messages spell; see PromptConfig.

    Yields:
        The examples in the order of the file, of any length.

    Raises:
        UserError: naming file and line, when a line is not an example.
    """
    encoder = PromptEncoder(tokenizer, spelled, ids.mask_token_id, ids.stop_token_ids)
    for number, record in read_jsonl(path):
        try:
            prompt, completion = tokenize_record(record, tokenizer, encoder)
        except UserError as error:
            raise UserError(f"{path}:{number}: {error}") from error
        if ids.mask_token_id in prompt or ids.mask_token_id in completion:
            raise UserError(f"{path}:{number}: spells the mask token; take it out of the text")
        if completion[-1:] != [ids.eos_token_id]:
            completion.append(ids.eos_token_id)
        yield SftExample(number, prompt, completion)


def tokenize_record(
    record: Mapping[str, Any], tokenizer: FastTokenizer, encoder: PromptEncoder
) -> tuple[list[int], list[int]]:
    """Tokenize one line of a fine-tuning file.

    Args:
        record: the line.
        tokenizer: must have a chat format if the line holds messages.
        encoder: of the run; says what becomes of special tokens that messages spell.

    Returns:
        The ids of the prompt and of the completion.

    Raises:
        UserError: the line is not an example.
    """
    messages = record.get("messages")
    if messages is not None:
        return _tokenize_chat(messages, tokenizer, encoder)
    prompt, completion = record.get("prompt"), record.get("completion")
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise UserError('needs the texts "prompt" and "completion", or "messages"; add them')
    if not completion:
        raise UserError("the completion is empty; remove the line")
    return encode_prompt(tokenizer, prompt), encode(tokenizer, completion)


def _tokenize_chat(
    messages: object, tokenizer: FastTokenizer, encoder: PromptEncoder
) -> tuple[list[int], list[int]]:
    """Return the ids of a conversation's prompt and of its last turn."""
    if not isinstance(messages, Sequence) or not all(isinstance(m, Mapping) for m in messages):
        raise UserError('"messages" must be a list of {"role", "content"}; correct it')
    if len(messages) < 2 or messages[-1].get("role") != "assistant":
        raise UserError('"messages" must hold a prompt and end with an assistant message; add it')
    messages, names = encoder.mark_messages(messages)
    whole = render_chat(tokenizer, messages, generation_header=False)
    prompt = render_chat(tokenizer, messages[:-1], generation_header=True)
    if not whole.startswith(prompt):
        raise UserError(
            "the chat template writes the prompt differently once it is answered; use a template "
            "that does not"
        )
    # Apart, as when the model answers.
    answer = _answer(whole[len(prompt) :])
    return encoder.encode_marked(prompt, names), encoder.encode_marked(answer, names)


def _answer(rest: str) -> str:
    """Cut off what a chat format writes after the answer's end of turn.

    Some write a line end there, and LLaDA's own the header of another turn, asked for or not.
    """
    ends = [rest.rfind(end) + len(end) for end in TURN_ENDS if end in rest]
    return rest[: max(ends)] if ends else rest.rstrip()


def _misfit(example: SftExample, seq_length: int, completion_length: int | None) -> str | None:
    """Say why an example does not fit and what to change, or return None."""
    prompt, completion = len(example.prompt), len(example.completion)
    if completion_length is not None and completion > completion_length:
        return (
            f"the completion has {completion} tokens, end of sequence included, and does not fit "
            f"--sft-completion-length {completion_length}; raise it"
        )
    needed = prompt + (completion_length or completion)
    if needed > seq_length:
        return (
            f"prompt ({prompt} tokens) and completion ({needed - prompt}) do not fit --seq-length "
            f"{seq_length}; raise it"
        )
    return None
