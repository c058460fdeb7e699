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
    "points": [
        {
            "variant": TEXT,
            "step!": COUNT,
            "means": _MEASURES,
            "intervals": {ANY: PAIR},
            "concepts!": [{"concept!": COUNT, "samples": COUNT, **_MEASURES, "words_shifted": [TEXT]}],
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
    words: list[tuple[str, list[Word], str, str]]
    pictures: dict[str, list[Picture]]


def trajectory_view(trajectory: Json, pictures: Pictures) -> Json:
    """The means at each checkpoint, and the words of the concepts that move most.

    Args:
        trajectory: A `trajectory.json` of shape `TRAJECTORY`.
        pictures: Reads a picture.
    """
    points = trajectory["points"]
    steps = _some(points)
    return {
        "facts": facts(trajectory),
        "level": fixed(100 * (as_number(trajectory.get("level")) or 0.95), 0),
        "columns": [name for name, _, _ in _MEANS],
        "means": [(_name(point), [_value(point, key, digits) for _, digits, key in _MEANS]) for point in points],
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


def _value(point: Json, key: str, digits: int) -> Value:
    return Value(fixed(get(point, "means", key), digits), interval(get(point, "intervals", key), digits))


def _moving(trajectory: Json, steps: Sequence[Json], concept: int, pictures: Pictures) -> Moving:
    def of(key: str) -> Any:
        values = trajectory.get(key) or []
        return values[concept] if concept < len(values) else None

    original, destination = of("words_original") or [], of("words_destination") or []
    rows = [("original", marked(original, original, destination), "", "")]
    last: list[str] = []
    for point in steps:
        row: Json = next((row for row in point["concepts"] if row["concept"] == concept), {})
        last = row.get("words_shifted") or []
        recovery, magnitude = fixed(row.get("recovery_shifted"), 0), fixed(row.get("magnitude"), 2)
        rows.append((_name(point), marked(last, original, destination), recovery, magnitude))
    rows.append(("fine-tuned", marked(destination, original, last), "", ""))
    return Moving(
        number=concept,
        matched=fixed(of("matched"), 0),
        words=rows,
        pictures={name: shown(of(f"images_{name}"), pictures) for name in ("original", "destination")},
    )
