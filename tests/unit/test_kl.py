"""KL estimators: values, gradients, and their means over exactly enumerated noise."""

import itertools
import math

import pytest
import torch

from megatron_espo.objectives.kl import sequence_kl

ESTIMATORS = ("k1", "k2", "k3", "k2_unbiased")
GRID = (-3.0, -0.7, -1e-3, -1e-6, 0.0, 1e-6, 1e-3, 0.4, 2.0)


def column(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def value_and_gradient(elbo, elbo_ref, estimator) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = elbo.clone().requires_grad_()
    value = sequence_kl(leaf, elbo_ref, estimator)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient


@pytest.mark.parametrize(
    ("estimator", "value", "derivative"),
    [
        ("k1", lambda d: d, lambda d: d),
        ("k2", lambda d: d * d / 2, lambda d: d),
        ("k3", lambda d: math.exp(-d) - 1 + d, lambda d: 1 - math.exp(-d)),
    ],
)
@pytest.mark.parametrize("num_mc", [1, 3])
def test_estimator_is_its_formula_of_the_mean_difference(
    estimator, value, derivative, num_mc: int
) -> None:
    # Draws scattered around a mean that a loop computes.
    scatter = torch.tensor([0.5, -1.25, 0.3][:num_mc], dtype=torch.float64)
    elbo = column([d - 40.0 for d in GRID]) + scatter
    elbo_ref = torch.full_like(elbo, -40.0)
    result, gradient = value_and_gradient(elbo, elbo_ref, estimator)
    for row in range(len(GRID)):
        d = sum(elbo[row, m].item() + 40.0 for m in range(num_mc)) / num_mc
        assert result[row].item() == pytest.approx(value(d), rel=1e-9, abs=1e-13)
        assert gradient[row].tolist() == pytest.approx(
            [derivative(d) / num_mc] * num_mc, rel=1e-9, abs=1e-13
        )


def test_unbiased_k2_is_the_mean_over_pairs_of_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    for num_mc in (2, 3, 5):
        elbo = torch.randn(4, num_mc, dtype=torch.float64, generator=generator)
        elbo_ref = torch.randn(4, num_mc, dtype=torch.float64, generator=generator)
        result, gradient = value_and_gradient(elbo, elbo_ref, "k2_unbiased")
        pairs = list(itertools.permutations(range(num_mc), 2))
        for row in range(4):
            d = [(elbo[row, m] - elbo_ref[row, m]).item() for m in range(num_mc)]
            expected = sum(d[i] * d[j] / 2 for i, j in pairs) / len(pairs)
            assert result[row].item() == pytest.approx(expected, rel=1e-12)
            slopes = [
                sum(d[j] for j in range(num_mc) if j != m) / (num_mc * (num_mc - 1))
                for m in range(num_mc)
            ]
            assert gradient[row].tolist() == pytest.approx(slopes, rel=1e-12)


@pytest.mark.parametrize("num_mc", [2, 3])
def test_noise_biases_k2_by_half_its_variance_and_the_unbiased_one_not_at_all(num_mc: int) -> None:
    # Independent draws d +- sigma with equal chance: every outcome, each as one row.
    d, sigma = 0.3, 2.0
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=num_mc)), dtype=torch.float64)
    elbo, elbo_ref = d + sigma * signs - 7.0, torch.full_like(signs, -7.0)
    biased, slopes = value_and_gradient(elbo, elbo_ref, "k2")
    unbiased, unbiased_slopes = value_and_gradient(elbo, elbo_ref, "k2_unbiased")
    assert biased.mean().item() == pytest.approx(d * d / 2 + sigma**2 / num_mc / 2, rel=1e-12)
    assert unbiased.mean().item() == pytest.approx(d * d / 2, rel=1e-12)
    # The price: a single estimate may be negative.
    assert unbiased.min() < 0 <= biased.min()
    # Noise that does not depend on the policy leaves both mean gradients at d.
    for slope in (slopes, unbiased_slopes):
        assert slope.sum(dim=1).mean().item() == pytest.approx(d, rel=1e-12)


def test_unbiased_k2_of_equal_draws_is_k2() -> None:
    d = column(GRID).expand(-1, 3).contiguous()
    zeros = torch.zeros_like(d)
    expected = sequence_kl(d, zeros, "k2")
    assert torch.allclose(sequence_kl(d, zeros, "k2_unbiased"), expected, rtol=1e-12, atol=1e-18)


def test_unbiased_k2_refuses_a_single_draw() -> None:
    with pytest.raises(ValueError, match="at least two"):
        sequence_kl(torch.zeros(2, 1), torch.zeros(2, 1), "k2_unbiased")


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equal_policies_have_no_penalty_and_no_gradient(estimator) -> None:
    elbo = torch.tensor([[-12.0, -15.5], [-3.25, -1e4]])
    value, gradient = value_and_gradient(elbo, elbo, estimator)
    assert value.tolist() == [0.0, 0.0]
    assert gradient.tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_k3_is_never_negative_and_k1_has_the_gradient_of_k2() -> None:
    d = column(torch.linspace(-4, 4, 2001).tolist())
    zeros = torch.zeros_like(d)
    k1, slope1 = value_and_gradient(d, zeros, "k1")
    k2, slope2 = value_and_gradient(d, zeros, "k2")
    k3, _ = value_and_gradient(d, zeros, "k3")
    assert (k3 >= 0).all() and (k2 >= 0).all()
    assert (k3[d[:, 0] != 0] > 0).all()
    assert torch.equal(k1, d[:, 0])
    assert torch.equal(slope1, slope2)


def test_means_over_the_policy_are_the_kl_divergence_and_its_gradient() -> None:
    # Four sequences with exact log-probabilities: sum_x p(x) k(log p(x) - log q(x)).
    logits = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
    log_q = torch.tensor([-0.5, 0.2, 0.4, 0.0], dtype=torch.float64).log_softmax(0)
    log_p = logits.log_softmax(0)
    p = log_p.detach().exp()
    kl = (log_p.exp() * (log_p - log_q)).sum()
    (kl_gradient,) = torch.autograd.grad(kl, logits, retain_graph=True)
    for estimator in ("k1", "k3"):
        value = sequence_kl(log_p.detach()[:, None], log_q[:, None], estimator)
        assert (p * value).sum().item() == pytest.approx(kl.item(), rel=1e-12)
    # The samples come from the policy with fixed weight: k1 and k2 still follow the KL's slope.
    for estimator in ("k1", "k2"):
        value = sequence_kl(log_p[:, None], log_q[:, None], estimator)
        (gradient,) = torch.autograd.grad((p * value).sum(), logits, retain_graph=True)
        assert torch.allclose(gradient, kl_gradient, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradient_is_the_difference_quotient_and_never_reaches_the_reference(estimator) -> None:
    generator = torch.Generator().manual_seed(1)
    elbo = torch.randn(3, 2, dtype=torch.float64, generator=generator)
    elbo_ref = torch.randn(3, 2, dtype=torch.float64, generator=generator)
    _, gradient = value_and_gradient(elbo, elbo_ref, estimator)
    # k1 reports d but follows d^2/2.
    objective = "k2" if estimator == "k1" else estimator
    step = 1e-5
    for m in range(2):
        moved = torch.zeros_like(elbo)
        moved[:, m] = step
        up, down = (sequence_kl(elbo + s * moved, elbo_ref, objective) for s in (1, -1))
        assert torch.allclose(gradient[:, m], (up - down) / (2 * step), rtol=1e-8, atol=1e-10)
