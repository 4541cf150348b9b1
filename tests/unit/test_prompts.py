"""The order of a run's problems, and prompts that fit."""

import pytest

from megatron_espo.data.tokenizer import byte_tokenizer
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
    encoded = encode_examples(tokenizer, [Example("abc", {}), Example("né", {})], 3, "data.jsonl")
    assert [len(ids) for ids in encoded] == [3, 3]
    assert [tokenizer.decode(ids) for ids in encoded] == ["abc", "né"]


@pytest.mark.parametrize(("text", "count"), [("abcd", 4), ("", 0)])
def test_a_prompt_that_does_not_fit_stops_the_run_with_one_sentence(text: str, count: int) -> None:
    examples = [Example("ok", {}), Example(text, {}), Example("ok", {})]
    with pytest.raises(ValueError, match="problem 2") as caught:
        encode_examples(byte_tokenizer(), examples, 3, "data.jsonl")
    message = str(caught.value)
    assert message.startswith("data.jsonl: ")
    for part in (f"{count} tokens", "1 to 3", "--seq-length", "--rollout-completion-length"):
        assert part in message
    assert "\n" not in message and message.endswith(".")
