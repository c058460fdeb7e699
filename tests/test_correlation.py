"""Correlations of measures against SciPy, and their intervals against loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conceptshift.concepts import Correlation, correlation
from numpy.typing import NDArray
from scipy import stats

_Array = NDArray[np.float64]


def correlated(n: int = 12) -> tuple[_Array, _Array]:
    rng = np.random.default_rng(1)
    x = rng.normal(size=n)
    return x, x**3 + rng.normal(size=n)


def test_correlation_is_that_of_scipy() -> None:
    x, y = correlated()
    found = correlation(torch.tensor(x), torch.tensor(y))
    assert found is not None
    pearson, spearman = stats.pearsonr(x, y), stats.spearmanr(x, y)
    assert (found.pearson, found.pearson_p) == pytest.approx((pearson.statistic, pearson.pvalue))
    assert (found.spearman, found.spearman_p) == pytest.approx((spearman.statistic, spearman.pvalue))
    assert found.concepts == 12
    assert correlation(x.tolist(), y.tolist()) == found


def test_intervals_of_a_correlation() -> None:
    """Few points, of which many resamples have one value only; these are left out."""
    x, y = [0.0, 1.0, 1.0, 1.0], [0.0, 2.0, 1.0, 3.0]
    found = correlation(x, y, level=0.8, resamples=300, seed=5)
    drawn = np.random.default_rng(5).integers(4, size=(300, 4))
    kept = [(np.array(x)[rows], np.array(y)[rows]) for rows in drawn]
    kept = [(a, b) for a, b in kept if len(set(a)) > 1 and len(set(b)) > 1]
    assert len(kept) < 250
    assert isinstance(found, Correlation)
    ends = np.quantile([stats.spearmanr(a, b).statistic for a, b in kept], [0.1, 0.9])
    assert found.spearman_interval == pytest.approx(tuple(ends))
    # Fisher: atanh r is normal with a standard deviation of 1 / √(n − 3).
    half = float(stats.norm.ppf(0.9))
    assert found.pearson_interval == pytest.approx(np.tanh(np.arctanh(found.pearson) + np.array([-half, half])))


def test_the_interval_of_pearson_agrees_with_its_p() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        x, y = rng.normal(size=(2, 10))
        found = correlation(x.tolist(), (y + 0.6 * x).tolist(), resamples=1)
        assert found is not None
        if abs(found.pearson_p - 0.05) > 0.01:
            low, high = found.pearson_interval
            assert (low <= 0 <= high) == (found.pearson_p > 0.05)


def test_undefined_correlations() -> None:
    x, y = correlated()
    assert correlation(x[:2].tolist(), y[:2].tolist()) is None
    assert correlation([], []) is None
    assert correlation([0.5] * 12, y.tolist()) is None
    # Up to rounding, one value.
    assert correlation(x.tolist(), (1 + 1e-9 * y).tolist()) is None
    # One value differs, and the only draw does not hold it.
    found = correlation([0.0] * 11 + [1.0], y.tolist(), resamples=1, seed=_seed_of_others(11))
    assert found is not None
    assert found.spearman_interval is None
    with pytest.raises(ValueError, match=r"`x` and `y` must hold one finite value each .* got \[12\] and \[11\]"):
        correlation(x.tolist(), y[1:].tolist())
    with pytest.raises(ValueError, match=r"leave out the concepts that have none"):
        correlation([float("nan"), *x[1:].tolist()], y.tolist())
    with pytest.raises(ValueError, match=r"`level` must lie between 0 and 1, got 0"):
        correlation(x.tolist(), y.tolist(), level=0)


def _seed_of_others(point: int) -> int:
    """Seed of which the first draw lacks a point."""
    return next(seed for seed in range(99) if point not in np.random.default_rng(seed).integers(12, size=(1, 12)))
