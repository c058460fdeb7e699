"""Intervals of any measure of a set, against scipy and simulations."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from conceptshift.metrics import Measure, Scored, bootstrap, difference, mean_measure
from scipy import stats


def mean_of(values: np.ndarray) -> dict[str, Measure]:
    return {"mean": mean_measure(values.tolist())}


def ratio_of_sums(sums: np.ndarray) -> np.ndarray:
    quotient: np.ndarray = sums[..., 0] / sums[..., 1]
    return quotient


def test_the_interval_of_a_mean_is_that_of_scipy() -> None:
    values = np.random.default_rng(2).exponential(size=25)
    ours = bootstrap(mean_of(values), resamples=50_000)["mean"]
    theirs = stats.bootstrap((values,), np.mean, confidence_level=0.9, n_resamples=50_000, method="percentile", rng=5)
    assert ours.score == pytest.approx(values.mean())
    assert ours.interval(0.9) == pytest.approx(tuple(theirs.confidence_interval), abs=0.01)


def test_the_interval_of_a_ratio_of_sums_is_that_of_scipy() -> None:
    """No mean over samples: numerator and denominator are drawn together, as BLEU's matches and guesses are."""
    rng = np.random.default_rng(3)
    x, y = rng.exponential(size=40), rng.uniform(0.5, 2, size=40)
    ours = bootstrap({"ratio": Measure(np.stack([x, y], axis=1), ratio_of_sums)}, resamples=50_000)["ratio"]

    def quotient(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
        value: np.ndarray = x.sum(axis=axis) / y.sum(axis=axis)
        return value

    theirs = stats.bootstrap(
        (x, y), quotient, paired=True, vectorized=True, n_resamples=50_000, method="percentile", rng=5
    )
    assert ours.score == pytest.approx(x.sum() / y.sum())
    assert ours.interval() == pytest.approx(tuple(theirs.confidence_interval), abs=0.01)


def test_two_runs_over_the_same_samples_are_paired() -> None:
    """A small gain in every sample is certain, however far the samples lie apart."""
    before = np.random.default_rng(0).normal(0, 10, size=60)
    after = before + 0.1
    a, b = (bootstrap(mean_of(values))["mean"] for values in (after, before))
    gain, (low, high) = difference(a, b)
    assert gain == pytest.approx(0.1)
    assert (low, high) == pytest.approx((0.1, 0.1))
    assert a.interval()[1] - a.interval()[0] > 3
    other = bootstrap(mean_of(before), seed=1)["mean"]
    with pytest.raises(ValueError, match="must pair up"):
        difference(a, other)
    with pytest.raises(ValueError, match="must pair up"):
        difference(a, bootstrap(mean_of(before[:-1]))["mean"])


def test_a_measure_does_not_depend_on_those_beside_it() -> None:
    rng = np.random.default_rng(1)
    one, two = (mean_measure(rng.normal(size=30).tolist()) for _ in range(2))
    wide = Measure(rng.uniform(1, 2, size=(30, 5)), lambda sums: sums[..., 3] / sums[..., 4])
    together = bootstrap({"one": one, "wide": wide, "two": two})
    for name, measure in {"one": one, "wide": wide, "two": two}.items():
        alone = bootstrap({name: measure})[name]
        assert together[name].score == alone.score
        np.testing.assert_allclose(together[name].draws, alone.draws, rtol=1e-12)


def test_the_paired_interval_covers_the_difference_as_often_as_it_says() -> None:
    rng = np.random.default_rng(4)
    hits = 0
    for _ in range(300):
        common = rng.normal(0, 5, size=50)
        a, b = (bootstrap(mean_of(common + rng.normal(mean, 1, size=50)), 500)["mean"] for mean in (0.3, 0.0))
        low, high = difference(a, b, level=0.8)[1]
        hits += low <= 0.3 <= high
    assert hits / 300 == pytest.approx(0.8, abs=0.06)


def test_samples_that_do_not_count() -> None:
    """Draws without any sample of the type are left out of the interval; with all samples there are none."""
    scored = bootstrap({"rare": mean_measure([None, 0.25, None, None])})["rare"]
    assert scored.score == 0.25
    # Three of four samples lack a value, so (3/4)^4 of the draws have none.
    assert np.isnan(scored.draws).mean() == pytest.approx(0.75**4, abs=0.04)
    assert scored.interval() == (0.25, 0.25)
    assert np.isnan(bootstrap({"none": mean_measure([None, None])})["none"].interval()).all()


def test_draws_follow_the_seed_not_how_much_is_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(5).normal(size=9)
    whole = bootstrap(mean_of(values), resamples=500)["mean"]
    # By its name the package gives the function.
    monkeypatch.setattr(sys.modules["conceptshift.metrics.bootstrap"], "_CHUNK", 70)
    parts = bootstrap(mean_of(values), resamples=500)["mean"]
    np.testing.assert_allclose(parts.draws, whole.draws, rtol=1e-12)
    assert not np.allclose(bootstrap(mean_of(values), resamples=500, seed=1)["mean"].draws, whole.draws)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"of the same samples, at least one, got {}"):
        bootstrap({})
    with pytest.raises(ValueError, match=r"got {'a': 2, 'b': 1}: score them together"):
        bootstrap({"a": mean_measure([0.1, 0.2]), "b": mean_measure([0.1])})
    scored = Scored(0.5, np.array([0.4, 0.6]), samples=3, seed=0)
    with pytest.raises(ValueError, match="`level` must lie between 0 and 1, got 95"):
        scored.interval(95)
