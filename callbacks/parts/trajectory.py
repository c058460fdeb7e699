"""How concepts shift over the checkpoints of one run, all towards those of the last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn.functional import cosine_similarity

from ...concepts import ShiftSignificance
from ...datamodules.stored_features import FeatureStore
from ...lightning_modules.backbone.destinations import ORIGINAL, step_of
from ...metrics import bootstrap_interval
from .shift_measure import LEVEL, Moved, ShiftMeasure

_INTERVALS = ("magnitude", "consistency", "cosine_shifted")


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


def trajectory(measure: ShiftMeasure, checkpoints: Mapping[str, Moved]) -> dict[str, Any]:
    """What is reported of a series.

    Args:
        measure: How shifts are measured.
        checkpoints: Name → the original's concepts shifted to this checkpoint and compared with the last one's.
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
        "points": [
            point(name, place, moved, last, measure.tested(moved, words=False))
            for place, (name, moved) in enumerate(checkpoints.items(), start=1)
        ],
    }


def point(
    variant: str, place: int, moved: Moved, last: Moved, significance: ShiftSignificance | None = None
) -> dict[str, Any]:
    """What is reported of one checkpoint.

    Args:
        variant: Its name, which may say its training step.
        place: Its place in the series, the step where the name says none.
        moved: The original's concepts shifted to it.
        last: The same for the last one; `aligned` is the cosine of both shifts.
        significance: Intervals and tests; without them it is a quick look.
    """
    step = step_of(variant)
    values = {
        "magnitude": moved.shift.magnitude,
        "consistency": moved.shift.consistency,
        "aligned": cosine_similarity(moved.shift.vectors, last.shift.vectors),
        "cosine_shifted": moved.found.cosine_shifted,
        "recovery_shifted": moved.found.recovery_shifted,
    }
    kept = ~moved.shift.empty
    of_kept = {name: value[kept].tolist() for name, value in values.items()}
    return {
        "variant": variant,
        "step": place if step is None else step,
        "pairs": len(moved.assignment),
        "means": {name: sum(of) / len(of) for name, of in of_kept.items()},
        "intervals": {}
        if significance is None
        else {name: list(bootstrap_interval(of)) for name, of in of_kept.items()},
        "concepts": [_row(moved, k, values, significance) for k in range(len(kept))],
    }


def _row(moved: Moved, k: int, values: Mapping[str, Tensor], significance: ShiftSignificance | None) -> dict[str, Any]:
    empty = bool(moved.shift.empty[k])
    row = {
        "concept": k,
        "samples": int(moved.shift.counts[k]),
        "words_shifted": [] if empty else moved.words.shifted[k],
        **{name: None if empty else float(value[k]) for name, value in values.items()},
    }
    if significance is None:
        return row
    return {
        **row,
        "intervals": {} if empty else {name: significance.intervals[name][k].tolist() for name in _INTERVALS},
        "p_adjusted": {} if empty else {"magnitude": float(significance.adjusted()["magnitude"][k])},
    }
