"""The report's look inside pictures: logit lens, ablation, knockout, from their result files; no files and no HTML."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .report_files import ANY, COUNT, NUMBER, PAIR, TEXT, Shape
from .report_values import VARIANT_NAMES, Json, chance, fixed, get, interval, scaled

_KINDS = ("strict", "lenient", "any", "background")
_SHARE: dict[str, Any] = {"interval": PAIR}
_VALUE: dict[str, Any] = {"value": NUMBER, **_SHARE}
_LAYERS: list[Any] = [{"share": NUMBER, **_SHARE}]
LENS: Shape = {
    "model_id!": TEXT,
    "layers!": [TEXT],
    "variants!": {
        ANY: {
            **dict.fromkeys(("pictures!", "objects!"), COUNT),
            **dict.fromkeys((f"{kind}!" for kind in _KINDS), _LAYERS),
            "best!": {"layer!": TEXT, "share": NUMBER, **_SHARE},
            "peak_layer": {"layer": NUMBER, **_SHARE},
            "segmentation": {ANY: {"mean": NUMBER, **_SHARE}},
            "confidence": {
                **dict.fromkeys(("auroc", "average_precision"), _VALUE),
                "named": COUNT,
                "hallucinated": COUNT,
            },
            "presence": {**dict.fromkeys(("auroc", "average_precision"), _VALUE), "present": COUNT, "absent": COUNT},
            "chair": {ANY: _VALUE},
        }
    },
    "published": {"source!": TEXT, **dict.fromkeys(("share", "layer", "layers"), NUMBER)},
    "left_out": {ANY: TEXT},
    "skipped": {ANY: TEXT},
}
_SETTINGS: Shape = {ANY: {"samples!": COUNT, "right!": COUNT, "visual_tokens": NUMBER, "kept": COUNT}}
_CONTROL: dict[str, Any] = {"became_wrong": NUMBER, "interval": PAIR}
ABLATION: Shape = {
    "model_id!": TEXT,
    "reference": TEXT,
    "variants!": {
        ANY: {
            "settings!": _SETTINGS,
            "rows!": [
                {
                    **dict.fromkeys(("setting!", "set!"), TEXT),
                    "tokens": NUMBER,
                    "samples!": COUNT,
                    **_CONTROL,
                    "control": _CONTROL,
                    "difference": {"value!": NUMBER, "interval": PAIR, "p!": NUMBER},
                    "all": {"samples!": COUNT, **_CONTROL},
                    "without": COUNT,
                }
            ],
            "project_away": [
                {
                    **dict.fromkeys(("setting!", "direction!"), TEXT),
                    "samples!": COUNT,
                    **_CONTROL,
                    "difference": {"value!": NUMBER, "interval": PAIR, "p!": NUMBER},
                    "objects_kept": {"value": NUMBER, **_SHARE},
                    "words_kept": {"value": NUMBER, **_SHARE},
                }
            ],
        }
    },
    "published": {"source!": TEXT, "became_wrong!": {ANY: {ANY: NUMBER}}},
    "left_out": {ANY: TEXT},
    "skipped": {ANY: TEXT},
}
KNOCKOUT: Shape = {
    "model_id!": TEXT,
    "variants!": {
        ANY: {
            "settings!": _SETTINGS,
            "rows!": [
                {
                    **dict.fromkeys(("setting!", "knockout!", "sources!", "targets!", "window!"), TEXT),
                    "blocks!": [NUMBER],
                    "source_tokens": NUMBER,
                    "samples!": COUNT,
                    "relative_accuracy": NUMBER,
                    "interval": PAIR,
                    "without": COUNT,
                }
            ],
        }
    },
    "published": {"source!": TEXT, "relative_accuracy!": {ANY: NUMBER}},
    "left_out": {ANY: TEXT},
    "skipped": {ANY: TEXT},
}


def inspection_fault(content: Json) -> str:
    """What a file of its shape still lacks; empty if nothing."""
    for variant, found in content["variants"].items():
        for kind in _KINDS if "layers" in content else ():
            if len(found[kind]) != len(content["layers"]):
                return f"{kind!r} of {variant!r} has {len(found[kind])} values for {len(content['layers'])} layers"
        for row in found.get("rows", ()):
            if not row.get("blocks", [0]):
                return f"'blocks' of {row['knockout']!r} are none"
    return ""


@dataclass(frozen=True)
class Inspected:
    """A result file of one of the callbacks that look inside pictures.

    Attributes:
        kind: `lens`, `ablation` or `knockout`.
        name: Its folder, below the run's.
        content: The file, of the kind's shape.
        figures: Name → figure as a data URI.
    """

    kind: str
    name: str
    content: Json
    figures: Mapping[str, str | None] = field(default_factory=dict)


def inspection_view(inspected: list[Inspected]) -> list[Json]:
    """What each result file says.

    Args:
        inspected: The files.
    """
    views = {"lens": _lens, "ablation": _ablation, "knockout": _knockout}
    return [
        {
            "kind": one.kind,
            "name": one.name,
            "figures": one.figures,
            "facts": [("Model", one.content["model_id"]), *_FACTS[one.kind](one.content)],
            "source": get(one.content, "published", "source"),
            "left_out": {**(one.content.get("left_out") or {}), **(one.content.get("skipped") or {})},
            **views[one.kind](one.content),
        }
        for one in inspected
    ]


def _asked(content: Json) -> list[tuple[str, str]]:
    """What was asked, and how much of it was right."""
    facts = []
    for variant, found in content["variants"].items():
        for setting, counts in found["settings"].items():
            right = f"{counts['right']:,} of {counts['samples']:,} right"
            kept = counts.get("kept")
            seen = "" if kept is None else f", {kept:,} not with noise"
            facts.append((f"{_variant(variant, content)}{setting}", right + seen))
    return facts


def _variant(name: str, content: Json) -> str:
    """The name of a variant, in front of something; empty where there is only one."""
    return f"{VARIANT_NAMES.get(name, name)}, " if len(content["variants"]) > 1 else ""


def _settings(found: Json) -> list[str]:
    return list(dict.fromkeys(row["setting"] for row in found["rows"]))


def _cell(row: Json | None, key: str, factor: float, digits: int) -> Json | None:
    """A value with its interval, as text."""
    if row is None or row.get(key) is None:
        return None
    bounds = scaled(row.get("interval"), factor)
    return {"text": fixed(factor * row[key], digits), "interval": interval(bounds, digits)}


# --- logit lens ---------------------------------------------------------------------------------------------


def _pictures(content: Json) -> list[tuple[str, str]]:
    """How much was read."""
    found = next(iter(content["variants"].values()))
    return [("Pictures", f"{found['pictures']:,}"), ("Objects", f"{found['objects']:,}")]


def _lens(content: Json) -> Json:
    return {
        "tables": [
            {
                "variant": VARIANT_NAMES.get(variant, variant),
                "rows": [
                    {
                        "layer": layer,
                        "best": layer == found["best"]["layer"],
                        "cells": [_cell(found[kind][number], "share", 100, 1) for kind in _KINDS],
                    }
                    for number, layer in enumerate(content["layers"])
                ],
                "measures": _lens_measures(found, len(content["layers"])),
            }
            for variant, found in content["variants"].items()
        ],
        "published": content.get("published") or {},
    }


def _lens_measures(found: Json, layers: int) -> list[tuple[str, Json | None, str]]:
    """Everything that is not of one layer: what, how much, and of what."""
    told, there, chair = (found.get(name) or {} for name in ("confidence", "presence", "chair"))
    segmentation = found.get("segmentation") or {}
    hallucinated = f"{told.get('hallucinated', 0):,} of {told.get('named', 0):,} objects that captions name"
    measures = [
        (
            "layer at which most patches say their object",
            _cell(found.get("peak_layer"), "layer", 1, 2),
            f"of 0 to {layers - 1}",
        ),
        ("IoU of the map of confidence, %", _cell(segmentation.get("iou"), "mean", 100, 1), "pixels above its mean"),
        (
            "its average precision, %",
            _cell(segmentation.get("average_precision"), "mean", 100, 1),
            f"by chance {fixed(scaled(get(segmentation, 'baseline', 'mean'), 100), 1)}",
        ),
        (
            "classes that are there told from others, AUROC",
            _cell(there.get("auroc"), "value", 1, 3),
            f"{there.get('present', 0):,} and {there.get('absent', 0):,}",
        ),
        (
            "objects in captions told from hallucinated ones, AUROC",
            _cell(told.get("auroc"), "value", 1, 3),
            hallucinated,
        ),
        ("CHAIR, share of captions with a hallucinated object, %", _cell(chair.get("chair_s"), "value", 100, 1), ""),
        ("CHAIR, share of named objects that are hallucinated, %", _cell(chair.get("chair_i"), "value", 100, 1), ""),
    ]
    return [measure for measure in measures if measure[1] is not None]


# --- ablation -----------------------------------------------------------------------------------------------


def _ablation(content: Json) -> Json:
    return {
        "tables": [
            {
                "variant": VARIANT_NAMES.get(variant, variant),
                "settings": _settings(found),
                "rows": [_set_row(found, name) for name in dict.fromkeys(row["set"] for row in found["rows"])],
                "away": _away(found),
                "published": [
                    {"set": name, "cells": [fixed(scaled(shares.get(one), 100), 1) for one in _settings(found)]}
                    for name, shares in (get(content, "published", "became_wrong") or {}).items()
                ],
            }
            for variant, found in content["variants"].items()
        ]
    }


def _set_row(found: Json, name: str) -> Json:
    """A set of tokens in every setting, beside as many random ones."""
    rows = {row["setting"]: row for row in found["rows"] if row["set"] == name}
    tokens = [row["tokens"] for row in rows.values() if row.get("tokens") is not None]
    return {
        "set": name,
        "tokens": fixed(sum(tokens) / len(tokens), 1) if tokens else "–",
        "without": max((row.get("without") or 0) for row in rows.values()),
        "cells": [_set_cell(rows.get(setting)) for setting in _settings(found)],
    }


def _set_cell(row: Json | None) -> Json:
    """What a set makes wrong, what its control does, and whether that differs."""
    p = get(row, "difference", "p")
    return {
        "own": _cell(row, "became_wrong", 100, 1),
        "control": _cell(get(row, "control"), "became_wrong", 100, 1),
        "more": bool(p is not None and p <= 0.05 and get(row, "difference", "value") > 0),
    }


def _away(found: Json) -> list[Json]:
    """What projecting a direction away takes from descriptions and answers, and what it leaves."""
    return [
        {
            "setting": row["setting"],
            "direction": row["direction"],
            "samples": row["samples"],
            "lost": _cell(row, "became_wrong", 100, 1),
            "p": None if get(row, "difference") is None else chance(row["difference"]["p"]),
            "objects": _cell(row.get("objects_kept"), "value", 100, 1),
            "words": _cell(row.get("words_kept"), "value", 100, 1),
        }
        for row in found.get("project_away") or []
    ]


# --- knockout -----------------------------------------------------------------------------------------------


def _knockout(content: Json) -> Json:
    return {
        "tables": [
            {
                "variant": VARIANT_NAMES.get(variant, variant),
                "setting": setting,
                **_windows(
                    [row for row in found["rows"] if row["setting"] == setting],
                    get(content, "published", "relative_accuracy") or {},
                ),
            }
            for variant, found in content["variants"].items()
            for setting in _settings(found)
        ]
    }


def _windows(rows: list[Json], published: Json) -> Json:
    """Relative accuracy of every pair of sets by windows of blocks."""
    windows = list(dict.fromkeys(row["window"] for row in rows))
    by_pair: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        by_pair.setdefault((row["sources"], row["targets"]), {})[row["window"]] = row
    return {
        "windows": [
            (window, _span(next(row["blocks"] for row in rows if row["window"] == window))) for window in windows
        ],
        "rows": [
            {
                "pair": f"{sources} → {targets}",
                "tokens": fixed(next(iter(cells.values())).get("source_tokens"), 1),
                "cells": [
                    {
                        "own": _cell(cells.get(window), "relative_accuracy", 1, 2),
                        "published": _published(published, sources, targets, window),
                    }
                    for window in windows
                ],
            }
            for (sources, targets), cells in by_pair.items()
        ],
    }


def _published(published: Json, sources: str, targets: str, window: str) -> str:
    value = published.get(f"{sources} -> {targets} @ {window}")
    return "" if value is None else fixed(value, 2)


def _span(blocks: list[float]) -> str:
    return f"{blocks[0]:g}–{blocks[-1]:g}" if len(blocks) > 1 else f"{blocks[0]:g}"


_FACTS: dict[str, Callable[[Json], list[tuple[str, str]]]] = {"lens": _pictures, "ablation": _asked, "knockout": _asked}
SHAPES = {"lens": LENS, "ablation": ABLATION, "knockout": KNOCKOUT}
"""The shape of each kind's file, `<kind>.json`."""
