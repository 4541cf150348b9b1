"""Leave-one-out advantages against loops over the group."""

import math

import pytest
import torch

from megatron_espo.objectives.advantages import BUILT_IN, leave_one_out, std

PAIRS = torch.tensor([[1.0, 0.0], [0.25, 0.75]], dtype=torch.float64)
SIXES = torch.tensor(
    [[1.0, 0.0, 0.0, 0.1, 0.0, 1.0], [0.3] * 6, [-2.0, 5.5, 1e3, 0.0, 7.0, 1.0]],
    dtype=torch.float64,
)


@pytest.mark.parametrize("rewards", [PAIRS, SIXES], ids=["G=2", "G=6"])
def test_advantage_is_the_reward_less_the_mean_of_the_others(rewards: torch.Tensor) -> None:
    result = leave_one_out(rewards)
    assert result.dtype == torch.float64
    for group, row in zip(rewards.tolist(), result.tolist(), strict=True):
        for i, reward in enumerate(group):
            others = group[:i] + group[i + 1 :]
            assert row[i] == pytest.approx(reward - sum(others) / len(others), abs=1e-12)


@pytest.mark.parametrize("name", BUILT_IN)
def test_advantages_of_a_group_sum_to_zero_and_ignore_a_common_shift(name: str) -> None:
    result = BUILT_IN[name](SIXES)
    assert result.sum(dim=1).abs().max() < 1e-9
    shifted = BUILT_IN[name](SIXES + 100.0)
    assert torch.allclose(shifted, result, rtol=0, atol=1e-6)


def test_equal_rewards_give_no_advantage_with_or_without_normalisation() -> None:
    for function in BUILT_IN.values():
        result = function(torch.full((1, 6), 0.1, dtype=torch.float64))
        assert result.abs().max() < 1e-9


def test_groups_do_not_see_each_other() -> None:
    whole = std(SIXES)
    for row in range(3):
        alone = std(SIXES[row : row + 1])
        assert torch.equal(alone[0], whole[row])


def test_std_norm_divides_by_the_sample_standard_deviation_of_the_rewards() -> None:
    plain, normalised = leave_one_out(SIXES), std(SIXES, epsilon=1e-3)
    for group, row, scaled in zip(SIXES.tolist(), plain.tolist(), normalised, strict=True):
        mean = sum(group) / 6
        deviation = math.sqrt(sum((r - mean) ** 2 for r in group) / 5)
        expected = [advantage / (deviation + 1e-3) for advantage in row]
        assert scaled.tolist() == pytest.approx(expected, abs=1e-9)
    # Off unless asked for: the size of the rewards carries over.
    assert leave_one_out(10 * PAIRS).tolist() == (10 * leave_one_out(PAIRS)).tolist()
