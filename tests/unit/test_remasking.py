"""How many masked positions a step commits, and which."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_espo.generation.remasking import (
    REMASKING_ORDERS,
    commit_counts,
    dream_commit_counts,
    dream_commit_shares,
    rank_by,
    select_confident,
    select_highest,
)
from megatron_espo.parallel.vocab import TokenDraw


@pytest.mark.parametrize(
    ("num_masked", "steps", "counts"),
    [
        (32, 4, [8, 8, 8, 8]),
        (10, 4, [3, 3, 2, 2]),
        (7, 7, [1] * 7),
        (5, 1, [5]),
        (2, 4, [1, 1, 0, 0]),
        (0, 3, [0, 0, 0]),
    ],
)
def test_llada_gives_the_remainder_to_the_early_steps(num_masked, steps, counts) -> None:
    assert commit_counts(num_masked, steps) == counts


def test_llada_schedule_commits_everything_evenly() -> None:
    for num_masked in range(40):
        for steps in range(1, 40):
            counts = commit_counts(num_masked, steps)
            assert (len(counts), sum(counts)) == (steps, num_masked)
            assert counts == sorted(counts, reverse=True)
            assert max(counts) - min(counts) <= 1


def dream_reference(num_masked: int, steps: int, epsilon: float) -> list[int]:
    """Dream's loop in float32 scalars: int(masked * (1 - s/t)), and the rest at the last step."""
    times = torch.linspace(1, epsilon, steps + 1).numpy()
    left, counts = num_masked, []
    for i in range(steps):
        t, s = times[i], times[i + 1]
        share = np.float32(1) - s / t
        assert share.dtype == np.float32
        counts.append(int(np.float32(left) * share) if i < steps - 1 else left)
        left -= counts[-1]
    return counts


@pytest.mark.parametrize("epsilon", [1e-3, 0.1])
def test_dream_schedule_follows_its_rule_in_float32(epsilon: float) -> None:
    # 1000 tokens in 3 steps, or 10 in 3 with epsilon 0.1, come out differently in float64.
    for num_masked in (0, 1, 2, 7, 10, 32, 64, 255, 256, 1000):
        for steps in (1, 2, 3, 5, 8, 16, 31, 32, 64, 100, 256):
            counts = dream_commit_counts(num_masked, steps, epsilon)
            assert counts == dream_reference(num_masked, steps, epsilon)
            assert (len(counts), sum(counts)) == (steps, num_masked)
            assert all(isinstance(count, int) and count >= 0 for count in counts)


def test_dream_schedule_by_hand() -> None:
    # t = 1, 0.75025, 0.5005, 0.25075, 0.001: shares 0.24975, 0.33289, 0.49900, 1 of 8, 7, 5, 3.
    assert dream_commit_counts(8, 4) == [1, 2, 2, 3]
    shares = [0.24975, 0.332889, 0.499001, 1.0]
    assert dream_commit_shares(4).tolist() == pytest.approx(shares, rel=1e-5)
    assert dream_commit_shares(1).tolist() == [1.0]
    # A step may commit nothing, and the last takes what is left.
    assert dream_commit_counts(3, 8) == dream_reference(3, 8, 1e-3)
    assert dream_commit_counts(3, 8)[0] == 0


def test_highest_scores_are_marked_and_ties_go_to_the_earlier_position() -> None:
    scores = torch.tensor(
        [[0.5, 0.9, 0.5, 0.9, 0.5], [-1.0, -1.0, -1.0, -1.0, -1.0], [1.0, 2.0, 3.0, 4.0, 5.0]]
    )
    assert select_highest(scores, 3).int().tolist() == [
        [1, 1, 0, 1, 0],
        [1, 1, 1, 0, 0],
        [0, 0, 1, 1, 1],
    ]
    hidden = torch.tensor([[float("-inf"), 0.0, float("-inf")]])
    assert select_highest(hidden, 2).tolist() == [[True, True, False]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exactly_count_positions_are_marked_and_none_is_better_than_a_marked_one(dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 6, (50, 33), generator=generator).to(dtype)  # many ties
    for count in (0, 1, 7, 32, 33):
        marked = select_highest(scores, count)
        assert marked.dtype == torch.bool
        for row, chosen in zip(scores.tolist(), marked.tolist(), strict=True):
            order = sorted(range(33), key=lambda i: (-row[i], i))
            assert {i for i in range(33) if chosen[i]} == set(order[:count])


def test_each_order_ranks_by_its_own_quantity() -> None:
    fields = {name: torch.full((2,), float(i)) for i, name in enumerate(TokenDraw._fields)}
    draw = TokenDraw(**fields)
    ranked = {
        "low_confidence": "log_confidence",
        "maskgit_plus": "log_tempered",
        "topk_margin": "margin",
        "entropy": "negative_entropy",
    }
    for order, field in ranked.items():
        assert rank_by(order, draw) is fields[field]
    assert set(REMASKING_ORDERS) == {*ranked, "random", "origin"}
    # Orders that do not look at the model's output have no score.
    for order in ("random", "origin"):
        with pytest.raises(AssertionError):
            rank_by(order, draw)


def row_of(confidences: list[float | None]) -> Tensor:
    """Log-probabilities of one row; None is no candidate."""
    logs = [-math.inf if c is None else math.log(c) for c in confidences]
    return torch.tensor([logs], dtype=torch.float64)


# Multiples of 1/64: ties are common, and the comparison with a threshold is exact.
CONFIDENCES = st.lists(st.none() | st.integers(1, 64).map(lambda n: n / 64), min_size=1, max_size=9)


def confident(scores: Tensor, threshold: float | None, factor: float | None = None) -> Tensor:
    return select_confident(scores, scores.double().exp(), threshold, factor)


@settings(max_examples=150, deadline=None)
@given(confidences=CONFIDENCES, threshold=st.integers(1, 70).map(lambda n: (n - 0.5) / 64))
def test_threshold_commits_the_best_and_what_reaches_it(confidences, threshold: float) -> None:
    chosen = confident(row_of(confidences), threshold)[0].tolist()
    candidates = [i for i, c in enumerate(confidences) if c is not None]
    best = max(candidates, key=lambda i: (confidences[i], -i), default=None)
    for i, c in enumerate(confidences):
        assert chosen[i] == (c is not None and (i == best or c >= threshold))
    assert any(chosen) == bool(candidates)


@settings(max_examples=150, deadline=None)
@given(confidences=CONFIDENCES, factor=st.integers(1, 400).map(lambda n: (n - 0.5) / 64))
def test_factor_commits_the_largest_number_that_its_rule_allows(confidences, factor) -> None:
    chosen = confident(row_of(confidences), None, factor)[0].tolist()
    order = sorted(
        (i for i, c in enumerate(confidences) if c is not None), key=lambda i: -confidences[i]
    )
    fits = [n for n, i in enumerate(order, 1) if (n + 1) * (1 - confidences[i]) < factor]
    count = max(fits, default=1)
    assert {i for i, kept in enumerate(chosen) if kept} == set(order[:count])


def test_threshold_itself_is_confident_enough_and_rows_are_independent() -> None:
    rows = torch.cat([row_of([0.5, 0.25, 0.5]), row_of([0.125, None, 0.25])])
    chosen = confident(rows, 0.5)
    assert chosen.tolist() == [[True, False, True], [False, False, True]]


def test_rows_may_have_counts_of_their_own() -> None:
    scores = torch.tensor([[0.1, 0.3, 0.2], [0.3, 0.1, 0.2], [0.1, 0.1, 0.1]])
    chosen = select_highest(scores, torch.tensor([1, 0, 2]))
    assert chosen.tolist() == [[False, True, False], [False] * 3, [True, True, False]]
