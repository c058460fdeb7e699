"""How sure the score of a set is, and a difference of two scores of the same samples, whatever the score.

Legend:
    N    samples
    m    statistics of a sample
    R    resamples
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
# Resampled indices held at a time.
_CHUNK = 4_000_000


class Measure(NamedTuple):
    """A score of a set that depends on its samples through sums over them.

    Attributes:
        statistics: One row per sample [N, m], in the order of the sorted sample ids.
        score: Summed statistics [..., m] → scores [...]; NaN where the score is not defined.
    """

    statistics: Array
    score: Callable[[Array], Array]

    @property
    def value(self) -> float:
        """The score of the whole set."""
        return float(self.score(self.statistics.sum(axis=0)))


def ratio(sums: Array) -> Array:
    """Summed statistics [..., 2] → first / second [...]; NaN where the second is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        quotient: Array = sums[..., 0] / sums[..., 1]
    return quotient


def mean_measure(values: Sequence[float | None]) -> Measure:
    """Return the mean over the samples that have a value.

    Args:
        values: One per sample, in the order of the sorted ids; nothing, or NaN, where a sample does not count.

    Returns:
        The measure; its statistics are (value, 1), or (0, 0) where a sample does not count.
    """
    x = np.array(values, dtype=np.float64)
    known = ~np.isnan(x)
    return Measure(np.stack([np.where(known, x, 0.0), known], axis=1), ratio)


@dataclass(frozen=True)
class Scored:
    """A score with what it is in resamples.

    Attributes:
        score: Of the set itself.
        draws: Of the resamples [R]; NaN where it is not defined, such as the accuracy of a type that was not drawn.
        samples: N.
        seed: Seed of the resampling. Draws of the same N and seed are of the same resamples.
    """

    score: float
    draws: Array
    samples: int
    seed: int

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return the percentile interval over the draws in which the score is defined.

        Raises:
            ValueError: `level` is not between 0 and 1.
        """
        return _percentiles(self.draws, level)


def bootstrap(measures: Mapping[str, Measure], resamples: int = 2_000, seed: int = 0) -> dict[str, Scored]:
    """Score a set and R resamples of it, drawn with replacement.

    The resamples depend on N and `seed` only: all measures see the same ones, and so does another run over the same
    samples, whose draws are thereby paired with these.

    Args:
        measures: Name → measure, all of the same N samples.
        resamples: R.
        seed: Seed of the resampling.

    Returns:
        Name → score and draws.

    Raises:
        ValueError: There is no sample, or the measures are of different numbers of samples.
    """
    counts = {name: len(measure.statistics) for name, measure in measures.items()}
    n = next(iter(counts.values()), 0)
    if not n or len(set(counts.values())) > 1:
        raise ValueError(f"`measures` must be of the same samples, at least one, got {counts}: score them together")
    # Measures may share their statistics, as BLEU-1 to BLEU-4 do.
    blocks = {id(measure.statistics): measure.statistics for measure in measures.values()}
    sums = _resampled_sums(np.concatenate(list(blocks.values()), axis=1), resamples, seed)
    edges = np.cumsum([block.shape[1] for block in blocks.values()])[:-1]
    draws = dict(zip(blocks, np.split(sums, edges, axis=1), strict=True))
    return {
        name: Scored(measure.value, measure.score(draws[id(measure.statistics)]), n, seed)
        for name, measure in measures.items()
    }


def difference(a: Scored, b: Scored, level: float = 0.95) -> tuple[float, tuple[float, float]]:
    """Return a − b and its percentile interval; both must be of the same samples.

    Args:
        a: One score.
        b: The other, with the same N, resamples and seed.
        level: Coverage, between 0 and 1.

    Raises:
        ValueError: The resamples are not the same ones, or `level` is not between 0 and 1.
    """
    ours, theirs = ((scored.samples, len(scored.draws), scored.seed) for scored in (a, b))
    if ours != theirs:
        raise ValueError(
            f"`a` and `b` must pair up, got (samples, resamples, seed) {ours} and {theirs}: score the samples that "
            "both have, with one seed"
        )
    return a.score - b.score, _percentiles(a.draws - b.draws, level)


def _resampled_sums(statistics: Array, resamples: int, seed: int) -> Array:
    """Sums of statistics [N, M] over resamples, [R, M]."""
    rng = np.random.default_rng(seed)
    n, chunk = len(statistics), max(1, _CHUNK // len(statistics))
    parts = []
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        drawn = rng.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)
        parts.append(weights.astype(np.float64) @ statistics)
    return np.concatenate(parts)


def _percentiles(draws: Array, level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise ValueError(f"`level` must lie between 0 and 1, got {level}: 0.95 is customary")
    known = draws[~np.isnan(draws)]
    if not len(known):
        return float("nan"), float("nan")
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
