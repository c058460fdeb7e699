"""The report's concepts of one dictionary, in words, pictures and heat-maps; no files and no HTML."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .report_dictionaries import Fitted, grounding_view
from .report_values import Json, Picture, Pictures, as_number, figures

_CONCEPTS = 50  # more would make a page of many megabytes that nobody reads to its end
_PICTURES = 5


@dataclass(frozen=True)
class Grounding:
    """A picture that activates a concept, and where in it the concept is."""

    picture: Picture
    heat_map: Picture | None
    activation: str


@dataclass(frozen=True)
class Concept:
    """One concept.

    Attributes:
        number: Which.
        size: How many states it is strongest in.
        words: What it says.
        pictures: What it shows, strongest first; none of a concept that nothing activates.
        stability: How well further seeds find it again.
        causal: What `causal.json` has of it.
        untried: Why that has nothing.
    """

    number: int
    size: int | None
    words: list[str]
    pictures: list[Grounding]
    stability: float | None
    causal: Json | None
    untried: str


def dictionary_view(one: Fitted, pictures: Pictures) -> Json:
    """Scores and concepts of a dictionary, the concepts with most states first."""
    concepts = [_concept(one, number, pictures) for number in _largest(one)[:_CONCEPTS]]
    return {
        "name": one.name,
        "method": one.method,
        "source": one.source,
        "total": len(one.concepts["words"]),
        "grounding": grounding_view(one.scores),
        "concepts": concepts,
        "pictures": any(concept.pictures for concept in concepts),
        "heat_maps": any(shown.heat_map for concept in concepts for shown in concept.pictures),
    }


def _largest(one: Fitted) -> list[int]:
    return sorted(range(len(one.concepts["words"])), key=lambda k: (-(_at(one.concepts.get("sizes"), k) or 0), k))


def _at(values: Any, place: int) -> Any:
    return values[place] if isinstance(values, list) and place < len(values) else None


def _concept(one: Fitted, number: int, pictures: Pictures) -> Concept:
    causal = one.causal or {}
    return Concept(
        number=number,
        size=_at(one.concepts.get("sizes"), number),
        words=[str(word) for word in one.concepts["words"][number]],
        pictures=[
            _grounding(one, number, row, pictures)
            for row in (_at(one.concepts.get("images"), number) or [])[:_PICTURES]
            # Of a dead concept, all pictures are as strong as these.
            if row.get("activation") != 0
        ],
        stability=as_number(_at(one.concepts.get("stability"), number)),
        causal=next((row for row in causal.get("concepts", []) if row["concept"] == number), None),
        untried=next((str(row["reason"]) for row in causal.get("left_out", []) if row["concept"] == number), ""),
    )


def _grounding(one: Fitted, number: int, row: Json, pictures: Pictures) -> Grounding:
    drawn = row.get("heat_map")
    return Grounding(
        picture=pictures(row.get("image"), str(row.get("text") or "")),
        heat_map=pictures(str(Path(one.folder, drawn)), f"where concept {number} is in it") if drawn else None,
        activation=figures(row.get("activation")),
    )
