"""What the report shows, made from the files of a run: choices, differences and highlights, no files and no HTML."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..datamodules.vqa import VQA_PROMPT
from ..datamodules.word_classes import WORD_CLASSES
from ..metrics.vqa import ANSWER_TYPES, normalize_answer

Json = dict[str, Any]
METHODS = {"kmeans": "KMeans", "semi_nmf": "Semi-NMF"}
VARIANTS = ("original", "destination", "steered")
_NAMES = {"original": "original", "destination": "fine-tuned", "steered": "steered"}
_CAPTIONS = 12
_COLOR = re.compile(rf"(?<!\w)({'|'.join(sorted(WORD_CLASSES['colors']))})(?!\w)", re.IGNORECASE)


@dataclass(frozen=True)
class Picture:
    """A picture to embed; `uri` is missing where the file cannot be read, and `name` shown in its stead."""

    uri: str | None
    name: str
    alt: str


Pictures = Callable[[str | None, str], Picture]


# --- numbers and words --------------------------------------------------------------------------------------


def fixed(value: Any, digits: int = 1, signed: bool = False) -> str:
    """A number with so many digits; an en dash where there is none."""
    if (number := _number(value)) is None:
        return "–"
    text = f"{number:{'+' if signed else ''},.{digits}f}"
    return text.lstrip("+-") if not float(text.replace(",", "")) else text.replace("-", "−")


def duration(seconds: Any) -> str:
    """Seconds in words: `1 h 02 min`, `3 min 20 s`, `4.2 s`."""
    number = _number(seconds)
    if number is None or number < 60:
        return f"{fixed(number)} s" if number is not None else "–"
    minutes, rest = divmod(round(number), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"


def color_parts(text: str) -> list[tuple[str, bool]]:
    """A text in pieces, each with whether it is a color word."""
    return [(part, number % 2 == 1) for number, part in enumerate(_COLOR.split(text)) if part]


def _number(value: Any) -> float | None:
    real = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if real else None


def _difference(after: float | None, before: float | None) -> float | None:
    return None if after is None or before is None else after - before


def _get(table: Any, *keys: str) -> Any:
    """What lies under the keys, or nothing."""
    for key in keys:
        table = table.get(key) if isinstance(table, Mapping) else None
    return table


# --- header and headline figures ----------------------------------------------------------------------------


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
        return _change(name, _get(captioning, "original", key), _get(captioning, variant, key), percent)

    def accuracy(key: str, name: str) -> Figure | None:
        return _change(name, _get(vqa, "original", key), _get(vqa, "steered", key), True)

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
                _change("answers “no”", _get(vqa, "original", "target_answers"), _get(vqa, "steered", "target_answers"),
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
    numbers = [_number(before), _number(after)]
    if numbers == [None, None]:
        return None
    if percent:
        numbers, unit = [None if number is None else 100 * number for number in numbers], "\u2009%"
    digits = digits if digits is not None else 1 if unit else 2
    first, second = (fixed(number, digits) + (unit if number is not None else "") for number in numbers)
    return Figure(name, first, second)


def _single(name: str, value: Any, digits: int, signed: bool = False) -> Figure | None:
    return None if _number(value) is None else Figure(name, None, fixed(value, digits, signed))


# --- scores -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A score of one variant, and how it differs from the original's."""

    value: float | None
    change: float | None
    verdict: str
    """`better`, `worse`, `same`; `moved` where neither direction is better; empty without a difference."""


@dataclass(frozen=True)
class Score:
    """One row of the score table."""

    name: str
    digits: int
    unit: str
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


def scores_view(results: Json) -> list[tuple[str, list[str], list[Score]]]:
    """Title, column names and rows of each score table."""
    titles = {"captioning": "Captioning", "vqa": "Visual question answering"}
    tables = []
    for part, title in titles.items():
        variants = [variant for variant in VARIANTS if results[part].get(variant)]
        if variants:
            rows = [_score(results[part], variants, key, *row) for key, row in _MEASURES[part].items()]
            tables.append((title, [_NAMES[variant] for variant in variants], rows))
    return tables


def _score(table: Json, variants: Sequence[str], key: str, name: str, share: bool, digits: int, good: bool) -> Score:
    values = [_number(_get(table, variant, key)) for variant in variants]
    values = [None if value is None else value * (100 if share else 1) for value in values]
    original = values[0] if variants[0] == "original" else None
    cells = [Cell(values[0], None, "")]
    for value in values[1:]:
        change = _difference(value, original)
        cells.append(Cell(value, change, _verdict(change, digits, good)))
    return Score(name, digits, "%" if share else "", cells)


def _verdict(change: float | None, digits: int, higher_is_better: bool) -> str:
    if change is None or round(change, digits) == 0:
        return "" if change is None else "same"
    if not higher_is_better:
        return "moved"
    return "better" if change > 0 else "worse"


# --- concepts -----------------------------------------------------------------------------------------------


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
    before, after = _number(row.get("recovery_original")), _number(row.get("recovery_shifted"))
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
        gain=_difference(after, before),
        consistency=_number(row.get("consistency")),
        magnitude=_number(row.get("magnitude")),
    )


def _marked(words: Sequence[str], original: Sequence[str], counterpart: Sequence[str]) -> list[Word]:
    """Mark the words that the counterpart has too; `new` those that the original concept lacks."""
    return [Word(word, "" if word not in counterpart else "shared" if word in original else "new") for word in words]


def dictionaries_view(results: Json, files: Mapping[tuple[str, str], Json | None]) -> list[tuple[str, Json]]:
    """Name and summary of each dictionary; of `results.json`, where no dictionary has a file."""
    found = {f"{METHODS[method]}, {_NAMES[variant]}": file for (method, variant), file in files.items() if file}
    summaries = {METHODS[method]: results["concepts"].get(method) for method in METHODS}
    return [(name, summary) for name, summary in (found or summaries).items() if summary]


# --- captions and answers -----------------------------------------------------------------------------------


def captions_view(captions: Mapping[str, Json], samples: Json, pictures: Pictures) -> Json | None:
    """Some captions of all variants side by side, evenly from those that are not all alike."""
    variants = [variant for variant in VARIANTS if captions[variant]]
    if not variants:
        return None
    ids = _ordered(captions[variants[0]])
    texts = {i: {v: str(_get(captions[v], i, "text") or "–") for v in variants} for i in ids}
    # How strongly they differ must not matter: steering that fails would then be shown more often than it happens.
    differing = [i for i in ids if len(set(texts[i].values())) > 1]
    chosen = _spread(differing, _CAPTIONS)
    chosen += _spread([i for i in ids if i not in set(differing)], _CAPTIONS - len(chosen))
    items = []
    for i in chosen:
        references = _get(captions[variants[0]], i, "references") or [f"picture {i}"]
        picture = pictures(_get(samples, f"caption/{i}", "image"), str(references[0]))
        items.append((picture, [(_NAMES[v], texts[i][v]) for v in variants]))
    return {"items": items, "total": len(ids)}


@dataclass(frozen=True)
class Answer:
    """A question, with its answer before and after steering."""

    picture: Picture
    question: str
    kind: str
    before: str
    after: str
    changed: bool
    people: list[tuple[str, int]]


def answers_view(answers: Mapping[str, Json], samples: Json, pictures: Pictures) -> Json | None:
    """How many answers steering changes, by type, and some of them: yes → no first, then what stays."""
    original, steered = answers["original"], answers["steered"]
    ids = [i for i in _ordered(original) if i in steered]
    if not ids:
        return None
    pairs = {i: (_normal(original[i]), _normal(steered[i])) for i in ids}
    changed = [i for i in ids if pairs[i][0] != pairs[i][1]]
    flips = [i for i in changed if pairs[i] == ("yes", "no")]
    by_type = {kind: [i for i in ids if original[i].get("answer_type") == kind] for kind in ANSWER_TYPES}
    kept = {kind: [i for i in of_type if i not in set(changed)] for kind, of_type in by_type.items()}
    others = [i for i in changed if i not in set(flips)]
    chosen = _spread(flips, 6) + _spread(others, 2) + _spread(kept["number"], 2) + _spread(kept["other"], 2)
    return {
        "items": [_answer(original[i], steered[i], _get(samples, f"question/{i}"), i in changed, pictures)
                  for i in chosen],
        "types": [(kind, len(rows), len(rows) - len(kept[kind])) for kind, rows in by_type.items() if rows],
        "total": len(ids),
        "flips": len(flips),
        "back": sum(pairs[i] == ("no", "yes") for i in changed),
    }  # fmt: skip


def _answer(before: Json, after: Json, sample: Any, changed: bool, pictures: Pictures) -> Answer:
    question = str(_get(sample, "prompt") or "–").removesuffix(VQA_PROMPT).strip()
    people = Counter(map(str, before.get("answers") or []))
    return Answer(
        picture=pictures(_get(sample, "image"), f"picture of the question: {question}"),
        question=question,
        kind=str(before.get("answer_type", "")),
        before=str(_get(before, "prediction") or "–"),
        after=str(_get(after, "prediction") or "–"),
        changed=changed,
        people=people.most_common(),
    )


def _normal(row: Any) -> str:
    return normalize_answer(str(_get(row, "prediction") or ""))


def _ordered(predictions: Json) -> list[str]:
    """Ids, numbers by their size."""
    return sorted(predictions, key=lambda i: (len(i), i))


def _spread(items: Sequence[str], count: int) -> list[str]:
    """So many items at equal distances: deterministic, and not all from one end."""
    count = max(0, min(count, len(items)))
    return [items[number * len(items) // count] for number in range(count)]
