"""How concepts shift over the checkpoints of one run, all towards those of the last."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ...concepts import ShiftSignificance
from ...datamodules.stored_features import FeatureStore
from ...lightning_modules.backbone.destinations import ORIGINAL, step_of
from .shift_measure import LEVEL, Moved, ShiftMeasure, mean_interval

_INTERVALS = ("magnitude", "consistency", "cosine_shifted", "recovery_shifted")


def checkpoints_of(store: FeatureStore) -> list[str]:
    """The destinations of a store, in the order of training.

    Raises:
        ValueError: One of several has not seen all the samples that the original has.
    """
    names = [variant for variant in store.metadata["variants"] if variant != ORIGINAL]
    expected = set(store.samples(ORIGINAL)) if len(names) > 1 else set()
    for name in names:
        if missing := sorted(expected - set(store.samples(name))):
            raise ValueError(
                f"{store.folder}: {name} lacks {len(missing)} of {len(expected)} samples, {missing[0]!r} first; "
                "extract again, because a series with gaps gives no trajectory"
            )
    return names


def trajectory(measure: ShiftMeasure, checkpoints: Mapping[str, Moved], of_last: ShiftSignificance) -> dict[str, Any]:
    """What is reported of a series.

    Args:
        measure: How shifts are measured.
        checkpoints: Name → the original's concepts shifted to this checkpoint and compared with the last one's.
        of_last: Intervals and tests of the last one, those of words among them.
    """
    last = list(checkpoints.values())[-1]
    matched = last.found.matching.tolist()
    return {
        "alpha": measure.options.alpha,
        "average": measure.options.average,
        "matching": measure.options.matching,
        "pairs": len(last.assignment),
        "level": LEVEL,
        "empty_concepts": last.shift.empty.nonzero().flatten().tolist(),
        "words_original": list(last.words.original),
        "words_destination": [last.words.destination[m] for m in matched],
        "matched": matched,
        "images_original": last.pictures.original,
        "images_destination": [last.pictures.destination[m] for m in matched],
        "start": _start(last),
        "points": [
            point(name, place, moved, last, measure, of_last if moved is last else None)
            for place, (name, moved) in enumerate(checkpoints.items(), start=1)
        ],
    }


def _start(last: Moved) -> dict[str, Any]:
    """What is known before the first step: nothing has moved, so that it has no direction and no consistency."""
    values = {
        "magnitude": torch.zeros_like(last.shift.magnitude),
        "cosine_shifted": last.found.cosine_original,
        "recovery_shifted": last.found.recovery_original,
    }
    values = _defined(last, values)
    rows = [{"concept": k, "samples": count, **_row(values, k)} for k, count in enumerate(last.shift.counts.tolist())]
    return {"means": {name: float(of.mean()) for name, of in _kept(values).items()}, "concepts": rows}


def point(
    variant: str,
    place: int,
    moved: Moved,
    last: Moved,
    measure: ShiftMeasure | None = None,
    significance: ShiftSignificance | None = None,
) -> dict[str, Any]:
    """What is reported of one checkpoint.

    Args:
        variant: Its name, which may say its training step.
        place: Its place in the series, the step where the name says none.
        moved: The original's concepts shifted to it.
        last: The same for the last one; `aligned` is the cosine of both shifts.
        measure: Gives intervals and tests; without it, it is a quick look.
        significance: These, where they are known.
    """
    step = step_of(variant)
    values = {
        "magnitude": moved.shift.magnitude,
        # One sample always agrees with itself.
        "consistency": moved.shift.consistency.masked_fill(moved.shift.counts == 1, math.nan),
        "aligned": cosine_similarity(moved.shift.vectors, last.shift.vectors),
        "cosine_shifted": moved.found.cosine_shifted,
        "recovery_shifted": moved.found.recovery_shifted,
    }
    values = _defined(moved, values)
    of_kept = _kept(values)
    if significance is None and measure is not None:
        significance = _tested(measure, moved)
    return {
        "variant": variant,
        "step": place if step is None else step,
        "pairs": len(moved.assignment),
        "means": {name: float(of.mean()) for name, of in of_kept.items()},
        "intervals": {}
        if measure is None
        else {name: mean_interval(of, measure.options) for name, of in of_kept.items()},
        "concepts": [_concept(moved, k, values, significance) for k in range(len(moved.shift.counts))],
    }


def _tested(measure: ShiftMeasure, moved: Moved) -> ShiftSignificance:
    found = measure.tested(moved, words=False)
    found.intervals["recovery_shifted"] = measure.recovered_interval(moved)
    return found


def _defined(moved: Moved, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """NaN for empty concepts, whose measures are none."""
    return {name: value.cpu().double().masked_fill(moved.shift.empty.cpu(), math.nan) for name, value in values.items()}


def _kept(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of each measure its values, if any concept has one."""
    of_kept = {name: value[~value.isnan()] for name, value in values.items()}
    return {name: of for name, of in of_kept.items() if len(of)}


def _row(values: Mapping[str, Tensor], k: int) -> dict[str, float | None]:
    return {name: None if value[k].isnan() else float(value[k]) for name, value in values.items()}


def _concept(
    moved: Moved, k: int, values: Mapping[str, Tensor], significance: ShiftSignificance | None
) -> dict[str, Any]:
    count = int(moved.shift.counts[k])
    row = {
        "concept": k,
        "samples": count,
        "words_shifted": moved.words.shifted[k] if count else [],
        **_row(values, k),
    }
    if significance is None:
        return row
    tested = not significance.untested[k]
    return {
        **row,
        "intervals": {name: significance.intervals[name][k].tolist() for name in _INTERVALS} if count > 1 else {},
        "p_adjusted": {"magnitude": float(significance.adjusted()["magnitude"][k])} if tested else {},
    }
