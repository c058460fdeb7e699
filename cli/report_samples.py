"""The report's captions and answers: which to show, and what changed; no files and no HTML."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..datamodules.vqa import VQA_PROMPT
from ..datamodules.word_classes import WORD_CLASSES
from ..metrics.vqa import ANSWER_TYPES, normalize_answer
from .report_values import VARIANT_NAMES, VARIANTS, Json, Picture, Pictures, get

_CAPTIONS = 12
_COLOR = re.compile(rf"(?<!\w)({'|'.join(sorted(WORD_CLASSES['colors']))})(?!\w)", re.IGNORECASE)


def color_parts(text: str) -> list[tuple[str, bool]]:
    """A text in pieces, each with whether it is a color word."""
    return [(part, number % 2 == 1) for number, part in enumerate(_COLOR.split(text)) if part]


def captions_view(captions: Mapping[str, Json], samples: Json, pictures: Pictures) -> Json | None:
    """Some captions of all variants side by side, evenly from those that are not all alike."""
    variants = [variant for variant in VARIANTS if captions[variant]]
    if not variants:
        return None
    ids = by_size(captions[variants[0]])
    texts = {i: {v: str(get(captions[v], i, "text") or "–") for v in variants} for i in ids}
    # How strongly they differ must not matter: steering that fails would then be shown more often than it happens.
    differing = [i for i in ids if len(set(texts[i].values())) > 1]
    chosen = spread(differing, _CAPTIONS)
    chosen += spread([i for i in ids if i not in set(differing)], _CAPTIONS - len(chosen))
    items = []
    for i in chosen:
        references = get(captions[variants[0]], i, "references") or [f"picture {i}"]
        picture = pictures(get(samples, f"caption/{i}", "image"), str(references[0]))
        items.append((picture, [(VARIANT_NAMES[v], texts[i][v]) for v in variants]))
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
    ids = [i for i in by_size(original) if i in steered]
    if not ids:
        return None
    pairs = {i: (_normal(original[i]), _normal(steered[i])) for i in ids}
    changed = [i for i in ids if pairs[i][0] != pairs[i][1]]
    flips = [i for i in changed if pairs[i] == ("yes", "no")]
    by_type = {kind: [i for i in ids if original[i].get("answer_type") == kind] for kind in ANSWER_TYPES}
    kept = {kind: [i for i in of_type if i not in set(changed)] for kind, of_type in by_type.items()}
    others = [i for i in changed if i not in set(flips)]
    chosen = spread(flips, 6) + spread(others, 2) + spread(kept["number"], 2) + spread(kept["other"], 2)
    return {
        "items": [_answer(original[i], steered[i], get(samples, f"question/{i}"), i in changed, pictures)
                  for i in chosen],
        "types": [(kind, len(rows), len(rows) - len(kept[kind])) for kind, rows in by_type.items() if rows],
        "total": len(ids),
        "flips": len(flips),
        "back": sum(pairs[i] == ("no", "yes") for i in changed),
    }  # fmt: skip


def _answer(before: Json, after: Json, sample: Any, changed: bool, pictures: Pictures) -> Answer:
    question = asked(sample) or "–"
    people = Counter(map(str, before.get("answers") or []))
    return Answer(
        picture=pictures(get(sample, "image"), f"picture of the question: {question}"),
        question=question,
        kind=str(before.get("answer_type", "")),
        before=str(get(before, "prediction") or "–"),
        after=str(get(after, "prediction") or "–"),
        changed=changed,
        people=people.most_common(),
    )


def asked(sample: Any) -> str:
    """A sample's prompt, without what follows every question; empty where it is not known."""
    return str(get(sample, "prompt") or "").removesuffix(VQA_PROMPT).strip()


def _normal(row: Any) -> str:
    return normalize_answer(str(get(row, "prediction") or ""))


def by_size(predictions: Iterable[str]) -> list[str]:
    """Ids, numbers by their size."""
    return sorted(predictions, key=lambda i: (len(i), i))


def spread(items: Sequence[str], count: int) -> list[str]:
    """So many items at equal distances: deterministic, and not all from one end."""
    count = max(0, min(count, len(items)))
    return [items[number * len(items) // count] for number in range(count)]
