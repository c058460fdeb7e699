"""The report's header, headline figures and score tables, made from `results.json`; no files and no HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .report_files import ANY, NUMBER, PAIR, Shape
from .report_values import VARIANT_NAMES, VARIANTS, Json, as_number, difference, fixed, get, interval, scaled, verdict


def facts_view(
    results: Json, shifts: Mapping[str, Json | None], captions: Mapping[str, Json], answers: Mapping[str, Json]
) -> list[tuple[str, str]]:
    """Name and value of what was compared, as far as it is known."""
    shift = next((shift for shift in shifts.values() if shift), {})
    sizes = {
        "States compared": shift.get("pairs"),
        "Captions": max(map(len, captions.values())),
        "Questions": max(map(len, answers.values())),
    }
    named = {
        "Model": results.get("model"),
        "Data": results.get("data"),
        "Hidden states": " · ".join(filter(None, (shift.get("site"), shift.get("selector")))),
    }
    facts = {**named, **{name: fixed(size, 0) for name, size in sizes.items() if size}}
    return [(name, str(value)) for name, value in facts.items() if value]


@dataclass(frozen=True)
class Figure:
    """One measure of a headline card; `before` is missing for a single value."""

    name: str
    before: str | None
    after: str


def headline_view(results: Json) -> list[tuple[str, str, list[Figure]]]:
    """Question, explanation and figures of each card; a card without a figure is left out."""
    captioning, vqa, shift = results["captioning"], results["vqa"], results["shift"]

    def caption(variant: str, key: str, name: str, percent: bool = False) -> Figure | None:
        return _change(name, get(captioning, "original", key), get(captioning, variant, key), percent)

    def accuracy(key: str, name: str) -> Figure | None:
        return _change(name, get(vqa, "original", key), get(vqa, "steered", key), True)

    said = "captions with a color word"
    cards: list[tuple[str, str, list[Figure | None]]] = [
        (
            "Does the fine-tuned model name colors?",
            "Original → fine-tuned model. CIDEr is the likeness to all reference captions, with and without colors.",
            [caption("destination", "color_share", said, True), caption("destination", "CIDEr", "CIDEr")],
        ),
        (
            "Do shifted concepts match the fine-tuned ones?",
            "Words that a concept shares with its fine-tuned counterpart: as it was → with its shift vector added. "
            "Consistency is 1 where all samples of a concept move the same way.",
            [
                _change("recovery", shift.get("recovery_original"), shift.get("recovery_shifted"), unit="\u2009%"),
                _single("consistency", shift.get("consistency"), 2),
                _single("gain of cosine to the counterpart", shift.get("matched_cosine_gain"), 3, True),
            ],
        ),
        (
            "Does steering work?",
            "Original → original with a steering vector added to its hidden states. No weight is trained.",
            [
                caption("steered", "color_share", said, True),
                _change("answers “no”", get(vqa, "original", "target_answers"), get(vqa, "steered", "target_answers"),
                        digits=0),
            ],
        ),
        (
            "What does it cost elsewhere?",
            "Original → steered, on what the vector should leave alone: "
            "answers that are neither yes nor no, and the captions’ quality.",
            [
                accuracy("number", "accuracy, number"),
                accuracy("other", "accuracy, other"),
                caption("steered", "CIDEr", "CIDEr"),
            ],
        ),
    ]  # fmt: skip
    present = [(question, text, [figure for figure in figures if figure]) for question, text, figures in cards]
    return [card for card in present if card[2]]


def _change(
    name: str, before: Any, after: Any, percent: bool = False, unit: str = "", digits: int | None = None
) -> Figure | None:
    numbers = [as_number(before), as_number(after)]
    if numbers == [None, None]:
        return None
    if percent:
        numbers, unit = [None if number is None else 100 * number for number in numbers], "\u2009%"
    digits = digits if digits is not None else 1 if unit else 2
    first, second = (fixed(number, digits) + (unit if number is not None else "") for number in numbers)
    return Figure(name, first, second)


def _single(name: str, value: Any, digits: int, signed: bool = False) -> Figure | None:
    return None if as_number(value) is None else Figure(name, None, fixed(value, digits, signed))


@dataclass(frozen=True)
class Cell:
    """A score of one variant, and how it differs from the original's, each with its interval.

    `verdict` is `better` or `worse`, or `moved` where neither direction is better, if the interval of the difference
    leaves 0 out; `same` if the difference is 0 as it is written.
    """

    text: str
    interval: str
    change: str = ""
    change_interval: str = ""
    verdict: str = ""


@dataclass(frozen=True)
class Score:
    """One row of the score table."""

    name: str
    cells: list[Cell]


_MEASURES = {
    # key: what the row is called, is it a share, digits, is higher better
    "captioning": {
        "CIDEr": ("CIDEr", False, 3, True),
        "BLEU-4": ("BLEU-4", False, 3, True),
        "ROUGE-L": ("ROUGE-L", False, 3, True),
        "color_share": ("Captions with a color word", True, 1, False),
    },
    "vqa": {
        "overall": ("Accuracy, all questions", True, 1, True),
        "yes/no": ("Accuracy, yes/no", True, 1, True),
        "number": ("Accuracy, number", True, 1, True),
        "other": ("Accuracy, other", True, 1, True),
        "target_answers": ("Answers “no” (count)", False, 0, False),
    },
}


SCORES: Shape = {
    part: {ANY: {"intervals": {ANY: PAIR}, "changes": {ANY: {"difference": NUMBER, "interval": PAIR}}}}
    for part in _MEASURES
}
"""The intervals of `results.json`."""


def scores_view(results: Json) -> list[tuple[str, list[str], list[Score]]]:
    """Title, column names and rows of each score table."""
    titles = {"captioning": "Captioning", "vqa": "Visual question answering"}
    tables = []
    for part, title in titles.items():
        variants = [variant for variant in VARIANTS if results[part].get(variant)]
        if variants:
            rows = [_score(results[part], variants, key, *row) for key, row in _MEASURES[part].items()]
            tables.append((title, [VARIANT_NAMES[variant] for variant in variants], rows))
    return tables


def _score(table: Json, variants: Sequence[str], key: str, name: str, share: bool, digits: int, good: bool) -> Score:
    factor, unit = (100, "\u2009%") if share else (1, "")
    original = as_number(get(table, "original", key))
    cells = []
    for variant in variants:
        value = as_number(get(table, variant, key))
        text = fixed(scaled(value, factor), digits) + (unit if value is not None else "")
        bounds = scaled(get(table, variant, "intervals", key), factor)
        # Of the samples of both, where it was measured.
        paired = get(table, variant, "changes", key) or {"difference": difference(value, original)}
        compared = ("", "", "") if variant == "original" else _compared(paired, factor, digits, good)
        cells.append(Cell(text, interval(bounds, digits), *compared))
    return Score(name, cells)


def _compared(paired: Json, factor: int, digits: int, good: bool) -> tuple[str, str, str]:
    """A difference and its interval as they are written, and what is to be made of them."""
    change, bounds = scaled(as_number(paired.get("difference")), factor), paired.get("interval")
    if change is None:
        return "", "", ""
    told = verdict(bounds) if good or not verdict(bounds) else "moved"
    if round(change, digits) == 0:
        told = "same"
    text = "±0" if told == "same" else fixed(change, digits, signed=True)
    return text, interval(scaled(bounds, factor), digits), told
