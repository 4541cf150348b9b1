"""Forward processes: what is masked, how often, and that noise is a function of ids alone."""

import itertools
import math

import pytest
import torch

from megatron_espo.diffusion import noise
from megatron_espo.diffusion.noise import (
    bernoulli,
    elbo_views,
    exact_count,
    random_lengths,
    random_subset,
    stratified_counts,
)
from megatron_espo.random import Stream, stream

KEY = stream(7, "test-noise")
ESTIMATORS = ("coupled", "exact_count", "bernoulli")


def chi_square(counts: torch.Tensor, expected: float) -> tuple[float, float]:
    """The statistic, and what a true uniform exceeds once in 30,000 seeds (Wilson-Hilferty)."""
    df = counts.numel() - 1
    limit = df * (1 - 2 / (9 * df) + 4 * (2 / (9 * df)) ** 0.5) ** 3
    return float(((counts - expected) ** 2 / expected).sum()), limit


def patchwork(rows: int, positions: int) -> torch.Tensor:
    """Maskable positions in a different pattern per row, at least one in each."""
    generator = torch.Generator().manual_seed(0)
    maskable = torch.rand(rows, positions, generator=generator) < 0.6
    maskable[:, positions // 2] = True
    return maskable


def masks_as_numbers(mask: torch.Tensor) -> torch.Tensor:
    return (mask * 2 ** torch.arange(mask.size(-1))).sum(-1)


def test_subset_has_the_size_asked_for_and_stays_within_the_maskable_positions() -> None:
    maskable = patchwork(200, 11)
    sizes = torch.arange(200) % (maskable.sum(1) + 1)
    subset = random_subset(KEY, torch.arange(200), maskable, sizes)
    assert torch.equal(subset.sum(1), sizes)
    assert not (subset & ~maskable).any()
    # The cases at both ends occur: nothing masked, and all that may be.
    assert (sizes == 0).any() and (sizes == maskable.sum(1)).any()


def test_every_subset_of_a_size_is_equally_likely() -> None:
    maskable = torch.tensor([True, False, True, True, True, False, True]).expand(4000, 7)
    subset = random_subset(KEY, torch.arange(4000), maskable, torch.full((4000,), 2))
    counts = masks_as_numbers(subset).unique(return_counts=True)[1]
    assert counts.numel() == math.comb(5, 2)
    statistic, limit = chi_square(counts, 400)
    assert statistic < limit


def test_bernoulli_masks_below_p_and_weights_by_its_inverse(monkeypatch) -> None:
    # Rows with t = 0.25 and 0.75; p = 0.9 t + 0.1 = 0.325 and 0.775.
    tokens = torch.tensor([0.0, 0.3249, 0.3251, 0.7749, 0.7751, 0.1])
    draws = torch.cat((torch.tensor([[0.25], [0.75]]), tokens.expand(2, 6)), dim=1).double()
    monkeypatch.setattr(noise, "uniform", lambda key, ids, count: draws)
    maskable = torch.tensor([True] * 5 + [False]).expand(2, 6)
    result = bernoulli(KEY, torch.arange(2), maskable, epsilon=0.1)
    assert result.mask_indices.tolist() == [
        [True, True, False, False, False, False],
        [True, True, True, True, False, False],
    ]
    assert result.weights.dtype == torch.float32
    assert result.weights.tolist() == pytest.approx([1 / 0.325, 1 / 0.775], rel=1e-7)


def test_bernoulli_masks_the_share_of_its_process_and_only_maskable_positions() -> None:
    maskable = patchwork(4000, 9)
    mask, weights = bernoulli(KEY, torch.arange(4000), maskable, epsilon=1e-3)
    assert not (mask & ~maskable).any()
    assert (weights >= 1.0).all() and (weights <= 1.0 / 1e-3).all()
    # E p = (1 - eps) / 2 + eps; the share of a row has a standard deviation below 1/2.
    shares = mask.sum(1) / maskable.sum(1)
    assert shares.mean().item() == pytest.approx(0.5005, abs=4 * 0.5 / 4000**0.5)
    # The weighted share has mean 1 exactly.
    weighted = shares * weights
    error = weighted.std() / 4000**0.5
    assert weighted.mean().item() == pytest.approx(1.0, abs=4 * float(error))


def test_exact_count_masks_l_of_the_maskable_positions_with_weight_length_over_l() -> None:
    maskable = patchwork(500, 9)
    mask, weights = exact_count(KEY, torch.arange(500), maskable)
    lengths, counts = maskable.sum(1), mask.sum(1)
    assert not (mask & ~maskable).any()
    assert (counts >= 1).all()
    assert torch.equal(weights, (lengths.double() / counts.double()).float())


def test_exact_count_is_uniform_on_1_to_length(monkeypatch) -> None:
    # t on a fine grid: each count owns an equal share of it, whatever the order drawn.
    length, per_count = 6, 8
    t = (torch.arange(length * per_count) + 0.5) / (length * per_count)
    order = torch.rand(len(t), 9, generator=torch.Generator().manual_seed(1))
    draws = torch.cat((t[:, None], order), dim=1).double()
    monkeypatch.setattr(noise, "uniform", lambda key, ids, count: draws)
    maskable = torch.tensor([False, False] + [True] * length + [False]).expand(len(t), 9)
    mask, _ = exact_count(KEY, torch.arange(len(t)), maskable)
    assert mask.sum(1).bincount().tolist() == [0] + [per_count] * length


@pytest.mark.parametrize(
    ("total", "num_mc", "low", "high"),
    [
        (1, 1, 0, 5),
        (1, 2, 0, 4),
        (3, 2, 0, 4),
        (3, 2, 1, 4),
        (2, 3, 1, 7),
        (5, 4, 0, 1),
        (4, 2, 0, 7),
    ],
)
def test_stratified_counts_are_exactly_uniform_and_spread(
    total: int, num_mc: int, low: int, high: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    span = high - low + 1
    size = span * num_mc * total
    pending: list[int] = []

    def given_offset(key, sample_ids, count, smallest, largest) -> torch.Tensor:
        assert (sample_ids.numel(), count, smallest, largest) == (1, 1, 0, size - 1)
        return torch.tensor([[pending.pop()]])

    monkeypatch.setattr(noise, "randint", given_offset)
    seen = torch.zeros(total, num_mc, high + 1, dtype=torch.int64)
    for offset in range(size):
        pending.append(offset)
        counts = stratified_counts(KEY, torch.arange(total), total, num_mc, low, high)
        assert counts.shape == (total, num_mc)
        seen.scatter_add_(2, counts[:, :, None], torch.ones_like(counts)[:, :, None])
        # The batch as a whole holds every count equally often, as far as that divides.
        frequencies = counts.flatten().bincount(minlength=high + 1)[low:]
        share = total * num_mc / span
        assert math.floor(share) <= frequencies.min() <= frequencies.max() <= math.ceil(share)
        # And so does every run of neighbouring counts within the draws of one row.
        for row, start, width in itertools.product(counts - low, range(span), range(1, span)):
            inside = int(((row - start) % span < width).sum())
            share = num_mc * width / span
            assert math.floor(share) <= inside <= math.ceil(share)
    # Over the offsets, each (row, draw) sees every count equally often.
    assert (seen[:, :, :low] == 0).all()
    assert (seen[:, :, low:] == num_mc * total).all()


def test_stratified_counts_of_a_row_do_not_depend_on_the_rows_beside_it() -> None:
    whole = stratified_counts(KEY, torch.arange(6), 6, 3, 0, 8)
    apart = [stratified_counts(KEY, torch.tensor([i]), 6, 3, 0, 8) for i in (4, 0, 5)]
    assert torch.equal(torch.cat(apart), whole[[4, 0, 5]])


@pytest.mark.parametrize("independent", [False, True])
def test_coupled_views_are_complements_that_mask_each_position_once(independent: bool) -> None:
    total, num_mc, length = 8, 3, 5
    ids = torch.arange(total)
    masks, weights, *_ = elbo_views(
        "coupled", KEY, ids, ids, total, length, num_mc, independent_draws=independent
    )
    assert masks.shape == (total, num_mc, 2, length)
    assert torch.equal(masks[:, :, 0], ~masks[:, :, 1])
    assert (masks.sum(dim=(2, 3)) == length).all()
    counts = masks.sum(-1).flatten().tolist()
    expected = [(length + 1) / (2 * count) if count else 0.0 for count in counts]
    assert weights.flatten().tolist() == pytest.approx(expected, rel=2e-7, abs=0.0)
    assert {0, length} <= set(counts)


def test_exact_count_views_mask_at_least_one_position_with_weight_length_over_l() -> None:
    masks, weights, *_ = elbo_views("exact_count", KEY, torch.arange(8), torch.arange(8), 8, 5, 2)
    assert masks.shape == (8, 2, 1, 5)
    assert set(masks.sum(-1).flatten().tolist()) == {1, 2, 3, 4, 5}
    expected = [5 / count for count in masks.sum(-1).flatten().tolist()]
    assert weights.flatten().tolist() == pytest.approx(expected, rel=2e-7)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("independent", [False, True])
def test_views_of_a_row_do_not_depend_on_batching(estimator, independent: bool) -> None:
    sample_ids = torch.tensor([40, 7, 2**35, 11, 3, 8])
    indices = torch.tensor([4, 1, 5, 0, 2, 3])

    def views(rows: list[int]) -> noise.ElboViews:
        places = sample_ids[rows], indices[rows]
        return elbo_views(estimator, KEY, *places, 6, 12, 2, independent_draws=independent)

    whole = views([0, 1, 2, 3, 4, 5])
    for rows in ([3], [5, 0], [2, 1, 4]):
        part = views(rows)
        assert torch.equal(part.mask_indices, whole.mask_indices[rows])
        assert torch.equal(part.weights, whole.weights[rows])


def test_training_noise_of_a_row_does_not_depend_on_batching_or_padding() -> None:
    sample_ids, maskable = torch.tensor([9, 2**33, 0, 4]), patchwork(4, 10)
    wider = torch.cat((maskable, torch.zeros(4, 3, dtype=torch.bool)), dim=1)
    for process in (exact_count, lambda *arguments: bernoulli(*arguments, 1e-3)):
        whole = process(KEY, sample_ids, maskable)
        padded = process(KEY, sample_ids, wider)
        assert torch.equal(padded.mask_indices[:, :10], whole.mask_indices)
        assert torch.equal(padded.weights, whole.weights)
        for row in range(4):
            alone = process(KEY, sample_ids[row : row + 1], maskable[row : row + 1])
            assert torch.equal(alone.mask_indices[0], whole.mask_indices[row])
            assert torch.equal(alone.weights[0], whole.weights[row])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_rows_draws_and_streams_mask_differently(estimator) -> None:
    ids = torch.arange(3)
    first = elbo_views(estimator, KEY, ids, ids, 3, 64, 2).mask_indices
    second = elbo_views(estimator, stream(8, "test-noise"), ids, ids, 3, 64, 2).mask_indices
    masks = torch.cat((first, second)).flatten(0, 2)
    # An empty or full view may repeat; what is masked in part never does.
    partial = masks[(masks.sum(1) > 3) & (masks.sum(1) < 61)]
    assert partial.size(0) >= 6
    assert partial.unique(dim=0).size(0) == partial.size(0)


def test_independent_draws_have_independent_counts(monkeypatch) -> None:
    length, total = 3, 2
    size = (length + 1) * total
    keys: list[Stream] = []
    pending: list[int] = []

    def given_offsets(key, sample_ids, count, low, high) -> torch.Tensor:
        assert high == size - 1
        keys.append(key)
        return torch.tensor([[pending.pop()]])

    monkeypatch.setattr(noise, "randint", given_offsets)
    joint = torch.zeros(length + 1, length + 1, dtype=torch.int64)
    for offsets in itertools.product(range(size), repeat=2):
        keys.clear()
        pending.extend(offsets)
        ids = torch.tensor([5]), torch.tensor([1])
        masks, *_ = elbo_views("coupled", KEY, *ids, total, length, 2, independent_draws=True)
        assert len(set(keys)) == 2  # each draw has an offset of its own
        first, second = masks[0, :, 0].sum(-1).tolist()
        joint[first, second] += 1
    assert (joint == total**2).all()


def test_draws_of_a_row_spread_their_counts_unless_independent() -> None:
    ids = torch.arange(200)
    spread = elbo_views("coupled", KEY, ids, ids, 200, 9, 2).mask_indices[:, :, 0].sum(-1)
    # Ten counts, two draws: always half the range apart.
    assert ((spread[:, 0] - spread[:, 1]).abs() == 5).all()
    free = elbo_views("coupled", KEY, ids, ids, 200, 9, 2, independent_draws=True)
    counts = free.mask_indices[:, :, 0].sum(-1)
    assert (counts[:, 0] - counts[:, 1]).unique().numel() > 1


def test_random_lengths_shorten_the_share_asked_for_to_a_uniform_length() -> None:
    ids, lengths = torch.arange(6000), torch.full((6000,), 6)
    assert torch.equal(random_lengths(KEY, ids, lengths, 0.0), lengths)
    every = random_lengths(KEY, ids, lengths, 1.0)
    statistic, limit = chi_square(every.bincount(minlength=7)[1:], 1000)
    assert statistic < limit
    # Of a million lengths hardly any is the full one: what is shorter was shortened.
    some = random_lengths(KEY, ids, torch.full((6000,), 10**6), 0.1)
    share = (some < 10**6).double().mean().item()
    assert share == pytest.approx(0.1, abs=4 * (0.09 / 6000) ** 0.5)
    # Whether a row is shortened says nothing about how short it becomes.
    tenths = (some[some < 10**6] - 1) // 10**5
    statistic, limit = chi_square(tenths.bincount(minlength=10), tenths.numel() / 10)
    assert statistic < limit


def test_random_lengths_belong_to_their_rows() -> None:
    ids, lengths = torch.tensor([3, 1, 2**40]), torch.tensor([1, 50, 7])
    whole = random_lengths(KEY, ids, lengths, 1.0)
    assert (whole >= 1).all() and (whole <= lengths).all()
    for row in range(3):
        assert random_lengths(KEY, ids[row : row + 1], lengths[row : row + 1], 1.0)[0] == whole[row]
