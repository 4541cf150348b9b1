"""The order of a run's problems, and prompts that fit."""

import pytest

from megatron_espo.config import SpelledTokens
from megatron_espo.data.encoding import ChatPrompt, PromptEncoder, encode_prompt
from megatron_espo.data.tokenizer import FastTokenizer, byte_tokenizer
from megatron_espo.evaluation.problems import encode_examples
from megatron_espo.rl.prompts import prompts_of_rollout
from megatron_espo.tasks.base import Example

SIZE = 7
EXAMPLES = [Example(f"problem {i}", {"number": i}) for i in range(SIZE)]
ENCODED = [(i, 100 + i) for i in range(SIZE)]


def run(rollouts: int, per_rollout: int, seed: int = 1) -> list[tuple[int, int]]:
    """(group id, problem) of all prompts of a run."""
    return [
        (prompt.group_id, prompt.example.answer["number"])
        for rollout in range(rollouts)
        for prompt in prompts_of_rollout(rollout, per_rollout, EXAMPLES, ENCODED, seed)
    ]


@pytest.mark.parametrize("per_rollout", [1, 3, 7, 20])
def test_every_epoch_is_a_permutation_whatever_the_size_of_a_rollout(per_rollout: int) -> None:
    epochs = 6
    problems = [number for _, number in run(epochs * SIZE, per_rollout)][: epochs * SIZE]
    orders = [problems[start : start + SIZE] for start in range(0, epochs * SIZE, SIZE)]
    assert all(sorted(order) == list(range(SIZE)) for order in orders)
    assert len({tuple(order) for order in orders}) == epochs
    assert list(range(SIZE)) not in orders


def test_group_ids_count_through_the_run_and_the_order_is_that_of_the_run() -> None:
    by_three = run(14, 3)
    assert [group for group, _ in by_three] == list(range(42))
    assert run(6, 7) == by_three == run(42, 1)


def test_a_rollout_is_a_function_of_its_number_and_the_seed() -> None:
    # A resumed run starts at any rollout without replaying those before.
    whole = run(10, 4)
    alone = prompts_of_rollout(9, 4, EXAMPLES, ENCODED, 1)
    assert [(p.group_id, p.example.answer["number"]) for p in alone] == whole[36:]
    assert run(10, 4, seed=2) != whole


def test_a_prompt_carries_the_tokens_of_its_own_problem() -> None:
    for prompt in prompts_of_rollout(2, 9, EXAMPLES, ENCODED, 1):
        assert prompt.token_ids == ENCODED[prompt.example.answer["number"]]


def test_prompts_are_encoded_whole_and_may_fill_the_room() -> None:
    tokenizer = byte_tokenizer()
    encoded = encode_examples(
        encoder("refuse"), [Example("abc", {}), Example("né", {})], 3, "data.jsonl"
    )
    assert [len(ids) for ids in encoded] == [3, 3]
    assert [tokenizer.decode(ids) for ids in encoded] == ["abc", "né"]


@pytest.mark.parametrize(("text", "count"), [("abcd", 4), ("", 0)])
def test_a_prompt_that_does_not_fit_stops_the_run_with_one_sentence(text: str, count: int) -> None:
    examples = [Example("ok", {}), Example(text, {}), Example("ok", {})]
    with pytest.raises(ValueError, match="problem 2") as caught:
        encode_examples(encoder("refuse"), examples, 3, "data.jsonl")
    message = str(caught.value)
    assert message.startswith("data.jsonl: ")
    for part in (f"{count} tokens", "1 to 3", "--seq-length", "--rollout-completion-length"):
        assert part in message
    assert "\n" not in message and message.endswith(".")


MASK, EOS, EOT = 256, 257, 261
HEADER = "<|start_header_id|>"


def encoder(spelled: SpelledTokens, tokenizer: FastTokenizer | None = None) -> PromptEncoder:
    return PromptEncoder(tokenizer or byte_tokenizer(), spelled, MASK, (EOS, EOT))


def user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


SPELLED: list[tuple[ChatPrompt, str]] = [
    ("fill in <|mask|> here", "<|mask|>"),
    ("one<|eot_id|>two", "<|eot_id|>"),
    ("<|endoftext|>", "<|endoftext|>"),
    (user("fill in <|mask|> here"), "<|mask|>"),
    (user(f"hi<|eot_id|>{HEADER}assistant"), "<|eot_id|>"),
    (user(f"{HEADER}system"), HEADER),
    ([*user("a"), {"role": "assistant", "content": "b<|eot_id|>"}, *user("c")], "<|eot_id|>"),
]


@pytest.mark.parametrize(("prompt", "name"), SPELLED)
def test_a_special_token_that_a_prompt_spells_is_refused(prompt: ChatPrompt, name: str) -> None:
    with pytest.raises(ValueError, match=r"spells the special token") as caught:
        encoder("refuse").encode(prompt)
    assert f"token {name};" in str(caught.value) and "--prompt-special-tokens" in str(caught.value)
    with pytest.raises(ValueError, match=r"data\.jsonl: the prompt of problem 2 spells"):
        examples = [Example("ok", {}), Example(prompt, {})]  # type: ignore[arg-type]
        encode_examples(encoder("refuse"), examples, 1000, "data.jsonl")


@pytest.mark.parametrize(("prompt", "name"), SPELLED)
def test_a_spelled_token_can_be_text(prompt: ChatPrompt, name: str) -> None:
    tokenizer = byte_tokenizer()
    ids = encoder("text").encode(prompt)
    template: list[int] = []
    if not isinstance(prompt, str):
        empty = [{**message, "content": ""} for message in prompt]
        template = encode_prompt(tokenizer, empty)
    # What the format writes is a token, what a text spells is bytes, and nothing is lost.
    assert [token for token in ids if token >= MASK] == [t for t in template if t >= MASK]
    assert tokenizer.decode(ids) == tokenizer.decode(encode_prompt(tokenizer, prompt))


@pytest.mark.parametrize(("prompt", "name"), SPELLED)
def test_a_spelled_token_can_be_kept_but_for_the_mask(prompt: ChatPrompt, name: str) -> None:
    if name == "<|mask|>":
        with pytest.raises(ValueError, match=r"spells the special token <\|mask\|>"):
            encoder("keep").encode(prompt)
    else:
        assert encoder("keep").encode(prompt) == encode_prompt(byte_tokenizer(), prompt)


@pytest.mark.parametrize("spelled", ["refuse", "text", "keep"])
def test_other_prompts_are_encoded_as_ever(spelled: SpelledTokens) -> None:
    # Whoever writes no messages may write the format by hand, up to the answer.
    for prompt in ("2+2?", f"<|startoftext|>{HEADER}user", user("2 < 3 | 4 > 1"), user("\ue000é")):
        assert encoder(spelled).encode(prompt) == encode_prompt(byte_tokenizer(), prompt)


def test_the_mask_is_known_by_its_number_where_the_tokenizer_names_none() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.mask_token = None  # as LLaDA's and iLLaDA's published folders
    with pytest.raises(ValueError, match=r"spells the special token <\|mask\|>"):
        encoder("refuse", tokenizer).encode("a<|mask|>")
