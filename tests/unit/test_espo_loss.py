"""The ESPO objective against a reference written out in Python floats, gradients included."""

import math
from dataclasses import replace

import pytest
import torch
from espo_terms import elbo_gradient, espo_terms

from megatron_espo.config import EspoConfig

LENGTH = 8
CONFIG = EspoConfig(clip_eps_low=0.2, clip_eps_high=0.3, kl_coef=0.05)
# Log-ratios below, inside and above the clip range [0.8, 1.3], and exactly 0.
LOG_RATIOS = (-1.0, -0.23, -0.22, -0.1, 0.0, 0.1, 0.26, 0.27, 1.5)
ADVANTAGES = (-1.7, -0.4, 0.0, 0.6, 2.5)


def kl_reference(d: list[float], estimator: str) -> tuple[float, list[float]]:
    """The penalty of one sequence in nats and its slope in each draw."""
    m = len(d)
    mean = sum(d) / m
    if estimator == "k1":
        return mean, [mean / m] * m
    if estimator == "k2":
        return mean**2 / 2, [mean / m] * m
    if estimator == "k3":
        return math.exp(-mean) - 1 + mean, [(1 - math.exp(-mean)) / m] * m
    pairs = m * (m - 1)
    value = sum(d[i] * d[j] / 2 for i in range(m) for j in range(m) if i != j) / pairs
    return value, [sum(d[j] for j in range(m) if j != i) / pairs for i in range(m)]


def sequence_reference(
    elbo: list[float],
    old: list[float],
    ref: list[float] | None,
    advantage: float,
    config: EspoConfig,
) -> dict[str, float | list[float] | bool]:
    """Loss of one sequence, piece by piece, with its derivative in each draw's ELBO."""
    m = len(elbo)
    low, high = 1 - config.clip_eps_low, 1 + config.clip_eps_high
    ratio = math.exp((sum(elbo) / m - sum(old) / m) / LENGTH)
    clipped_low = ratio < low and advantage < 0
    clipped_high = ratio > high and advantage > 0
    if clipped_low:
        surrogate, slope = low * advantage, 0.0
    elif clipped_high:
        surrogate, slope = high * advantage, 0.0
    else:
        surrogate, slope = ratio * advantage, ratio * advantage
    loss, gradient, kl = -surrogate, [-slope / LENGTH / m] * m, 0.0
    if ref is not None:
        differences = [a - b for a, b in zip(elbo, ref, strict=True)]
        kl, slopes = kl_reference(differences, config.kl_estimator)
        kl /= LENGTH
        loss += config.kl_coef * kl
        gradient = [g + config.kl_coef * s / LENGTH for g, s in zip(gradient, slopes, strict=True)]
    return {
        "loss": loss,
        "gradient": gradient,
        "ratio": ratio,
        "kl": kl,
        "clipped_low": clipped_low,
        "clipped_high": clipped_high,
    }


def cases(num_mc: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Every log-ratio with every advantage, draws scattered around their means."""
    generator = torch.Generator().manual_seed(num_mc)
    grid = [(r, a) for r in LOG_RATIOS for a in ADVANTAGES]
    log_ratio = torch.tensor([r for r, _ in grid], dtype=torch.float64)
    advantages = torch.tensor([a for _, a in grid], dtype=torch.float64)

    def scatter(scale: float) -> torch.Tensor:
        noise = torch.randn(len(grid), num_mc, dtype=torch.float64, generator=generator)
        return scale * (noise - noise.mean(dim=1, keepdim=True))

    old = -20.0 + scatter(3.0)
    elbo = old.mean(dim=1, keepdim=True) + LENGTH * log_ratio[:, None] + scatter(2.0)
    ref = elbo + torch.randn(elbo.shape, dtype=torch.float64, generator=generator)
    return elbo, old, ref, advantages


@pytest.mark.parametrize(
    ("num_mc", "estimator"),
    [(m, e) for m in (1, 2, 3) for e in (None, "k1", "k2", "k3")]
    + [(2, "k2_unbiased"), (3, "k2_unbiased")],
)
def test_terms_and_gradient_are_those_of_the_written_out_objective(num_mc: int, estimator) -> None:
    config = CONFIG if estimator is None else replace(CONFIG, kl_estimator=estimator)
    elbo, old, ref, advantages = cases(num_mc)
    given_ref = None if estimator is None else ref
    expected = [
        sequence_reference(
            elbo[i].tolist(),
            old[i].tolist(),
            None if estimator is None else ref[i].tolist(),
            advantages[i].item(),
            config,
        )
        for i in range(len(elbo))
    ]
    # Every branch of the objective is among the cases.
    assert {(e["clipped_low"], e["clipped_high"]) for e in expected} == {
        (False, False),
        (True, False),
        (False, True),
    }
    leaf = elbo.clone().requires_grad_()
    terms = espo_terms(leaf, old, given_ref, advantages, LENGTH, config)
    (joint,) = torch.autograd.grad(terms.loss.sum(), leaf)
    two_pass, detached = elbo_gradient(elbo, old, given_ref, advantages, LENGTH, config)
    for i, want in enumerate(expected):
        for found in (terms, detached):
            assert found.loss[i].item() == pytest.approx(want["loss"], rel=1e-11, abs=1e-13)
            assert found.ratio[i].item() == pytest.approx(want["ratio"], rel=1e-11)
            assert found.kl[i].item() == pytest.approx(want["kl"], rel=1e-10, abs=1e-13)
            assert found.clipped_low[i].item() == want["clipped_low"]
            assert found.clipped_high[i].item() == want["clipped_high"]
        assert joint[i].tolist() == pytest.approx(want["gradient"], rel=1e-10, abs=1e-14)
    assert torch.equal(two_pass, joint)
    assert not (detached.loss.requires_grad or detached.ratio.requires_grad or elbo.requires_grad)


@pytest.mark.parametrize("num_mc", [1, 2, 3])
def test_mean_of_draws_stands_inside_the_exponential(num_mc: int) -> None:
    # The ratio of means, not the mean of ratios: they differ as soon as the draws do.
    elbo, old, _, advantages = cases(num_mc)
    ratio = espo_terms(elbo, old, None, advantages, LENGTH, CONFIG).ratio
    mean_of_ratios = ((elbo - old) / LENGTH).exp().mean(dim=1)
    assert torch.allclose(ratio, mean_of_ratios) == (num_mc == 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_mc", [1, 2, 3])
def test_ratio_of_a_policy_to_itself_is_exactly_1_and_is_never_clipped(dtype, num_mc: int) -> None:
    elbo = cases(num_mc)[0].to(dtype) * 37.1
    advantages = cases(num_mc)[3].to(dtype)
    gradient, terms = elbo_gradient(elbo, elbo.clone(), None, advantages, LENGTH, CONFIG)
    assert (terms.ratio == 1.0).all()
    assert torch.equal(terms.loss, -advantages)
    assert not (terms.clipped_low | terms.clipped_high).any()
    expected = (-advantages / LENGTH / num_mc)[:, None].expand(-1, num_mc)
    assert torch.allclose(gradient, expected, rtol=1e-6)


def test_zero_clip_range_keeps_only_steps_back_towards_the_old_policy() -> None:
    config = replace(CONFIG, clip_eps_low=0.0, clip_eps_high=0.0)
    elbo = torch.tensor([[0.1], [0.1], [-0.1], [-0.1]], dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    gradient, terms = elbo_gradient(elbo, torch.zeros_like(elbo), None, advantages, LENGTH, config)
    assert (gradient[:, 0] != 0).tolist() == [False, True, True, False]
    assert terms.clipped_high.tolist() == [True, False, False, False]
    assert terms.clipped_low.tolist() == [False, False, False, True]


def test_penalty_and_flags_without_a_reference_or_an_advantage() -> None:
    elbo, old, ref, _ = cases(2)
    nothing = torch.zeros(len(elbo), dtype=torch.float64)
    terms = espo_terms(elbo, old, None, nothing, LENGTH, CONFIG)
    assert torch.equal(terms.kl, nothing) and torch.equal(terms.loss.abs(), nothing)
    assert not (terms.clipped_low | terms.clipped_high).any()
    with_ref = espo_terms(elbo, old, ref, nothing, LENGTH, CONFIG)
    assert torch.allclose(with_ref.loss, CONFIG.kl_coef * with_ref.kl, rtol=1e-12)
    assert (with_ref.kl > 0).all()


@pytest.mark.parametrize("estimator", [None, "k1", "k2", "k3", "k2_unbiased"])
def test_two_passes_have_the_gradient_of_the_joint_loss(estimator) -> None:
    """sum_m c_m ELBO_m, draw by draw, against back-propagation through the joint loss."""
    num_mc, num_sequences = 3, 6
    config = CONFIG if estimator is None else replace(CONFIG, kl_estimator=estimator)
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(num_sequences, num_mc, 5, dtype=torch.float64, generator=generator)
    theta = torch.randn(5, dtype=torch.float64, generator=generator).requires_grad_()
    noise = torch.randn(num_sequences, num_mc, dtype=torch.float64, generator=generator)
    log_ratios = torch.tensor([0.4, -0.4, 0.1, -0.1, 0.0, 0.5], dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0, 0.5, -2.0, 3.0, -0.3], dtype=torch.float64)

    def elbo_of(draw: torch.Tensor) -> torch.Tensor:
        return -((3.0 + (draw @ theta).tanh()) ** 2) / 2  # any nonlinear model

    old = elbo_of(features).detach() - LENGTH * log_ratios[:, None]
    old += noise - noise.mean(dim=1, keepdim=True)
    ref = None if estimator is None else old + 0.5
    joint = espo_terms(elbo_of(features), old, ref, advantages, LENGTH, config)
    (expected,) = torch.autograd.grad(joint.loss.sum(), theta)
    assert (joint.clipped_high.tolist(), joint.clipped_low.tolist()) == (
        [True] + [False] * 5,
        [False, True] + [False] * 4,
    )

    with torch.no_grad():
        values = elbo_of(features)
    factors, _ = elbo_gradient(values, old, ref, advantages, LENGTH, config)
    found = torch.zeros_like(theta)
    for i in range(num_sequences):
        for m in range(num_mc):
            (part,) = torch.autograd.grad(factors[i, m] * elbo_of(features[i, m]), theta)
            found += part
    assert torch.allclose(found, expected, rtol=1e-11, atol=1e-14)


def test_gradient_is_available_where_gradients_are_switched_off() -> None:
    elbo, old, ref, advantages = cases(2)
    with torch.no_grad():
        gradient, terms = elbo_gradient(elbo, old, ref, advantages, LENGTH, CONFIG)
        assert not torch.is_grad_enabled()
    assert torch.equal(gradient, elbo_gradient(elbo, old, ref, advantages, LENGTH, CONFIG)[0])
    assert not terms.loss.requires_grad


def test_sequences_do_not_mix() -> None:
    elbo, old, ref, advantages = cases(2)
    whole, _ = elbo_gradient(elbo, old, ref, advantages, LENGTH, CONFIG)
    for i in (0, 13, len(elbo) - 1):
        row = slice(i, i + 1)
        alone, _ = elbo_gradient(elbo[row], old[row], ref[row], advantages[row], LENGTH, CONFIG)
        assert torch.equal(alone[0], whole[i])
