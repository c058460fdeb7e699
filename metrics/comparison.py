"""One score of several methods on the same samples: means, intervals, and what tells one method from the others."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .statistics import bootstrap_interval, paired_bootstrap_interval, paired_t_test


def compare(values: Mapping[str, Sequence[float | None]], method: str, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Summarise each method, and test one of them against each of the others.

    Args:
        values: Method → its N values, in the same order of samples; nothing where a sample has no value.
        method: The method that the others are baselines of.
        seed: Seed of the bootstrap.

    Returns:
        Method → "mean", "std" (of samples, n − 1), "interval" (95 % bootstrap) and "n"; of a baseline also, over the
        samples that both have, "difference" (method − baseline) with its "difference_interval" (95 %, paired
        bootstrap) and "p" (two-sided paired t-test). A method without any value is left out.
    """
    rows = {name: _summary(known, seed) for name, known in _known(values).items()}
    for name, row in rows.items():
        pairs = [
            (ours, theirs)
            for ours, theirs in zip(values[method], values[name], strict=True)
            if ours is not None and theirs is not None
        ]
        if name == method or not pairs:
            continue
        ours, theirs = ([pair[side] for pair in pairs] for side in (0, 1))
        row["difference"] = float(np.mean(ours) - np.mean(theirs))
        row["difference_interval"] = list(paired_bootstrap_interval(ours, theirs, seed=seed))
        row["p"] = paired_t_test(ours, theirs)
    return rows


def _known(values: Mapping[str, Sequence[float | None]]) -> dict[str, list[float]]:
    known = {name: [value for value in column if value is not None] for name, column in values.items()}
    return {name: column for name, column in known.items() if column}


def _summary(values: list[float], seed: int) -> dict[str, Any]:
    return {
        "mean": float(np.mean(values)),
        "std": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
        "interval": list(bootstrap_interval(values, seed=seed)),
        "n": len(values),
    }
