"""The report's shift over a training, made from `trajectory.json`; no files and no HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..callbacks.parts.shift_figures import most_moving
from ..lightning_modules.backbone.destinations import step_of
from .report_files import ANY, COUNT, NUMBER, PAIR, TEXT, Shape
from .report_shift import PICTURES, Value, Word, facts, marked, shown
from .report_values import Json, Picture, Pictures, as_number, fixed, get, interval

_STEPS = 8  # checkpoints whose words are shown
_MEANS = (
    ("Magnitude", 3, "magnitude"),
    ("Consistency", 3, "consistency"),
    ("Alignment with the last", 3, "aligned"),
    ("Cosine to the match", 3, "cosine_shifted"),
    ("Recovery, %", 1, "recovery_shifted"),
)
_MEASURES: dict[str, Shape] = dict.fromkeys((key for _, _, key in _MEANS), NUMBER)
_ROW: Shape = {"concept!": COUNT, "samples": COUNT, **_MEASURES, "words_shifted": [TEXT], "intervals": {ANY: PAIR}}
TRAJECTORY: Shape = {
    **dict.fromkeys(("method", "site", "selector", "average", "matching"), TEXT),
    **dict.fromkeys(("alpha", "pairs", "level"), NUMBER),
    "empty_concepts": [COUNT],
    "words_original": [[TEXT]],
    "words_destination": [[TEXT]],
    "matched": [COUNT],
    "images_original": [PICTURES],
    "images_destination": [PICTURES],
    "figures": {ANY: TEXT},
    "start": {"means": _MEASURES, "concepts": [_ROW]},
    "points": [
        {
            "variant": TEXT,
            "step!": COUNT,
            "means": _MEASURES,
            "intervals": {ANY: PAIR},
            "concepts!": [_ROW],
        }
    ],
}


@dataclass(frozen=True)
class Moving:
    """One concept over a training.

    Attributes:
        number: Which.
        matched: Its counterpart at the end.
        words: Name of a state, its words, and its recovery (percent) and magnitude; the original first, the fine-tuned
            counterpart last.
        pictures: Of the original and of its counterpart.
    """

    number: int
    matched: str
    words: list[tuple[str, list[Word], Value | None, Value | None]]
    pictures: dict[str, list[Picture]]


def trajectory_view(trajectory: Json, pictures: Pictures) -> Json:
    """The means at each checkpoint, and the words of the concepts that move most.

    Args:
        trajectory: A `trajectory.json` of shape `TRAJECTORY`.
        pictures: Reads a picture.
    """
    points = trajectory["points"]
    steps, start = _some(points), trajectory.get("start")
    named = [(_name(point), point) for point in points]
    if start:
        named.insert(0, ("original", start))
    return {
        "facts": facts(trajectory),
        "level": fixed(100 * (as_number(trajectory.get("level")) or 0.95), 0),
        "columns": [name for name, _, _ in _MEANS],
        "means": [(name, [_mean(point, key, digits) for _, digits, key in _MEANS]) for name, point in named],
        "concepts": [_moving(trajectory, steps, concept, pictures) for concept in most_moving(points)],
        "left_out": len(points) - len(steps),
    }


def _some(points: Sequence[Json]) -> list[Json]:
    """The first, the last, and some at equal distances between them."""
    last, count = len(points) - 1, min(len(points), _STEPS)
    return [points[round(number * last / max(1, count - 1))] for number in range(count)]


def _name(point: Json) -> str:
    variant = point.get("variant")
    if variant is not None and step_of(variant) is None:
        return str(variant)
    return f"step {fixed(point['step'], 0)}"


def _mean(point: Json, key: str, digits: int) -> Value:
    return Value(fixed(get(point, "means", key), digits), interval(get(point, "intervals", key), digits))


def _measured(point: Json, concept: int) -> tuple[Json, Value, Value]:
    """A concept at a checkpoint: what is known of it, its recovery, and its magnitude."""
    row: Json = next((row for row in point.get("concepts") or () if row["concept"] == concept), {})
    recovery, magnitude = (
        Value(fixed(row.get(key), digits), interval(get(row, "intervals", key), digits))
        for key, digits in (("recovery_shifted", 0), ("magnitude", 2))
    )
    return row, recovery, magnitude


def _moving(trajectory: Json, steps: Sequence[Json], concept: int, pictures: Pictures) -> Moving:
    def of(key: str) -> Any:
        values = trajectory.get(key) or []
        return values[concept] if concept < len(values) else None

    original, destination = of("words_original") or [], of("words_destination") or []
    start = trajectory.get("start")
    _, recovery, magnitude = _measured(start, concept) if start else (None, None, None)
    rows = [("original", marked(original, original, destination), recovery, magnitude)]
    last: list[str] = []
    for point in steps:
        row, recovery, magnitude = _measured(point, concept)
        last = row.get("words_shifted") or []
        rows.append((_name(point), marked(last, original, destination), recovery, magnitude))
    rows.append(("fine-tuned", marked(destination, original, last), None, None))
    return Moving(
        number=concept,
        matched=fixed(of("matched"), 0),
        words=rows,
        pictures={name: shown(of(f"images_{name}"), pictures) for name in ("original", "destination")},
    )
