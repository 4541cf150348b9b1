"""Supervised fine-tuning data: a prompt, its completion, and the padding that ends it.

A masked-diffusion model fills a completion of fixed length, so it learns where to stop by
predicting the end-of-sequence tokens that fill the completion up. They belong to the completion;
only what follows the completion is padding without a loss (arXiv 2502.09992, section 2.3).
"""

import functools
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from megatron_espo.config import SpelledTokens
from megatron_espo.data.encoding import PromptEncoder, encode, encode_prompt, render_chat
from megatron_espo.data.jsonl import read_jsonl
from megatron_espo.data.tokenizer import TURN_ENDS, FastTokenizer, SpecialIds
from megatron_espo.errors import UserError

if TYPE_CHECKING:
    from megatron.core.datasets.utils import Split


@dataclass(frozen=True)
class SftExample:
    """One line of a fine-tuning file."""

    line: int
    prompt: list[int]
    completion: list[int]
    """Ends with the end-of-sequence token."""


class SftDataset(Dataset[dict[str, Tensor]]):
    """Fixed-length rows of a JSONL file, epoch after epoch, each in an order of its own."""

    def __init__(
        self,
        path: str | Path,
        tokenizer: FastTokenizer,
        ids: SpecialIds,
        *,
        seq_length: int,
        completion_length: int | None = None,
        num_samples: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        skip_long: bool = False,
        split: "Split | None" = None,
        spelled: SpelledTokens = "refuse",
    ) -> None:
        """Read and tokenize a file.

        Args:
            path: JSONL of {"prompt", "completion"} or {"messages"}.
            tokenizer: the tokenizer.
            ids: its special ids.
            seq_length: tokens in a row.
            completion_length: tokens of every completion; None takes what the prompt leaves.
            num_samples: rows of the data set, over as many epochs as that takes; None is one.
            seed: decides, with the epoch, the order of the rows.
            shuffle: whether to shuffle at all; the file's order otherwise.
            skip_long: whether to leave out examples that do not fit instead of refusing the file.
            split: what the rows are for; Megatron's data loader picks its batch size by it.
            spelled: what to do with special tokens that messages spell; see PromptConfig.

        Raises:
            UserError: a line is not an example or does not fit.
        """
        if completion_length is not None and not 0 < completion_length <= seq_length:
            raise UserError(
                f"--sft-completion-length {completion_length} must lie between 1 and "
                f"--seq-length {seq_length}"
            )
        self.ids, self.seq_length, self.completion_length = ids, seq_length, completion_length
        self.seed, self.shuffle, self.split = seed, shuffle, split
        self.path, self.num_skipped = path, 0
        # One flat array: Python lists would be copied page by page into every loader process.
        tokens, starts, prompts = array("i"), array("q", [0]), array("q")
        for example in read_examples(path, tokenizer, ids, spelled):
            if len(example.completion) - 1 == completion_length:
                # It fills the fixed length: there is no room for an end of sequence, and no need.
                example = replace(example, completion=example.completion[:-1])
            problem = _misfit(example, seq_length, completion_length)
            if problem and not skip_long:
                raise UserError(f"{path}:{example.line}: {problem} or pass --sft-skip-long")
            if problem:
                self.num_skipped += 1
                continue
            tokens.extend(example.prompt + example.completion)
            starts.append(len(tokens))
            prompts.append(len(example.prompt))
        if not prompts:
            raise UserError(
                f"{path}: none of the {self.num_skipped} examples fits; raise --seq-length "
                f"{seq_length} or --sft-completion-length {completion_length}"
            )
        self.tokens = np.array(tokens, dtype=np.int32)
        self.starts = np.array(starts, dtype=np.int64)
        self.prompt_lengths = np.array(prompts, dtype=np.int64)
        self.num_samples = len(prompts) if num_samples is None else num_samples

    @property
    def num_examples(self) -> int:
        """Number of examples that fit, the rows of an epoch."""
        return len(self.prompt_lengths)

    def __len__(self) -> int:
        """Return the number of rows over all epochs."""
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return a row.

        Args:
            index: place in the order of the rows over all epochs.

        Returns:
            ``tokens`` int64 ``[s]``: prompt, completion filled up with end-of-sequence tokens,
            padding; and int64 ``[]``: ``prompt_length``, ``completion_length`` (what fills it up
            included) and ``sample_id``, the index.
        """
        if not 0 <= index < self.num_samples:
            raise IndexError(f"row {index} of a data set of {self.num_samples}")
        epoch, place = divmod(int(index), self.num_examples)
        row = (
            int(epoch_order(self.num_examples, self.seed, epoch)[place]) if self.shuffle else place
        )
        prompt_length = int(self.prompt_lengths[row])
        text = self.tokens[self.starts[row] : self.starts[row + 1]]
        length = self.completion_length or self.seq_length - prompt_length
        tokens = torch.full((self.seq_length,), self.ids.pad_token_id, dtype=torch.int64)
        tokens[: prompt_length + length] = self.ids.eos_token_id
        tokens[: len(text)] = torch.from_numpy(text)
        return {
            "tokens": tokens,
            "prompt_length": torch.tensor(prompt_length),
            "completion_length": torch.tensor(length),
            "sample_id": torch.tensor(int(index)),
        }


@functools.lru_cache(maxsize=4)
def epoch_order(num_examples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the order of the examples in an epoch.

    Args:
        num_examples: examples in an epoch.
        seed: the run's seed.
        epoch: the epoch, from 0.

    Returns:
        int64 ``[num_examples]``, a permutation that depends on the arguments alone: numpy
        promises the raw bits of Philox for all its versions.
    """
    bits = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64))
    order = np.argsort(bits.random_raw(num_examples), kind="stable")
    order.setflags(write=False)  # shared by all callers
    return order


def read_examples(
    path: str | Path, tokenizer: FastTokenizer, ids: SpecialIds, spelled: SpelledTokens = "refuse"
) -> Iterator[SftExample]:
    """Yield the tokenized examples of a JSONL file.

    A line is {"prompt": text, "completion": text}, taken as it is, or {"messages": [...]} in chat
    form: the last message, the assistant's, is the completion, its end of turn included. Text may
    write the special tokens of a format by hand, messages may not.

    Args:
        path: the file.
        tokenizer: the tokenizer.
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
            prompt, completion = _tokenize(record, tokenizer, encoder)
        except UserError as error:
            raise UserError(f"{path}:{number}: {error}") from error
        if ids.mask_token_id in prompt or ids.mask_token_id in completion:
            raise UserError(f"{path}:{number}: spells the mask token; take it out of the text")
        if completion[-1:] != [ids.eos_token_id]:
            completion.append(ids.eos_token_id)
        yield SftExample(number, prompt, completion)


def _tokenize(
    record: Mapping[str, Any], tokenizer: FastTokenizer, encoder: PromptEncoder
) -> tuple[list[int], list[int]]:
    """Return the ids of the prompt and of the completion of one line."""
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
