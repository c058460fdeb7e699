"""How two measures go together, over few points.

Notation: n points, R resamples of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from .intervals import check_bootstrap, percentiles

_Array = NDArray[np.float64]
# Values that differ by less than this share of the largest are rounding.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Correlation:
    """Correlation of two measures of concepts.

    Attributes:
        pearson: of the values.
        pearson_interval: by Fisher's transformation, which agrees with the p-value where bootstraps of few points do
            not; all there is with fewer than 4.
        pearson_p: two-sided p-value.
        spearman: of the ranks.
        spearman_interval: percentile bootstrap over the points; None if no resample has a correlation.
        spearman_p: two-sided p-value.
        concepts: n, how many points there are.
    """

    pearson: float
    pearson_interval: tuple[float, float]
    pearson_p: float
    spearman: float
    spearman_interval: tuple[float, float] | None
    spearman_p: float
    concepts: int


def correlation(
    x: Tensor | Sequence[float],
    y: Tensor | Sequence[float],
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Correlation | None:
    """Pearson's and Spearman's correlation with intervals.

    Args:
        x: one value for each concept, [n].
        y: the other value of the same concepts, [n].
        level: coverage of the intervals.
        resamples: how often the points are drawn with replacement; draws in which one measure is constant are left out.
        seed: seed of the draws.

    Returns:
        The correlations; None with fewer than 3 points, or where one measure is constant.

    Raises:
        ValueError: if the values do not pair up or are not finite, `level` does not lie between 0 and 1, or
            `resamples` is below 1.
    """
    check_bootstrap(level, resamples)
    first, second = (torch.as_tensor(values, dtype=torch.float64).cpu().numpy() for values in (x, y))
    n = len(first)
    if first.shape != (n,) or second.shape != (n,) or not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError(
            f"`x` and `y` must hold one finite value each for the same concepts, got {list(first.shape)} and "
            f"{list(second.shape)}: leave out the concepts that have none"
        )
    if n < 3 or _constant(first) or _constant(second):
        return None
    drawn = np.random.default_rng(seed).integers(n, size=(resamples, n))
    a, b = first[drawn], second[drawn]
    varied = ~(_constant(a) | _constant(b))
    a, b = a[varied], b[varied]
    pearson, spearman = stats.pearsonr(first, second), stats.spearmanr(first, second)
    low, high = pearson.confidence_interval(level)
    return Correlation(
        pearson=float(pearson.statistic),
        pearson_interval=(float(low), float(high)),
        pearson_p=float(pearson.pvalue),
        spearman=float(spearman.statistic),
        spearman_interval=_interval(_pearson(stats.rankdata(a, axis=1), stats.rankdata(b, axis=1)), level),
        spearman_p=float(spearman.pvalue),
        concepts=n,
    )


def _constant(x: _Array) -> NDArray[np.bool_]:
    """Whether the last axis holds one value only."""
    constant: NDArray[np.bool_] = np.ptp(x, axis=-1) <= _ROUNDING * np.abs(x).max(axis=-1)
    return constant


def _pearson(a: _Array, b: _Array) -> _Array:
    """Correlation of each row of a with the same row of b."""
    a, b = (values - values.mean(axis=1, keepdims=True) for values in (a, b))
    correlations: _Array = (a * b).sum(axis=1) / np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    return correlations


def _interval(draws: _Array, level: float) -> tuple[float, float] | None:
    if not len(draws):
        return None
    low, high = percentiles(torch.from_numpy(draws), level).tolist()
    return low, high
