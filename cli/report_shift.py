"""The report's concepts before and after, made from `shift.json`; no files and no HTML."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..callbacks.parts.figure_style import SIGNIFICANT
from ..callbacks.parts.words_figure import word_marks
from .report_files import ANY, COUNT, NUMBER, NUMBERS, PAIR, TEXT, Shape
from .report_values import Json, Picture, Pictures, as_number, chance, difference, fixed, get, interval

_CONCEPTS = 50  # more would make a page of many megabytes that nobody reads to its end

# What changes from original to shifted: name, digits, keys in `means` of both and of the gain.
_CHANGES = (
    ("Recovery of words, %", 1, "recovery_original", "recovery_shifted", "recovery_gain"),
    ("Recovery of pictures, %", 1, "image_recovery_original", "image_recovery_shifted", "image_recovery_gain"),
    ("Cosine to the matched concept", 3, "cosine_original", "cosine_shifted", "delta_cosine"),
    ("Distance to the matched concept", 1, "l2_original", "l2_shifted", "delta_l2"),
)
_SINGLES = (
    ("Consistency: mean cosine of the samples’ shifts with Δ", 3, "consistency"),
    ("Mean cosine between the shifts of two samples", 3, "pairwise_cosine"),
    ("Magnitude of Δ", 1, "magnitude"),
    ("Mean magnitude of the samples’ shifts", 1, "mean_magnitude"),
    ("Gain of cosine, relative to the original’s", 3, "delta_cosine_normalised"),
    ("Fall of distance, relative to the original’s", 3, "delta_l2_normalised"),
)
# What concepts do that a test has found, in short, and what the null is.
_TESTS = {
    "magnitude": (
        "shift",
        "its pairs differ by more than where original and fine-tuned states are swapped at random within samples",
    ),
    "consistency": (
        "move consistently",
        "samples follow their mean more closely than where the fine-tuned states are permuted over them",
    ),
    "recovery_pairing": (
        "come nearer to their match through their own samples",
        "the cosine is larger than where the fine-tuned states are permuted over all samples",
    ),
    "recovery_direction": (
        "come nearer to their match by the direction of Δ",
        "the cosine is larger than with random directions of the same norm, which vary as states do",
    ),
    "words_pairing": (
        "recover words through their own samples",
        "more words than where the fine-tuned states are permuted over all samples",
    ),
    "words_direction": (
        "recover words by the direction of Δ",
        "more words than with random directions of the same norm, which vary as states do",
    ),
}
_SEEDS = {
    "seeds": ("Further seeds", 0),
    "cosine_original": ("Original’s concepts and the original’s of another seed: cosine", 3),
    "recovery_original": ("the same: words in common, %", 1),
    "cosine_shifted": ("Shifted concepts and the fine-tuned model’s of another seed: cosine", 3),
    "recovery_shifted": ("the same: words in common, %", 1),
}
# What is correlated with the gain of recovery.
_CORRELATED = {
    "consistency": "Consistency",
    "pairwise_cosine": "Mean cosine between the shifts of two samples",
    "magnitude": "Magnitude of Δ",
    "mean_magnitude": "Mean magnitude of the samples’ shifts",
}
_AVERAGES = {"mean": "mean of its samples’ shifts", "median": "median of its samples’ shifts",
             "trimmed_mean": "trimmed mean of its samples’ shifts"}  # fmt: skip
_MATCHINGS = {"bijective": "one to one, by cosine", "nearest": "the nearest, by cosine"}

PICTURES: Shape = [{"image": TEXT, "text": TEXT}]
_CORRELATION: Shape = {
    f"{name}{part}": PAIR if part == "_interval" else NUMBER
    for name in ("pearson", "spearman")
    for part in ("", "_interval", "_p")
} | {"concepts": NUMBER}
_CONCEPT: Shape = {
    **dict.fromkeys(("concept!", "matched", "samples"), COUNT),
    **dict.fromkeys(("recovery_original", "recovery_shifted", "consistency", "magnitude"), NUMBER),
    **{f"words_{name}": [TEXT] for name in ("original", "shifted", "destination")},
    **{f"images_{name}": PICTURES for name in ("original", "shifted", "destination")},
    "intervals": {ANY: PAIR},
    "p": {ANY: NUMBER},
    "p_adjusted": {ANY: NUMBER},
}
SHIFT: Shape = {
    **dict.fromkeys(("method", "site", "selector", "original", "destination", "average", "matching"), TEXT),
    **dict.fromkeys(("alpha", "pairs", "samples", "level", "permutations", "word_draws"), NUMBER),
    # As it was before there were `means`.
    **dict.fromkeys(("recovery_original", "recovery_shifted", "consistency", "magnitude"), NUMBER),
    "unpaired": {ANY: NUMBER},
    "empty_concepts": [COUNT],
    "untested_concepts": [COUNT],
    "means": {ANY: NUMBER},
    "intervals": {ANY: PAIR},
    "correlations": {ANY: _CORRELATION},
    "tests": {ANY: {"significant": NUMBER, "concepts": NUMBER}},
    "seeds": {ANY: NUMBERS},
    "seed_intervals": {ANY: PAIR},
    "figures": {ANY: TEXT},
    "concepts": [_CONCEPT],
}


@dataclass(frozen=True)
class Word:
    """A grounding word; `mark` is `shared` or `new` (recovered by the shift), or empty."""

    text: str
    mark: str


@dataclass(frozen=True)
class Value:
    """A number as it is written, with its interval."""

    text: str
    interval: str = ""


@dataclass(frozen=True)
class Concept:
    """One concept: as it was, shifted, and its fine-tuned counterpart.

    Attributes:
        number: Which.
        matched: Its counterpart.
        samples: How many it has; without one there is no shift.
        words: Original, shifted and destination.
        pictures: The same.
        before: Recovery of the original, percent.
        after: Recovery of the shifted, percent.
        bounds: Interval of that, if it is known.
        gain: How much it rises.
        values: Name → value of each measure.
        untested: Whether it has too few samples to test.
        significant: Whether it shifts at all.
        p_adjusted: How sure that is, after Benjamini and Hochberg.
        tests: Name, p and adjusted p of each test; none if nothing was tested.
    """

    number: int
    matched: int | None
    samples: int
    words: dict[str, list[Word]]
    pictures: dict[str, list[Picture]]
    before: float | None
    after: float | None
    bounds: list[float] | None
    gain: float | None
    values: dict[str, Value]
    untested: bool
    significant: bool
    p_adjusted: str
    tests: list[tuple[str, str, str]]


def shift_view(shift: Json, pictures: Pictures) -> Json:
    """The means, tests and concepts of a shift, concepts by how much their recovery rises, those without a sample last.

    Args:
        shift: A `shift.json` of shape `SHIFT`.
        pictures: Reads a picture.
    """
    empty = set(shift.get("empty_concepts") or [])
    untested = set(shift.get("untested_concepts") or []) - empty
    rows = [_concept(row, row["concept"] in empty, row["concept"] in untested, pictures) for row in shift["concepts"]]
    none_last = -math.inf
    rows.sort(key=lambda c: (not c.samples, -(none_last if c.gain is None else c.gain), c.number))
    return {
        "facts": facts(shift) + [("Concepts without a sample", fixed(len(empty), 0))] * bool(empty),
        "level": fixed(100 * (as_number(shift.get("level")) or 0.95), 0),
        "changes": _changes(shift),
        "intervals": bool(shift.get("intervals")),
        "singles": _singles(shift),
        "tests": [_test(name, found) for name, found in _in_order(shift.get("tests"), _TESTS) if found],
        "untested": len(untested),
        "draws": _draws(shift),
        "correlations": _correlations(shift),
        "seeds": _seeds(shift),
        "seed_intervals": bool(shift.get("seed_intervals")),
        "concepts": rows[:_CONCEPTS],
        "total": len(rows),
    }


def facts(summary: Json) -> list[tuple[str, str]]:
    """Name and value of how shifts were measured, of a `shift.json` or `trajectory.json`, as far as it is known."""
    pairs, samples = fixed(summary.get("pairs"), 0), as_number(summary.get("samples"))
    unpaired = [f"{fixed(count, 0)} {name}" for name, count in (summary.get("unpaired") or {}).items() if count]
    average, matching = str(summary.get("average") or ""), str(summary.get("matching") or "")
    named = {
        "Dictionary": summary.get("method"),
        "Hidden states": " · ".join(filter(None, (summary.get("site"), summary.get("selector")))),
        "Pairs of states": pairs + (f" of {fixed(samples, 0)} samples" if samples else ""),
        "Left without a pair": ", ".join(unpaired),
        "Shift Δ of a concept": _AVERAGES.get(average, average),
        "Strength α": fixed(summary.get("alpha"), 2),
        "Concepts matched": _MATCHINGS.get(matching, matching),
    }
    return [(name, str(value)) for name, value in named.items() if value and value != "–"]


def _mean(shift: Json, key: str) -> Any:
    """As it was before there were `means`, they lay beside the rest."""
    value = get(shift, "means", key)
    return as_number(shift.get(key) if value is None else value)


def _changes(shift: Json) -> list[tuple[str, Value, Value, Value]]:
    rows = []
    for name, digits, before, after, gain in _CHANGES:
        values = [_mean(shift, key) for key in (before, after)]
        if values == [None, None]:
            continue
        # The gain of a distance is its fall.
        rise = _mean(shift, gain)
        rise = difference(values[1], values[0]) if rise is None and gain != "delta_l2" else rise
        bounds = [interval(get(shift, "intervals", key), digits) for key in (before, after, gain)]
        was, is_now = (Value(fixed(value, digits), note) for value, note in zip(values, bounds, strict=False))
        rows.append((name, was, is_now, Value(fixed(rise, digits, signed=True), bounds[2])))
    return rows


def _singles(shift: Json) -> list[tuple[str, Value]]:
    found = [(name, digits, key, _mean(shift, key)) for name, digits, key in _SINGLES]
    return [
        (name, Value(fixed(value, digits), interval(get(shift, "intervals", key), digits)))
        for name, digits, key, value in found
        if value is not None
    ]


def _draws(shift: Json) -> str:
    """How many draws the tests rest on."""
    counts = [fixed(shift.get(name), 0) for name in ("permutations", "word_draws")]
    return "" if "–" in counts else f"{counts[0]} draws, {counts[1]} where words are read"


def _test(name: str, found: Json) -> tuple[str, str, str]:
    """How many concepts, what they do, and what chance would be."""
    does, null = _TESTS.get(name, (f"pass the test “{name.replace('_', ' ')}”", ""))
    return f"{fixed(found.get('significant'), 0)} of {fixed(found.get('concepts'), 0)} concepts", does, null


def _correlations(shift: Json) -> list[tuple[str, list[tuple[Value, str]], str]]:
    """Of the recovery gain with each measure: its name, Pearson's and Spearman's with p, and the number of concepts."""
    rows = []
    for name, found in _in_order(shift.get("correlations"), _CORRELATED):
        if found:
            values = [
                (Value(fixed(found.get(kind), 2), interval(found.get(f"{kind}_interval"), 2)), found.get(f"{kind}_p"))
                for kind in ("pearson", "spearman")
            ]
            title = _CORRELATED.get(name, name)
            rows.append((title, [(value, chance(p)) for value, p in values], fixed(found.get("concepts"), 0)))
    return rows


def _in_order(found: Json | None, known: Json) -> list[tuple[str, Any]]:
    """Name and value, known names first: a file has them by the alphabet."""
    places = {name: place for place, name in enumerate(known)}
    return sorted((found or {}).items(), key=lambda item: places.get(item[0], len(places)))


def _seeds(shift: Json) -> list[tuple[str, Value]]:
    rows = []
    for name, value in _in_order(shift.get("seeds"), _SEEDS):
        if value is not None:
            title, digits = _SEEDS.get(name, (name.replace("_", " ").capitalize(), 3))
            text = ", ".join(fixed(one, digits) for one in (value if isinstance(value, list) else [value]))
            rows.append((title, Value(text, interval(get(shift, "seed_intervals", name), digits))))
    return rows


def _concept(row: Json, empty: bool, untested: bool, pictures: Pictures) -> Concept:
    samples = 0 if empty else row.get("samples") or 0
    original, shifted, destination = (row.get(f"words_{name}") or [] for name in ("original", "shifted", "destination"))
    before, after = as_number(row.get("recovery_original")), as_number(row.get("recovery_shifted"))
    bounds = row.get("intervals") or {}
    adjusted = as_number(get(row, "p_adjusted", "magnitude"))
    return Concept(
        number=row["concept"],
        matched=row.get("matched"),
        samples=samples,
        words={
            "original": marked(original, original, destination if samples else ()),
            "shifted": marked(shifted, original, destination),
            "destination": marked(destination, original, shifted),
        },
        pictures={name: shown(row.get(f"images_{name}"), pictures) for name in ("original", "shifted", "destination")},
        before=before,
        after=after,
        bounds=bounds.get("recovery_shifted"),
        gain=difference(after, before),
        values={
            name: Value(fixed(row.get(name), 2), interval(bounds.get(name), 2)) for name in ("consistency", "magnitude")
        },
        untested=untested,
        significant=adjusted is not None and adjusted <= SIGNIFICANT,
        p_adjusted=chance(adjusted),
        tests=[
            (_TESTS.get(name, (name.replace("_", " "), ""))[0], chance(p), chance(get(row, "p_adjusted", name)))
            for name, p in _in_order(row.get("p"), _TESTS)
        ],
    )


def shown(rows: Sequence[Json] | None, pictures: Pictures) -> list[Picture]:
    """The pictures of a concept."""
    return [pictures(row.get("image"), row.get("text") or "") for row in rows or ()]


def marked(words: Sequence[str], original: Sequence[str], counterpart: Sequence[str]) -> list[Word]:
    """Mark the words that the counterpart has too, and those of them that the original concept lacks."""
    return [Word(*pair) for pair in zip(words, word_marks(words, original, counterpart), strict=True)]
