"""Percentile bootstrap intervals."""

import torch
from torch import Tensor

from ._validation import check_whole


def percentiles(draws: Tensor, level: float) -> Tensor:
    """The middle share of draws.

    Args:
        draws: values of each draw, [R, ...]; NaN where a draw has none.
        level: the share, between 0 and 1.

    Returns:
        Lower and upper end, [..., 2], float64; NaN where no draw has a value.
    """
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64, device=draws.device)
    return draws.double().nanquantile(ends, dim=0).movedim(0, -1)


def around(draws: Tensor, observed: Tensor, level: float) -> Tensor:
    """Percentile intervals without the bias of the draws: as wide as `percentiles`, and around what was observed.

    Args:
        draws: values of each draw, [R, K]; NaN where a draw has none.
        observed: the measured values, [K]; all there is where no draw has a value.
        level: coverage.

    Returns:
        Lower and upper ends, [K, 2], float64, with the observed value between them.
    """
    observed = observed.double()[:, None]
    ends = percentiles(draws, level) - draws.double().nanmean(dim=0)[:, None] + observed
    ends = torch.where(ends.isnan(), observed, ends)
    return torch.cat([ends[:, :1].minimum(observed), ends[:, 1:].maximum(observed)], dim=1)


def mean_intervals(values: Tensor, level: float, resamples: int, seed: int) -> Tensor:
    """Bootstrap intervals of means, with the same draws for all of them.

    Args:
        values: one column for each mean, [n, m].
        level: coverage.
        resamples: how often the n rows are drawn with replacement.
        seed: seed of the draws.

    Returns:
        Lower and upper ends, [m, 2], float64, on the CPU; no width for a single row.

    Raises:
        ValueError: if `level` does not lie between 0 and 1, or `resamples` is below 1.
    """
    check_bootstrap(level, resamples)
    n, values = len(values), values.cpu().double()
    drawn = torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(seed))
    counts = torch.zeros(resamples, n, dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones_like(counts))
    return around(counts @ values / n, values.mean(dim=0), level)


def check_bootstrap(level: float, resamples: int) -> None:
    """Raise a ValueError unless an interval of this level can be had from so many draws."""
    check_whole(resamples, 1, "resamples")
    if not 0 < level < 1:
        raise ValueError(f"`level` must lie between 0 and 1, got {level}: 0.95 is customary")
