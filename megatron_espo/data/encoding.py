"""Prompts and completions as token ids, and which special tokens a text may spell.

A special token that a text spells is taken for the token itself. In a prompt that is seldom meant:
a mask token there would be a hole that nothing fills, an end of turn ends the user's turn and lets
the text go on as somebody else.
"""

import itertools
import re
from collections.abc import Collection, Mapping, Sequence

from megatron_espo.config import SpelledTokens
from megatron_espo.data.tokenizer import FastTokenizer
from megatron_espo.errors import UserError

type ChatPrompt = str | Sequence[Mapping[str, str]]
"""Text, taken as it is, or chat messages, each with "role" and "content"."""

# Stand for special tokens that are to be text while a chat template is filled in: two characters
# that Unicode leaves to private use, around a number.
_MARK, _MARKED = "\U0010fffc{}\U0010fffd", re.compile("\U0010fffc([0-9]+)\U0010fffd")


def encode(tokenizer: FastTokenizer, text: str) -> list[int]:
    """Return the ids of a text; special tokens written in the text count, none is added."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def render_chat(
    tokenizer: FastTokenizer,
    messages: Sequence[Mapping[str, str]],
    *,
    generation_header: bool,
) -> str:
    """Write a conversation in the tokenizer's own chat format.

    Args:
        tokenizer: a tokenizer with a chat template.
        messages: the turns, each with "role" and "content".
        generation_header: whether to end with the header of the assistant's next turn.

    Returns:
        The text, special tokens included.

    Raises:
        UserError: there is no message or no chat template, or the template refuses the messages.
    """
    import jinja2

    if not messages:
        raise UserError("the conversation has no message; give at least one")
    for message in messages:
        if not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise UserError(f'the message {dict(message)!r} needs a text "role" and "content"')
    if not tokenizer.chat_template:
        raise UserError(
            f"--tokenizer-model {tokenizer.name_or_path} has no chat template; give prompts as "
            "plain text or add a chat_template.jinja to the folder"
        )
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=generation_header,
        )
    except jinja2.TemplateError as error:
        raise UserError(
            f"the chat template refuses the conversation ({error}); change its messages"
        ) from error
    return str(text)


def encode_prompt(tokenizer: FastTokenizer, prompt: ChatPrompt) -> list[int]:
    """Turn a prompt into ids; special tokens that it spells count.

    Args:
        tokenizer: must have a chat format if the prompt is messages.
        prompt: text, taken as it is; or chat messages ("role", "content"), written in the
            tokenizer's chat format with the header of the assistant's turn at the end.

    Returns:
        The token ids, without special tokens that the text or the format does not write itself.

    Raises:
        UserError: the messages cannot be written in the chat format.
    """
    if isinstance(prompt, str):
        return encode(tokenizer, prompt)
    return encode(tokenizer, render_chat(tokenizer, prompt, generation_header=True))


class PromptEncoder:
    """Turns prompts into ids and does with the special tokens that they spell what was asked for.

    Of messages that concerns every special token: the chat format writes those that belong there.
    Of a prompt that is plain text it concerns the mask token and what ends a completion; others are
    taken as they are, since whoever writes no messages may write the format by hand.
    """

    def __init__(
        self,
        tokenizer: FastTokenizer,
        spelled: SpelledTokens,
        mask_token_id: int,
        stop_token_ids: Collection[int],
    ) -> None:
        """Look the tokens up.

        Args:
            tokenizer: is asked for its special tokens and its chat format.
            spelled: what to do with those that a prompt spells; see PromptConfig.
            mask_token_id: must not come out of a prompt's text.
            stop_token_ids: what ends a completion.
        """
        added = tokenizer.added_tokens_decoder.items()
        special = {number: str(token) for number, token in added if token.special}
        # The mask token need not be marked as special, nor the others.
        names = {
            number: str(tokenizer.convert_ids_to_tokens(number))
            for number in (mask_token_id, *stop_token_ids)
            if number < len(tokenizer)
        }
        self._tokenizer, self._spelled = tokenizer, spelled
        mask = [name for number, name in names.items() if number == mask_token_id]
        keep = spelled == "keep"
        self._in_text = _any_of(mask if keep else names.values())
        self._in_messages = _any_of(mask if keep else {**special, **names}.values())

    def encode(self, prompt: ChatPrompt) -> list[int]:
        """Turn a prompt into ids.

        Args:
            prompt: see :func:`encode_prompt`.

        Returns:
            The token ids.

        Raises:
            UserError: it spells a special token that it may not, or the messages cannot be written
                in the chat format.
        """
        names: list[str] = []
        if isinstance(prompt, str):
            return self.encode_marked(self._mark(prompt, self._in_text, names), names)
        messages, names = self.mark_messages(prompt)
        text = render_chat(self._tokenizer, messages, generation_header=True)
        return self.encode_marked(text, names)

    def mark_messages(
        self, messages: Sequence[Mapping[str, str]]
    ) -> tuple[list[Mapping[str, str]], list[str]]:
        """Put marks in the place of special tokens that are to be text.

        Args:
            messages: chat messages.

        Returns:
            The messages with marks, and what these stand for.

        Raises:
            UserError: a message spells a special token that it may not.
        """
        names: list[str] = []
        marked: list[Mapping[str, str]] = []
        for message in messages:
            content = message.get("content")
            if isinstance(content, str):
                content = self._mark(content, self._in_messages, names)
                message = {**message, "content": content}
            marked.append(message)
        return marked, names

    def encode_marked(self, text: str, names: Sequence[str]) -> list[int]:
        """Return the ids of a text with marks.

        Args:
            text: with marks in place of the special tokens that it spells.
            names: what the marks stand for.

        Returns:
            The token ids; a mark gives those of its name as of any other text.
        """
        if not names:
            return encode(self._tokenizer, text)
        ids: list[int] = []
        for place, part in enumerate(_MARKED.split(text)):
            ids += self._as_text(names[int(part)]) if place % 2 else encode(self._tokenizer, part)
        return ids

    def _mark(self, text: str, pattern: re.Pattern[str] | None, names: list[str]) -> str:
        """Replace what the pattern finds by marks, or refuse it."""
        found = pattern.search(text) if pattern is not None else None
        if pattern is None or found is None:
            return text
        if self._spelled != "text":
            advice = "text takes it as text" + (
                ", keep as the token" if self._spelled == "refuse" else ""
            )
            raise UserError(
                f"spells the special token {found[0]}; take it out of the prompt, or see "
                f"--prompt-special-tokens ({advice})"
            )
        parts: list[str] = []
        end = 0
        for match in pattern.finditer(text):
            parts += [text[end : match.start()], _MARK.format(len(names))]
            names.append(match[0])
            end = match.end()
        return "".join([*parts, text[end:]])

    def _as_text(self, name: str) -> list[int]:
        # In two parts no added token is left to be found, whatever it is marked as.
        return [token for part in (name[:1], name[1:]) for token in encode(self._tokenizer, part)]


def _any_of(names: Collection[str]) -> re.Pattern[str] | None:
    """Make a pattern that finds any of some words, the longest first."""
    longest_first = sorted(set(names), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def decode_completion(
    tokenizer: FastTokenizer, ids: Sequence[int], eos_ids: Collection[int]
) -> str:
    """Return the text of a completion, as rewards see it.

    Args:
        tokenizer: of the model that made them.
        ids: the token ids of the completion.
        eos_ids: ids that end it (``SpecialIds.stop_token_ids``); what follows is not part of it.

    Returns:
        The text before the first end, special tokens left out.
    """
    return _decode(tokenizer, _before_end(ids, eos_ids))


def token_spans(
    tokenizer: FastTokenizer, ids: Sequence[int], eos_ids: Collection[int]
) -> list[tuple[int, int]]:
    """Say which characters of :func:`decode_completion`'s text each token before the end wrote.

    Args:
        tokenizer: of the model that made them.
        ids: the token ids of the completion.
        eos_ids: ids that end it.

    Returns:
        First character and the one after the last, of each token before the first end; spans of
        special tokens are empty, and a character of which several tokens hold bytes is the last
        one's.
    """
    kept = _before_end(ids, eos_ids)
    text = _decode(tokenizer, kept)
    pieces = [_decode(tokenizer, [token]) for token in kept]
    if "".join(pieces) == text:
        ends = list(itertools.accumulate(map(len, pieces)))
    else:
        # What a token writes depends on those before it: bytes of one character, leading spaces.
        ends = [_shared(_decode(tokenizer, kept[: k + 1]), text) for k in range(len(kept))]
        ends = [*itertools.accumulate(ends[:-1], max), len(text)][: len(kept)]
    return list(itertools.pairwise([0, *ends]))


def _before_end(ids: Sequence[int], eos_ids: Collection[int]) -> list[int]:
    return list(itertools.takewhile(lambda token: token not in eos_ids, map(int, ids)))


def _decode(tokenizer: FastTokenizer, ids: Sequence[int]) -> str:
    return str(
        tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    )


def _shared(one: str, other: str) -> int:
    """Characters that two texts begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((k for k, (a, b) in pairs if a != b), min(len(one), len(other)))
