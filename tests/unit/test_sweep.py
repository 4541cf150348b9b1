"""Fits of the sweep: they find what made the numbers, and flag what grows too fast."""

import numpy as np
import pytest

from benchmarks.sweep import TERMS, Point, fit, growth, points

KINDS = ("exact", "dual cache", "update")
SWEEPS = {
    "prompt": (128, 512, 2048),
    "batch": (1, 4),
    "vocabulary": (4096, 65536),
    "block": (8, 64),
}


def measured_by(coefficients: list[float], kind: str) -> dict[Point, float]:
    """Seconds that follow the terms exactly."""
    line = [p for sweep in points([kind], SWEEPS).values() for p in sweep]
    return {point: float(np.dot(coefficients, point.terms())) for point in line}


@pytest.mark.parametrize("kind", KINDS)
def test_fit_finds_the_coefficients_that_made_the_times(kind) -> None:
    wanted = [2e-3, 3e-6, 1e-9, 4e-10, 2e-8]
    assert len(wanted) == len(TERMS)
    assert fit(measured_by(wanted, kind)) == pytest.approx(wanted, rel=1e-6)


def test_fit_leaves_out_a_term_that_would_be_negative() -> None:
    measured = measured_by([2e-3, 3e-6, 1e-9, 4e-10, 0.0], "exact")
    # Less than nothing per entry of the vocabulary: no cost explains that.
    for point in measured:
        measured[point] -= 1e-9 * point.vocabulary
    found = fit(measured)
    assert found[TERMS.index("vocabulary")] == 0.0 and (found >= 0.0).all()


def test_only_what_grows_faster_than_the_operations_is_flagged() -> None:
    sweep = points(["exact"], SWEEPS)["prompt"]
    as_fast = {point: 1e-9 * point.flops() for point in sweep}
    assert [step["faster"] for step in growth(sweep, "prompt", as_fast)] == [False, False]
    cubic = {point: 1e-9 * point.prompt**3 for point in sweep}
    steps = growth(sweep, "prompt", cubic)
    assert [step["faster"] for step in steps] == [True, True]
    assert [step["time"] for step in steps] == pytest.approx([3.0, 3.0])
    # Attention's quadratic part: the exponent lies between 1 and 2 and rises.
    assert 0.5 < steps[0]["operations"] < steps[1]["operations"] < 2.0


def test_dual_cache_passes_the_block_and_attends_to_everything() -> None:
    cached, exact = Point("dual cache", prompt=960), Point("exact", prompt=960)
    # One full pass of 1,024 positions and seven of 32, in eight evaluations.
    assert cached.terms()[1] == pytest.approx(2 * (1024 + 7 * 32) / 8)
    assert cached.terms()[2] == pytest.approx(2 * (1024**2 + 7 * 32 * 1024) / 8)
    assert exact.terms()[1:3] == [2 * 1024, 2 * 1024**2]
    # The head sees the same rows: 32, 28, ... 4 masked positions of each row's block.
    assert cached.head_rows() == exact.head_rows() == 2 * 18
    assert cached.flops() < exact.flops() / 3
