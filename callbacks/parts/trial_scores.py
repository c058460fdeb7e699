"""Shares of samples over trials, with intervals that know which samples share a picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from scipy.stats import binomtest

from ...datamodules.sample import Sample
from ...metrics import Measure, Scored, difference
from ...metrics.bootstrap import ratio
from .trials import Trial


class Pictures:
    """Adds values up by picture, so that resamples draw whole pictures: samples of one picture are not independent.

    Args:
        samples: Id → sample, of all that values are given of.
    """

    def __init__(self, samples: Mapping[str, Sample]) -> None:
        numbers = {path: number for number, path in enumerate(sorted({s.image for s in samples.values()}))}
        self._number = {i: numbers[sample.image] for i, sample in samples.items()}
        self._count = len(numbers)

    def share(self, values: Mapping[str, bool]) -> Measure:
        """How many of the samples that have a value have it true.

        Args:
            values: Id → value.
        """
        return self.quotient({i: (float(value), 1.0) for i, value in values.items()})

    def quotient(self, values: Mapping[str, tuple[float, float]]) -> Measure:
        """The sum of some values divided by that of others.

        Args:
            values: Id → what counts, and of how much.
        """
        sums = np.zeros((self._count, 2))
        for i, pair in values.items():
            sums[self._number[i]] += pair
        return Measure(sums, ratio)


def value(scored: Scored | None, name: str = "value") -> dict[str, Any]:
    """A score with its interval; both nothing where no sample has a value.

    Args:
        scored: The score.
        name: Its key.
    """
    if scored is None or np.isnan(scored.score):
        return {name: None, "interval": None}
    return {name: scored.score, "interval": list(scored.interval())}


def compared(
    ours: Scored, theirs: Scored, wrong: Mapping[str, bool], controls: Mapping[str, bool]
) -> dict[str, Any] | None:
    """The difference of two shares over the same samples, with its interval and the p-value of the exact McNemar test.

    The test looks at the samples in which the two differ, each as one toss of a fair coin, whatever picture it is of.

    Args:
        ours: Scored share of `wrong`.
        theirs: Scored share of `controls`.
        wrong: Id → outcome.
        controls: Id → outcome of the control.
    """
    both = wrong.keys() & controls.keys()
    if not both:
        return None
    distance, interval = difference(ours, theirs)
    more = sum(wrong[i] and not controls[i] for i in both)
    less = sum(controls[i] and not wrong[i] for i in both)
    p = float(binomtest(more, more + less).pvalue) if more + less else 1.0
    return {"value": distance, "interval": list(interval), "p": p}


def wrong(trials: Mapping[str, Trial], ids: Iterable[str]) -> dict[str, bool]:
    """Id → whether an answer that was right has become wrong, of those ids that have the trial."""
    return {i: not trials[i].right for i in ids if i in trials}


def mean_tokens(trials: Mapping[str, Trial], ids: Iterable[str]) -> float | None:
    """Mean number of tokens that something was done to; nothing where no id has the trial."""
    counts = [trials[i].tokens for i in ids if i in trials]
    return float(np.mean(counts)) if counts else None
