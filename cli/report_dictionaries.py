"""The report's dictionaries side by side: their measures in one table, and the scores of one; no files and no HTML."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ..metrics.concept_scores import CAPTIONS
from .report_values import VARIANT_NAMES, VARIANTS, Json, as_number, chance, figures, fixed, get, interval

_MEASURES = (
    # what the row is called, key in `concepts.json`, which is better, digits
    ("Concepts", "k", "", 0),
    ("States", "states", "", 0),
    ("Explained variance", "explained_variance", "higher", 3),
    ("Concepts per state (L0)", "l0", "", 2),
    ("Dead concepts", "dead_concepts", "lower", 0),
    ("Overlap", "overlap", "lower", 3),
    ("Stability over seeds", "mean_stability", "higher", 3),
    ("Objective", "objective", "", None),
    ("Iterations", "iterations", "", 0),
)
_SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Fitted:
    """What is known of a dictionary.

    Attributes:
        name: Its folder, below `concepts/`.
        folder: The same, from where the report is written.
        concepts: Its `concepts.json`.
        scores: Its `scores.json`, if it was scored.
        causal: Its `causal.json`, if it was checked.
    """

    name: str
    folder: str
    concepts: Json
    scores: Json | None = None
    causal: Json | None = None

    @property
    def method(self) -> str:
        """How it was learned."""
        return str(self.concepts.get("method") or self.name)

    @property
    def source(self) -> str:
        """Which states it was learned from."""
        variant = self.concepts.get("variant")
        parts = (self.concepts.get("site"), self.concepts.get("selector"), VARIANT_NAMES.get(str(variant), variant))
        return " · ".join(str(part) for part in parts if part)


def ordered(found: Iterable[Fitted]) -> list[Fitted]:
    """Dictionaries of the same states together, those of the original model first; numbers by their size."""

    def key(one: Fitted) -> tuple[Any, ...]:
        variant, selector, site = (str(one.concepts.get(name) or "") for name in ("variant", "selector", "site"))
        place = VARIANTS.index(variant) if variant in VARIANTS else len(VARIANTS)
        return place, variant, selector, _natural(site), _natural(one.name)

    return sorted(found, key=key)


def _natural(text: str) -> list[Any]:
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"([0-9]+)", text))]


@dataclass(frozen=True)
class Entry:
    """One value of a table.

    Attributes:
        text: The value.
        note: What is said beside it.
        verdict: `better`, `worse` or `same`; empty where nothing is compared.
        ahead: How far the dictionary is ahead of a baseline.
    """

    text: str = "–"
    note: str = ""
    verdict: str = ""
    ahead: str = ""


@dataclass(frozen=True)
class Measure:
    """One row of the table; `better` is `higher`, `lower`, or empty where neither is."""

    name: str
    better: str
    entries: list[Entry]


def comparison_view(found: Sequence[Fitted]) -> Json:
    """Columns by the states that they were learned from, and rows; a measure that no dictionary has is left out."""
    rows = [_plain(found, *measure) for measure in _MEASURES]
    for score in _score_names(*(one.scores for one in found)):
        rows.append(_row(score, "higher", found, [_mean(one, score) for one in found]))
    for score in ("CLIPScore", "Overlap"):
        values = [_known(get(one.scores, "published", score, str(get(one.scores, "method"))), 3) for one in found]
        rows.append(_row(f"{score}, published", "", found, values))
    rows.append(_row("Fall of log-probability (nats)", "higher", found, [_fall(one) for one in found]))
    random = [_known(get(one.causal, "mean_random_fall"), 2) for one in found]
    rows.append(_row("Fall by random directions", "", found, random))
    rows.append(_row("Concepts whose fall is significant", "higher", found, [_significant(one) for one in found]))
    sources = {str(get(one.scores, "published", "source")) for one in found if get(one.scores, "published", "source")}
    return {
        "groups": [(source, len(list(same))) for source, same in groupby(found, lambda one: one.source)],
        "rows": [row for row in rows if any(entry.text != "–" for entry in row.entries)],
        "published": sorted(sources),
        "causal": any(one.causal for one in found),
    }


_Value = tuple[float | None, str, str]
"""A number, and how it and its note are written."""


def _known(value: Any, digits: int | None, note: str = "") -> _Value:
    text = figures(value) if digits is None else fixed(value, digits)
    return as_number(value), text, note


def _plain(found: Sequence[Fitted], name: str, key: str, better: str, digits: int | None) -> Measure:
    return _row(name, better, found, [_known(one.concepts.get(key), digits) for one in found])


def _row(name: str, better: str, found: Sequence[Fitted], values: Sequence[_Value]) -> Measure:
    """A row with the best of those values marked that are of the same states: others cannot be compared."""
    entries = []
    for one, (value, text, note) in zip(found, values, strict=True):
        rivals = [
            (theirs, written)
            for other, (theirs, written, _) in zip(found, values, strict=True)
            if theirs is not None and _states(other) == _states(one)
        ]
        # What is written alike is not told apart.
        several = better and value is not None and len({written for _, written in rivals}) > 1
        best = several and text == (max if better == "higher" else min)(rivals)[1]
        entries.append(Entry(text, note, "better" if best else ""))
    return Measure(name, better, entries)


def _states(one: Fitted) -> tuple[str, Any]:
    return one.source, one.concepts.get("states")


def _score_names(*summaries: Json | None) -> list[str]:
    """CLIPScore before BERTScore, as in the paper."""
    names = {name for scores in summaries for name in get(scores, "scores") or ()}
    return sorted(names, key=lambda name: (not name.startswith("CLIP"), name))


def _mean(one: Fitted, score: str) -> _Value:
    row = get(one.scores, "scores", score, str(get(one.scores, "method")))
    return _known(get(row, "mean"), 3, interval(get(row, "interval"), 3))


def _fall(one: Fitted) -> _Value:
    return _known(get(one.causal, "mean_fall"), 2, interval(get(one.causal, "mean_fall_interval"), 2))


def _significant(one: Fitted) -> _Value:
    count, tried = get(one.causal, "significant"), get(one.causal, "tried")
    if not tried:
        return None, "–", ""
    return count / tried, f"{fixed(count, 0)} of {fixed(tried, 0)}", ""


# --- scores of one dictionary -------------------------------------------------------------------------------


def grounding_view(scores: Json | None) -> Json | None:
    """A dictionary and its baselines: rows are methods, columns scores; what the paper has comes beside."""
    if scores is None:
        return None
    published = scores.get("published") or {}
    columns: list[tuple[str, dict[str, Entry]]] = [
        (name, {method: _against(row, method) for method, row in scores["scores"][name].items()})
        for name in _score_names(scores)
    ]
    columns.insert(sum(name.startswith("CLIP") for name, _ in columns), _published(published, "CLIPScore"))
    columns.append(("Overlap", {method: Entry(fixed(value, 3)) for method, value in scores["overlap"].items()}))
    columns.append(_published(published, "Overlap"))
    columns = [(name, column) for name, column in columns if column]
    methods = dict.fromkeys([*scores["methods"], *(method for _, column in columns for method in column)])
    rows = [
        (method, [column.get(method, Entry()) for _, column in columns])
        for method in methods
        if any(method in column for _, column in columns)
    ]
    return {"own": scores["method"], "samples": scores.get("samples"), "columns": [name for name, _ in columns],
            "rows": rows, "compared": bool(scores["scores"])}  # fmt: skip


def _published(published: Json, score: str) -> tuple[str, dict[str, Entry]]:
    return f"{score}, published", {name: Entry(fixed(value, 3)) for name, value in (published.get(score) or {}).items()}


def _against(row: Json, method: str) -> Entry:
    """A method's mean with its interval, and what the dictionary has more than it."""
    note, p, ahead = interval(row.get("interval"), 3), as_number(row.get("p")), as_number(row.get("difference"))
    if p is None or ahead is None:
        return Entry(fixed(row.get("mean"), 3), note)
    # Captions are no rival but the upper bound.
    clear = p < _SIGNIFICANT and method != CAPTIONS
    verdict = ("better" if ahead > 0 else "worse") if clear else "same"
    said = f"{fixed(ahead, 3, signed=True)}, p {chance(p)}"
    return Entry(fixed(row.get("mean"), 3), note, verdict, said)
