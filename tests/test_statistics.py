"""Intervals and tests of means against closed forms."""

import warnings
from collections.abc import Iterator

import numpy as np
import pytest
from conceptshift.metrics import bootstrap_interval, paired_bootstrap_interval, paired_t_test
from scipy import stats

# Student's own example (1908): hours of sleep that two drugs gave ten patients more.
DEXTRO = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
LAEVO = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_students_sleep_data() -> None:
    assert paired_t_test(DEXTRO, LAEVO) == pytest.approx(0.00283289, abs=1e-8)
    assert paired_t_test(LAEVO, DEXTRO) == paired_t_test(DEXTRO, LAEVO)


def test_t_test_is_that_of_the_textbook() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=30), rng.normal(0.3, size=30)
    difference = a - b
    t = difference.mean() / (difference.std(ddof=1) / np.sqrt(30))
    assert paired_t_test(a.tolist(), b.tolist()) == pytest.approx(2 * stats.t.sf(abs(t), df=29))


def test_pairing_matters() -> None:
    """A small difference in every pair is certain, however far the samples lie apart."""
    a = [float(value) for value in range(20)]
    b = [value + 0.1 + 0.01 * (value % 2) for value in a]
    assert paired_t_test(a, b) < 1e-6
    assert stats.ttest_ind(a, b).pvalue > 0.9
    low, high = paired_bootstrap_interval(a, b)
    assert -0.12 < low < high < -0.09


@pytest.mark.parametrize(
    ("a", "b", "p"),
    [
        ([0.4], [0.1], 1.0),
        ([0.4, 0.7, 0.1], [0.4, 0.7, 0.1], 1.0),
        # 0.1 more each time, up to rounding.
        ([0.1, 0.2, 0.3], [0.2, 0.3, 0.4], 0.0),
        ([5.0, 5.0], [5.0, 5.0], 1.0),
    ],
)
def test_degenerate_pairs_have_a_defined_answer(a: list[float], b: list[float], p: float) -> None:
    assert paired_t_test(a, b) == p
    low, high = paired_bootstrap_interval(a, b)
    assert low == pytest.approx(a[0] - b[0])
    assert high == pytest.approx(a[0] - b[0])


def test_bootstrap_of_many_samples_is_the_normal_interval() -> None:
    values = np.random.default_rng(1).normal(3, 2, size=4000)
    low, high = bootstrap_interval(values.tolist(), seed=3)
    error = values.std(ddof=1) / np.sqrt(4000)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


def test_bootstrap_agrees_with_scipy() -> None:
    values = np.random.default_rng(2).exponential(size=25)
    ours = bootstrap_interval(values.tolist(), level=0.9, resamples=50_000)
    theirs = stats.bootstrap((values,), np.mean, confidence_level=0.9, n_resamples=50_000, method="percentile", rng=5)
    assert ours == pytest.approx(tuple(theirs.confidence_interval), abs=0.01)


def test_bootstrap_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(4)
    intervals = [bootstrap_interval(rng.normal(size=50).tolist(), level=0.8, resamples=500) for _ in range(300)]
    assert sum(low <= 0 <= high for low, high in intervals) / 300 == pytest.approx(0.8, abs=0.06)


def test_bootstrap_follows_seed_and_scale() -> None:
    values = [0.2, 0.9, 0.4, 0.7]
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(values, seed=1, resamples=99) != bootstrap_interval(values, seed=2, resamples=99)
    scaled = bootstrap_interval([1000 * value for value in values])
    assert scaled == pytest.approx(tuple(1000 * end for end in bootstrap_interval(values)))
    assert bootstrap_interval([0.3]) == (0.3, 0.3)


def test_errors() -> None:
    with pytest.raises(ValueError, match="`values` must be one finite value per sample, and at least one"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match="leave out what has no value"):
        bootstrap_interval([0.1, float("nan")])
    with pytest.raises(ValueError, match="`a` and `b` must pair up, got 2 and 1 values"):
        paired_t_test([0.1, 0.2], [0.1])
    with pytest.raises(ValueError, match="`level` must lie between 0 and 1, got 95"):
        bootstrap_interval([0.1], level=95)
