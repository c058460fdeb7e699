"""The report's concepts before and after, made from `shift.json`; no files and no HTML."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .report_values import Json, Picture, Pictures, as_number, difference


@dataclass(frozen=True)
class Word:
    """A grounding word; `mark` is `shared` or `new` (recovered by the shift), or empty."""

    text: str
    mark: str


@dataclass(frozen=True)
class Concept:
    """One concept: as it was, shifted, and its fine-tuned counterpart."""

    number: int
    matched: int | None
    samples: int
    words: dict[str, list[Word]]
    pictures: dict[str, list[Picture]]
    before: float | None
    after: float | None
    gain: float | None
    consistency: float | None
    magnitude: float | None


def shift_view(method: str, shift: Json, pictures: Pictures) -> Json:
    """The concepts of one dictionary by how much their recovery rises; those without a sample come last."""
    empty = set(shift.get("empty_concepts") or [])
    concepts = [_concept(row, row.get("concept") in empty, pictures) for row in shift["concepts"]]
    none_last = -math.inf
    concepts.sort(key=lambda c: (not c.samples, -(none_last if c.gain is None else c.gain), c.number))
    return {"method": method, "shift": shift, "concepts": concepts}


def _concept(row: Json, empty: bool, pictures: Pictures) -> Concept:
    samples = 0 if empty else int(row.get("samples") or 0)
    original, shifted, destination = (
        [str(word) for word in row.get(f"words_{name}") or []] for name in ("original", "shifted", "destination")
    )
    before, after = as_number(row.get("recovery_original")), as_number(row.get("recovery_shifted"))
    return Concept(
        number=int(row.get("concept", 0)),
        matched=row.get("matched"),
        samples=samples,
        words={
            "original": _marked(original, original, destination if samples else ()),
            "shifted": _marked(shifted, original, destination),
            "destination": _marked(destination, original, shifted),
        },
        pictures={
            name: [
                pictures(picture.get("image"), str(picture.get("text") or ""))
                for picture in row.get(f"images_{name}") or []
            ]
            for name in ("original", "destination")
        },
        before=before,
        after=after,
        gain=difference(after, before),
        consistency=as_number(row.get("consistency")),
        magnitude=as_number(row.get("magnitude")),
    )


def _marked(words: Sequence[str], original: Sequence[str], counterpart: Sequence[str]) -> list[Word]:
    """Mark the words that the counterpart has too; `new` those that the original concept lacks."""
    return [Word(word, "" if word not in counterpart else "shared" if word in original else "new") for word in words]
