"""ELBO estimators against the exact sum over all masks, for a table of arbitrary cross entropies.

The table holds CE[S][i] for every mask S: the cross entropy of token i may depend on the whole
mask, as it does for a model. Each estimator is driven through every outcome of its draws.
"""

import itertools
import math

import numpy as np
import pytest
import torch

from megatron_espo.diffusion import noise
from megatron_espo.diffusion.estimators import elbo_draws
from megatron_espo.diffusion.noise import bernoulli, elbo_views, exact_count
from megatron_espo.diffusion.token_loss import weighted_token_loss
from megatron_espo.random import stream

KEY = stream(7, "test-elbo")
# Weights are float32: each is right to 6e-8 of itself.
TOLERANCE = 3e-7


def random_table(length: int, seed: int = 0) -> torch.Tensor:
    """float64 ``[2**length, length]``: CE[S][i], S as a number whose bit i is position i."""
    generator = torch.Generator().manual_seed(seed)
    return 5.0 * torch.rand(2**length, length, dtype=torch.float64, generator=generator)


def exact_elbo(table: torch.Tensor) -> float:
    """- sum_l (1/l) E_{|S|=l} sum_{i in S} CE[S][i], subset by subset."""
    length = table.size(1)
    total = 0.0
    for size in range(1, length + 1):
        subsets = list(itertools.combinations(range(length), size))
        inner = sum(float(table[sum(2**i for i in s)][i]) for s in subsets for i in s)
        total -= inner / len(subsets) / size
    return total


def look_up(table: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Summed cross entropy over the masked positions of each view, as the model would give it."""
    number = (masks * 2 ** torch.arange(masks.size(-1))).sum(-1)
    return (table[number] * masks).sum(-1)


def all_orders(length: int) -> torch.Tensor:
    """Uniform numbers that realise each of the length! orders once: ``[length!, length]``."""
    orders = list(itertools.permutations(range(length)))
    return (torch.tensor(orders, dtype=torch.float64) + 0.5) / length


def every_outcome(
    estimator: noise.ElboEstimator,
    length: int,
    total: int,
    num_mc: int,
    monkeypatch: pytest.MonkeyPatch,
) -> list[tuple[int, noise.ElboViews]]:
    """(row, views) for each row of a batch and each lattice offset; one view row per order."""
    span = length + 1 if estimator == "coupled" else length
    orders = all_orders(length)
    monkeypatch.setattr(noise, "uniform", lambda key, ids, count: orders.clone())
    outcomes = []
    for offset in torch.arange(span * num_mc * total).view(-1, 1, 1):
        monkeypatch.setattr(noise, "randint", lambda *arguments, offset=offset: offset)
        for row in range(total):
            places = torch.full((len(orders),), row)
            views = elbo_views(estimator, KEY, places, places, total, length, num_mc)
            outcomes.append((row, views))
    return outcomes


@pytest.mark.parametrize("estimator", ["coupled", "exact_count"])
@pytest.mark.parametrize(
    ("length", "total", "num_mc"),
    [(1, 1, 1), (2, 3, 1), (4, 1, 1), (4, 3, 2), (4, 2, 3), (5, 1, 2)],
)
def test_estimator_is_unbiased_for_every_row_and_draw_of_a_stratified_batch(
    estimator, length: int, total: int, num_mc: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = random_table(length)
    outcomes = every_outcome(estimator, length, total, num_mc, monkeypatch)
    for row in range(total):
        draws = torch.cat(
            [elbo_draws(look_up(table, v.mask_indices), v.weights) for r, v in outcomes if r == row]
        )
        mean = draws.mean(dim=0)
        assert mean.shape == (num_mc,)
        assert mean.tolist() == pytest.approx([exact_elbo(table)] * num_mc, rel=TOLERANCE)


@pytest.mark.parametrize("length", [4, 5])
def test_coupled_weight_needs_length_plus_1_and_both_empty_sides(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = random_table(length)
    outcomes = every_outcome("coupled", length, 1, 1, monkeypatch)
    masks = torch.cat([views.mask_indices for _, views in outcomes])
    weights = torch.cat([views.weights for _, views in outcomes]).double()
    entropy, exact = look_up(table, masks), exact_elbo(table)
    sizes = masks[:, 0, 0].sum(-1)
    assert set(sizes.tolist()) == set(range(length + 1))
    assert elbo_draws(entropy, weights).mean().item() == pytest.approx(exact, rel=TOLERANCE)
    # With L in place of L + 1 the mean is off by the factor L / (L + 1).
    wrong = elbo_draws(entropy, weights * length / (length + 1)).mean().item()
    assert wrong == pytest.approx(exact * length / (length + 1), rel=TOLERANCE)
    assert abs(wrong - exact) > 0.1 * abs(exact)
    # Without k = 0 and k = L the mask of everything is never seen, and neither factor repairs it.
    inner = (sizes > 0) & (sizes < length)
    for factor in (1.0, length / (length + 1), (length - 1) / (length + 1)):
        wrong = elbo_draws(entropy, weights * factor)[inner].mean().item()
        assert abs(wrong - exact) > 0.01 * abs(exact)


def test_a_coupled_draw_is_half_the_sum_over_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    # L = 4, k = 1, S = {2}: -1/2 [5/1 CE_S + 5/3 CE_notS], from the table by hand.
    table = random_table(4)
    order = torch.tensor([[0.9, 0.5, 0.1, 0.7]], dtype=torch.float64)
    monkeypatch.setattr(noise, "uniform", lambda key, ids, count: order.clone())
    monkeypatch.setattr(noise, "randint", lambda *arguments: torch.tensor([[1]]))
    zero = torch.zeros(1, dtype=torch.int64)
    views = elbo_views("coupled", KEY, zero, zero, 1, 4, 1)
    assert views.mask_indices[0, 0].int().tolist() == [[0, 0, 1, 0], [1, 1, 0, 1]]
    side, other = table[0b0100], table[0b1011]
    expected = -(5 / 2 * side[2] + 5 / 6 * (other[0] + other[1] + other[3]))
    result = elbo_draws(look_up(table, views.mask_indices), views.weights)
    assert result.item() == pytest.approx(expected.item(), rel=TOLERANCE)


def quadrature_rows(length: int, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws that realise every mask at Gauss nodes of t, and each outcome's probability.

    The probability-weighted estimate is a polynomial in p, so the quadrature is exact.
    """
    nodes, node_weights = np.polynomial.legendre.leggauss(length + 2)
    rows, probabilities = [], []
    for t, share in zip((nodes + 1) / 2, node_weights / 2, strict=True):
        p = (1 - epsilon) * t + epsilon
        for mask in itertools.product((False, True), repeat=length):
            rows.append([t, *(p / 2 if masked else (1 + p) / 2 for masked in mask)])
            probabilities.append(share * math.prod(p if masked else 1 - p for masked in mask))
    return torch.tensor(rows, dtype=torch.float64), torch.tensor(probabilities).double()


@pytest.mark.parametrize("length", [1, 4, 5])
def test_bernoulli_estimator_is_unbiased(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    table = random_table(length)
    rows, probabilities = quadrature_rows(length, 0.0)
    monkeypatch.setattr(noise, "uniform", lambda key, ids, count: rows.clone())
    ids = torch.arange(len(rows))
    masks, weights, *_ = elbo_views("bernoulli", KEY, ids, ids, len(rows), length, 2)
    assert (masks.flatten(0, 2).unique(dim=0).size(0), masks.size(1)) == (2**length, 2)
    draws = elbo_draws(look_up(table, masks), weights)
    mean = (draws * probabilities[:, None]).sum(0)
    assert probabilities.sum().item() == pytest.approx(1.0, rel=1e-12)
    assert mean.tolist() == pytest.approx([exact_elbo(table)] * 2, rel=TOLERANCE)


@pytest.mark.parametrize("epsilon", [0.0, 1e-3, 0.3])
def test_bernoulli_training_loss_has_the_mean_of_its_process(
    epsilon: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Mean over p ~ U(epsilon, 1) of sum_S P(S | p) CE_S / p, by a fine midpoint rule in the test.
    length, table = 4, random_table(4)
    rows, probabilities = quadrature_rows(length, epsilon)
    monkeypatch.setattr(noise, "uniform", lambda key, ids, count: rows.clone())
    maskable = torch.ones(len(rows), length, dtype=torch.bool)
    mask, weights = bernoulli(KEY, torch.arange(len(rows)), maskable, epsilon)
    mean = (look_up(table, mask) * weights * probabilities).sum().item()
    expected = 0.0
    for step in range(1000):
        p = epsilon + (1 - epsilon) * (step + 0.5) / 1000
        for number in range(2**length):
            members = [i for i in range(length) if number >> i & 1]
            chance = p ** len(members) * (1 - p) ** (length - len(members))
            expected += chance * sum(float(table[number][i]) for i in members) / p / 1000
    assert mean == pytest.approx(expected, rel=2e-6)
    # Only without a smallest probability is it the ELBO.
    assert (abs(mean + exact_elbo(table)) < 1e-5) == (epsilon == 0.0)


def test_exact_count_training_loss_is_the_elbo_per_token_of_the_maskable_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Row layout: a prompt of two tokens, then a completion of four, then one of padding.
    length, table = 4, random_table(4)
    t = (torch.arange(length, dtype=torch.float64) + 0.5) / length
    orders = all_orders(length)
    inner = torch.cat([torch.cat((x.expand(len(orders), 1), orders), 1) for x in t])
    blank = torch.full((len(inner), 1), 0.01, dtype=torch.float64)
    rows = torch.cat((inner[:, :1], blank, blank, inner[:, 1:], blank), dim=1)
    monkeypatch.setattr(noise, "uniform", lambda key, ids, count: rows.clone())
    maskable = torch.tensor([False, False, True, True, True, True, False]).expand(len(rows), 7)
    mask, weights = exact_count(KEY, torch.arange(len(rows)), maskable)
    number = (mask[:, 2:6] * 2 ** torch.arange(4)).sum(-1)
    entropy = torch.zeros(len(rows), 7, dtype=torch.float64)
    entropy[:, 2:6] = table[number] * mask[:, 2:6]
    loss = weighted_token_loss(entropy, weights, maskable.sum(1))
    assert loss.item() == pytest.approx(-exact_elbo(table) / length, rel=TOLERANCE)


def test_weighted_token_loss_divides_each_row_by_its_own_length() -> None:
    entropy = torch.tensor([[1.0, 2.0, 0.0], [0.0, 4.0, 0.0]], requires_grad=True)
    loss = weighted_token_loss(entropy, torch.tensor([3.0, 0.5]), torch.tensor([3, 2]))
    # (3 (1 + 2) / 3 + 0.5 * 4 / 2) / 2
    assert loss.item() == pytest.approx((3.0 + 1.0) / 2)
    loss.backward()
    assert entropy.grad.tolist() == [[0.5, 0.5, 0.5], [0.125, 0.125, 0.125]]


@pytest.mark.parametrize("estimator", ["coupled", "exact_count", "bernoulli"])
@pytest.mark.parametrize("independent", [False, True])
def test_sampled_estimates_average_to_the_exact_sum(estimator, independent: bool) -> None:
    n, length, num_mc = 6000, 4, 2
    table, ids = random_table(length), torch.arange(n)
    views = elbo_views(
        estimator, KEY, ids + 10**10, ids, n, length, num_mc, independent_draws=independent
    )
    means = elbo_draws(look_up(table, views.mask_indices), views.weights).mean(dim=1)
    # Strata make the rows anti-correlated: the error of independent rows is an upper bound.
    error = float(means.std()) / n**0.5
    assert means.mean().item() == pytest.approx(exact_elbo(table), abs=4 * error)
    assert error < 0.03 * abs(exact_elbo(table))


def test_elbo_draws_pass_the_weighted_gradient_to_each_view() -> None:
    entropy = torch.tensor([[[1.0, 2.0], [0.0, 4.0]]], requires_grad=True)
    weights = torch.tensor([[[2.5, 0.5], [0.0, 3.0]]])
    draws = elbo_draws(entropy, weights)
    assert draws.tolist() == [[-3.5, -12.0]]
    (gradient,) = torch.autograd.grad(draws @ torch.tensor([1.0, 10.0]), entropy)
    assert gradient.tolist() == [[[-2.5, -0.5], [0.0, -30.0]]]
