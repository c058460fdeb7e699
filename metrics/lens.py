"""Scores of what visual tokens decode to, and how surely, against where objects are in the picture.

Sources: "Towards Interpreting Visual Information Processing in Vision-Language Models" (arXiv 2410.07149), §4, for the
shares; "Interpreting and Editing Vision-Language Representations to Mitigate Hallucinations" (arXiv 2410.02762) for
confidences and maps.

Legend:
    L    layers
    P    visual tokens of a picture
    K    steps of a value, in ascending order
"""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .bootstrap import Measure

Array = npt.NDArray[Any]
# Values of a whole data set are told apart in at most so many steps.
_STEPS = 1_000


class Segmentation(NamedTuple):
    """How well a map finds an object.

    Attributes:
        iou: Intersection over union with what lies above the mean of the map.
        average_precision: Of its pixels, from the highest value down: needs no threshold.
        baseline: Share of the pixels that are the object's: average precision of a map of chance.
    """

    iou: float
    average_precision: float
    baseline: float


def decoded(top_ids: Array, tokens: Collection[int], inside: Array) -> list[int]:
    """Count the visual tokens of a set that decode to one of some tokens, in each layer.

    Args:
        top_ids: Most probable token of each layer at each visual token [L, P].
        tokens: The tokens.
        inside: The set [P].

    Returns:
        L counts.
    """
    counts: list[int] = np.isin(top_ids[:, inside], list(tokens)).sum(axis=1).tolist()
    return counts


def segmentation(heat: Array, mask: Array) -> Segmentation | None:
    """Compare a map of confidence with the mask of an object, pixel by pixel.

    Args:
        heat: Map [height, width]; not a number where the model sees nothing, which does not count.
        mask: Where the object is [height, width].

    Returns:
        The scores; nothing where the model sees nothing of the object, or nothing else.

    Raises:
        ValueError: The sizes differ.
    """
    if heat.shape != mask.shape:
        raise ValueError(f"a map of {heat.shape} and a mask of {mask.shape} pixels: they must be of one picture")
    seen = np.isfinite(heat)
    values, there = heat[seen].astype(np.float64), mask[seen].astype(bool)
    if there.all() or not there.any():
        return None
    above = values > values.mean()
    iou = (above & there).sum() / (above | there).sum()
    steps = np.unique(values, return_inverse=True)[1]
    count = int(steps.max()) + 1
    hits, misses = (np.bincount(steps[chosen], minlength=count) for chosen in (there, ~there))
    return Segmentation(float(iou), float(_average_precision(np.concatenate([hits, misses]))), float(there.mean()))


def ranking_measures(values: Sequence[Sequence[float]], labels: Sequence[Sequence[bool]]) -> dict[str, Measure]:
    """Return how well values tell what is true from what is not, as measures over samples.

    Values are cut into at most 1,000 steps of equal numbers of values; within a step they count as equal.

    Args:
        values: Values of each of N samples, however many.
        labels: Whether each is of something true.

    Returns:
        "auroc": chance that a true one has a higher value than an untrue one. "average_precision": of the true ones,
        from the highest value down. Neither is a number where all are true, or none.
    """
    everything = np.array([value for of_sample in values for value in of_sample], dtype=np.float64)
    truth = np.array([label for of_sample in labels for label in of_sample], dtype=bool)
    owner = np.repeat(np.arange(len(values)), [len(of_sample) for of_sample in values])
    distinct, steps = np.unique(everything, return_inverse=True)
    if len(distinct) > _STEPS:
        edges = np.unique(np.quantile(everything, np.linspace(0, 1, _STEPS + 1)[1:-1]))
        steps = np.searchsorted(edges, everything, side="right")
    count = int(steps.max(initial=0)) + 1
    statistics = np.zeros((len(values), 2 * count))
    np.add.at(statistics, (owner, steps + np.where(truth, 0, count)), 1)
    return {"auroc": Measure(statistics, _auroc), "average_precision": Measure(statistics, _average_precision)}


def _auroc(counts: Array) -> Array:
    """Counts of true and of untrue ones at each step [..., 2 K] → area under the ROC curve [...]."""
    true, untrue = np.split(counts, 2, axis=-1)
    below = untrue.cumsum(axis=-1) - untrue / 2
    with np.errstate(invalid="ignore"):
        area: Array = (true * below).sum(axis=-1) / (true.sum(axis=-1) * untrue.sum(axis=-1))
    return area


def _average_precision(counts: Array) -> Array:
    """Counts of true and of untrue ones at each step [..., 2 K] → average precision [...]."""
    true, untrue = np.split(counts, 2, axis=-1)
    found = np.flip(np.flip(true, axis=-1).cumsum(axis=-1), axis=-1)
    taken = found + np.flip(np.flip(untrue, axis=-1).cumsum(axis=-1), axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.where(taken > 0, found / taken, 0.0)
        average: Array = (true * precision).sum(axis=-1) / true.sum(axis=-1)
    return np.where(untrue.sum(axis=-1) > 0, average, np.nan)
