"""How sure a mean over samples is, and a difference of two means over the same samples."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import stats

from .bootstrap import bootstrap, mean_measure

_Array = npt.NDArray[np.float64]
# A spread this far below the values is rounding.
_ROUNDING = 1e-12


def bootstrap_interval(
    values: Sequence[float], level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of a mean.

    Args:
        values: One value per sample, at least one; a single one gives an interval of no width.
        level: Coverage, between 0 and 1.
        resamples: Bootstrap samples.
        seed: Seed of the resampling.

    Returns:
        Lower and upper end.

    Raises:
        ValueError: If there is no value, one is not finite, or `level` is not between 0 and 1.
    """
    mean = mean_measure(_finite(values, "values").tolist())
    return bootstrap({"mean": mean}, resamples, seed)["mean"].interval(level)


def paired_bootstrap_interval(
    a: Sequence[float], b: Sequence[float], level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of mean(a) − mean(b); samples are drawn with both their values.

    Args:
        a: One value per sample.
        b: The other value of the same samples, in the same order.
        level: Coverage, between 0 and 1.
        resamples: Bootstrap samples.
        seed: Seed of the resampling.

    Returns:
        Lower and upper end.

    Raises:
        ValueError: As `bootstrap_interval`, and if the lengths differ.
    """
    return bootstrap_interval(_differences(a, b).tolist(), level, resamples, seed)


def paired_t_test(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the p-value of the two-sided paired t-test of mean(a) = mean(b).

    Where the test is not defined the answer still is: a single sample proves nothing (1), and of equal differences
    in all samples, 0 means no difference (1) and any other value a certain one (0).

    Args:
        a: One value per sample.
        b: The other value of the same samples, in the same order.

    Returns:
        p, in 0..1.

    Raises:
        ValueError: If there is no value, one is not finite, or the lengths differ.
    """
    difference = _differences(a, b)
    if len(difference) < 2:
        return 1.0
    rounding = _ROUNDING * float(np.abs([a, b]).max())
    if float(np.ptp(difference)) <= rounding:
        return 1.0 if abs(float(difference.mean())) <= rounding else 0.0
    return float(stats.ttest_1samp(difference, 0.0).pvalue)


def _differences(a: Sequence[float], b: Sequence[float]) -> _Array:
    x, y = _finite(a, "a"), _finite(b, "b")
    if len(x) != len(y):
        raise ValueError(f"`a` and `b` must pair up, got {len(x)} and {len(y)} values: keep the samples that have both")
    return x - y


def _finite(values: Sequence[float], name: str) -> _Array:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or not len(x) or not np.isfinite(x).all():
        raise ValueError(f"`{name}` must be one finite value per sample, and at least one: leave out what has no value")
    return x
