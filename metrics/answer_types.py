"""Which type an answer has, whatever was asked: learned from the answers that people gave."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from .vqa import ANSWER_TYPES, normalize_answer

UNKNOWN = "unknown"


def learn_answer_types(annotations: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Learn the type of each answer of VQAv2 annotations: the one that it most often has.

    Args:
        annotations: One mapping per question: "answers", each with an "answer", and "answer_type". Every answer of
            every annotator counts once.

    Returns:
        Normalised answer → type; of several that are equally frequent, the first of `ANSWER_TYPES`.

    Raises:
        ValueError: If there is no answer, or a type is unknown.
    """
    # Most answers repeat; normalising is what takes time.
    given = Counter((answer["answer"], row["answer_type"]) for row in annotations for answer in row["answers"])
    odd = next((kind for _, kind in given if kind not in ANSWER_TYPES), None)
    if not given or odd is not None:
        raise ValueError(
            f"answers must have the types {', '.join(ANSWER_TYPES)}, got {odd or 'no answer'!r}: take VQAv2's"
        )
    counts: dict[str, Counter[str]] = {}
    for (answer, kind), number in given.items():
        counts.setdefault(normalize_answer(answer), Counter())[kind] += number
    return {answer: max(ANSWER_TYPES, key=lambda kind: of[kind]) for answer, of in counts.items()}


def predicted_types(rows: Iterable[Mapping[str, Any]], types: Mapping[str, str]) -> dict[str, dict[str, int]]:
    """Count the types of what was answered.

    Args:
        rows: One mapping per question: "prediction" and "answer_type".
        types: Normalised answer → type.

    Returns:
        Type of the question → type of the prediction → count, most frequent first; an answer without a type is
        "unknown".
    """
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        kind = types.get(normalize_answer(row["prediction"]), UNKNOWN)
        counts.setdefault(row["answer_type"], Counter())[kind] += 1
    return {kind: dict(counts[kind].most_common()) for kind in ANSWER_TYPES if kind in counts}
