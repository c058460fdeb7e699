"""Scores of the logit lens at the visual tokens of pictures whose objects are known.

Notation: L layers, P visual tokens of one picture, W tokens whose probability is known everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ...datamodules.sample import Sample
from ...lightning_modules.backbone.heat_map import heat_map
from ...lightning_modules.backbone.patch_grid import PatchGrid
from ...lightning_modules.backbone.visual_sets import coverage
from ...metrics import Measure, bootstrap, chair_measures, decoded, ranking_measures, segmentation
from ...metrics.bootstrap import Scored, ratio
from .class_tokens import ClassTokens
from .trials import Place

Row = dict[str, Any]

# A patch of which an object covers at least so much is the object's.
_COVERED = 0.5
_KINDS = ("strict", "lenient", "any", "background")
_SEGMENTATION = ("iou", "average_precision", "baseline")
NO_PATCH = "no patch is covered by it to at least half"
NO_TOKEN = "no token of the model begins its name alone"


def left_out(name: str, place: Place, tokens: Mapping[str, ClassTokens]) -> str:
    """Why an object cannot be scored; empty where it can."""
    if not tokens[name].strict:
        return NO_TOKEN
    return "" if bool((coverage(place.grid, place.mask) >= _COVERED).any()) else NO_PATCH


def score_picture(
    outside: Tensor,
    places: Mapping[str, Place],
    tokens: Mapping[str, ClassTokens],
    asked: Sequence[int],
    top_ids: Tensor,
    probabilities: Tensor,
) -> Row:
    """Score what one variant makes of one picture.

    Args:
        outside: Patches that no object of the picture touches [P].
        places: Class → where its objects are, for the objects that can be scored.
        tokens: The tokens of every class.
        asked: Ids of the W tokens.
        top_ids: Most probable token [L, P].
        probabilities: Of the W tokens, the largest over layers [P, W].

    Returns:
        "objects": class → "patches", "strict" and "lenient" (L counts), "background" (L counts of patches outside of
        all objects that say it), and `Segmentation` where there is one; "outside": number of patches there;
        "confidence": class → largest probability of its strict tokens over layers and visual tokens.
    """
    top = top_ids.numpy()
    column = {token: number for number, token in enumerate(asked)}
    of_class = {
        name: probabilities[:, [column[token] for token in sorted(one.strict)]].amax(dim=1)
        for name, one in tokens.items()
        if one.strict
    }
    objects = {}
    for name, place in places.items():
        inside = (coverage(place.grid, place.mask) >= _COVERED).numpy()
        height, width = place.mask.shape
        heat = heat_map(of_class[name][None], place.grid, (width, height))[0]
        found = segmentation(heat.numpy(), place.mask)
        objects[name] = {
            "patches": int(inside.sum()),
            "strict": decoded(top, tokens[name].strict, inside),
            "lenient": decoded(top, tokens[name].lenient, inside),
            "background": decoded(top, tokens[name].strict, outside.numpy()),
            "segmentation": None if found is None else list(found),
        }
    return {
        "objects": objects,
        "outside": int(outside.sum()),
        "confidence": {name: float(values.max()) for name, values in of_class.items()},
    }


def background(sample: Sample, grid: PatchGrid) -> Tensor:
    """The patches that no object of a picture touches [P]."""
    everything = np.logical_or.reduce([one.mask() for one in sample.instances])
    return (coverage(grid, everything) == 0) & (grid.tile >= 0)


def summarize_lens(rows: Mapping[str, Row], variant: str, layers: Sequence[str]) -> Row:
    """The scores of one variant over all pictures, with bootstrap intervals over pictures.

    Args:
        rows: Id of a picture's sample → "there" (classes in the picture), and "variants": variant → what
            `score_picture` found, with "named" (classes that its caption names; nothing where it has not written one).
        variant: The variant.
        layers: Names of the L layers.

    Raises:
        ValueError: No object could be scored.
    """
    there = {i: set(rows[i]["there"]) for i in sorted(rows)}
    of_variant = {i: rows[i]["variants"][variant] for i in there}
    objects = [list(found["objects"].values()) for found in of_variant.values()]
    named = {i: found["named"] for i, found in of_variant.items() if found["named"] is not None}
    confidence = [found["confidence"] for found in of_variant.values()]
    present = ranking_measures(
        [list(of_picture.values()) for of_picture in confidence],
        [[name in there[i] for name in of_picture] for i, of_picture in zip(there, confidence, strict=True)],
    )
    told = {i: [name for name in named.get(i, ()) if name in of_variant[i]["confidence"]] for i in there}
    right = ranking_measures(
        [[of_variant[i]["confidence"][name] for name in names] for i, names in told.items()],
        [[name in there[i] for name in names] for i, names in told.items()],
    )
    measures = {
        **_share_measures(objects, [found["outside"] for found in of_variant.values()], len(layers)),
        **{f"presence/{name}": measure for name, measure in present.items()},
        **{f"confidence/{name}": measure for name, measure in right.items()},
    }
    scored = bootstrap(measures)
    chair = bootstrap(chair_measures(named, {i: there[i] for i in named})) if named else {}
    shares = {kind: [_told(scored[f"{kind}/{layer}"], "share") for layer in range(len(layers))] for kind in _KINDS}
    best = max(range(len(layers)), key=lambda layer: shares["strict"][layer]["share"])
    is_there = [name in there[i] for i, names in told.items() for name in names]
    classes = [name in there[i] for i, found in of_variant.items() for name in found["confidence"]]
    return {
        "pictures": len(rows),
        "objects": sum(map(len, objects)),
        **shares,
        "best": {"layer": layers[best], **shares["strict"][best]},
        "peak_layer": _told(scored["peak"], "layer"),
        "segmentation": {name: _told(scored[name], "mean") for name in _SEGMENTATION},
        "confidence": None
        if not named
        else {
            **{name: _told(scored[f"confidence/{name}"], "value") for name in right},
            "named": len(is_there),
            "hallucinated": len(is_there) - sum(is_there),
        },
        "presence": {
            **{name: _told(scored[f"presence/{name}"], "value") for name in present},
            "present": sum(classes),
            "absent": len(classes) - sum(classes),
        },
        "chair": {name: _told(one, "value") for name, one in chair.items()} or None,
    }


def object_rows(rows: Mapping[str, Row], pictures: Mapping[str, Mapping[str, Sample]]) -> list[Row]:
    """A row for each variant and object, for a table.

    Args:
        rows: As for `summarize_lens`.
        pictures: Id of a picture's sample → class → a sample of it.
    """
    return [
        {
            "variant": variant,
            "sample_id": pictures[i][name].sample_id,
            "image": str(pictures[i][name].image),
            "object": name,
            "patches": one["patches"],
            "strict": one["strict"],
            "lenient": one["lenient"],
            "confidence": found["confidence"][name],
            **dict(zip(_SEGMENTATION, one["segmentation"] or [None] * len(_SEGMENTATION), strict=True)),
        }
        for i, row in rows.items()
        for variant, found in row["variants"].items()
        for name, one in found["objects"].items()
    ]


def _share_measures(objects: Sequence[Sequence[Row]], outside: Sequence[int], layers: int) -> dict[str, Measure]:
    """What is averaged over objects, each as a measure over pictures."""
    values = [[_values(one, around, layers) for one in found] for found, around in zip(objects, outside, strict=True)]
    names = next(of_picture[0] for of_picture in values if of_picture)
    measures = {}
    for name in names:
        known = [[one[name] for one in of_picture if one[name] is not None] for of_picture in values]
        measures[name] = Measure(np.array([[sum(found), len(found)] for found in known], dtype=np.float64), ratio)
    return measures


def _values(one: Row, outside: int, layers: int) -> Row:
    """What is averaged of one object; nothing where it does not count."""
    patches = {"strict": one["patches"], "lenient": one["patches"], "background": outside}
    return {
        **{
            f"{kind}/{layer}": one[kind][layer] / count if count else None
            for kind, count in patches.items()
            for layer in range(layers)
        },
        **{f"any/{layer}": float(one["strict"][layer] > 0) for layer in range(layers)},
        **dict(zip(_SEGMENTATION, one["segmentation"] or [None] * len(_SEGMENTATION), strict=True)),
        "peak": int(np.argmax(one["strict"])) if any(one["strict"]) else None,
    }


def _told(scored: Scored, name: str) -> Row:
    """A score with its interval, as JSON can have it."""
    if math.isnan(scored.score):
        return {name: None, "interval": None}
    return {name: scored.score, "interval": list(scored.interval())}
