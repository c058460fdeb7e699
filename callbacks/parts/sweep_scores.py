"""Scores of the runs of a sweep, each beside the unsteered run on the same samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ...concepts import select_direction
from ...datamodules.sample import Sample
from ...lightning_modules.sweep import UNSTEERED, SweepRun
from ...metrics import (
    Measure,
    answer_counts,
    bootstrap,
    caption_measures,
    difference,
    mean_measure,
    normalize_answer,
    text_measures,
    vqa_measures,
    word_share_measure,
)

# Accuracy on the questions that steering should leave alone.
_ELSEWHERE = "elsewhere"
# Answers whose count rose most, in the file.
_RISES = 10


@dataclass(frozen=True)
class Target:
    """What steering is to bring about.

    Attributes:
        answer: An answer, as a whole and normalised; empty for captions.
        words: Words of which a caption is to have one; empty for answers.
        avoid: Whether samples without it are what counts.
    """

    answer: str = ""
    words: frozenset[str] = frozenset()
    avoid: bool = False

    @property
    def task(self) -> str:
        """`vqa` or `caption`."""
        return "vqa" if self.answer else "caption"


def score_sweep(
    runs: Sequence[SweepRun], texts: Mapping[str, Mapping[str, str]], samples: Mapping[str, Sample], target: Target
) -> tuple[str, list[dict[str, Any]], list[dict[str, Any]]]:
    """Score every run.

    Args:
        runs: The runs, the unsteered one among them.
        texts: Run → id → text, of the same ids.
        samples: id → sample, of the same ids.
        target: What steering is to bring about.

    Returns:
        Which score is the quality: of captions CIDEr; of answers the accuracy `elsewhere`, on questions of other types
        than the target's, which are to stay as they are, or overall where there are none. One row a run: what it is,
        `scores` and `intervals` (95 %), `changes` from the unsteered run with their paired intervals, `pareto` (whether
        no other steered run, nor the unsteered one, is at least as good in both target and quality and better in one),
        and for answers `rises` and `selection`. And one row a run and sample: its text and values.
    """
    before = answer_counts(texts[UNSTEERED].values())
    plain = _measures(texts[UNSTEERED], texts[UNSTEERED], samples, target)
    quality = next(name for name in (_ELSEWHERE, "overall", "CIDEr") if name in plain)
    unsteered = bootstrap(plain)
    rows: list[dict[str, Any]] = []
    values: list[dict[str, Any]] = []
    for run in runs:
        measures = _measures(texts[run.name], texts[UNSTEERED], samples, target)
        # Run by run, which draws the same resamples: all runs together would fill the memory.
        scored = bootstrap(measures)
        row: dict[str, Any] = {
            **asdict(run),
            "scores": {name: one.score for name, one in scored.items()},
            "intervals": {name: list(one.interval()) for name, one in scored.items()},
        }
        if run.kind != "unsteered":
            changes = {name: difference(one, unsteered[name]) for name, one in scored.items()}
            row["changes"] = {name: {"difference": d, "interval": list(i)} for name, (d, i) in changes.items()}
        if target.task == "vqa":
            row |= _answers(before, answer_counts(texts[run.name].values()))
        rows.append(row)
        values += _values(run.name, texts[run.name], measures)
    compared = [row for row in rows if row["kind"] in ("unsteered", "steered")]
    front = _front({row["name"]: (row["scores"]["target"], row["scores"][quality]) for row in compared})
    return quality, [{**row, "pareto": row["name"] in front} for row in rows], values


def clear_directions(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Steered runs that lead to one clear answer, the largest gap first (arXiv 2501.03012, §4); captions have none."""
    found = [
        {"run": row["name"], "target": row["selection"]["targets"][0], "gap": row["selection"]["gap"]}
        for row in rows
        if row["kind"] == "steered" and row.get("selection", {}).get("clear")
    ]
    return sorted(found, key=lambda row: (-row["gap"], row["run"]))


def _measures(
    texts: Mapping[str, str], unsteered: Mapping[str, str], samples: Mapping[str, Sample], target: Target
) -> dict[str, Measure]:
    ids = sorted(texts)
    said = normalize_answer if target.task == "vqa" else str
    changed = [float(said(texts[i]) != said(unsteered[i])) for i in ids]
    common = {"target": _target(texts, target), **text_measures(texts), "changed": mean_measure(changed)}
    if target.task == "caption":
        references = {i: list(samples[i].references) for i in ids}
        return {**caption_measures(texts, references), **common}
    rows = {
        i: {
            "prediction": texts[i],
            "answers": list(samples[i].answers),
            "answer_type": samples[i].answer_type,
            "question_type": samples[i].question_type,
        }
        for i in ids
    }
    accuracy = vqa_measures(rows)
    kind = _target_type(samples, target)
    others = [
        None if samples[i].answer_type == kind else accuracy["overall"].statistics[at, 0] for at, i in enumerate(ids)
    ]
    elsewhere = {} if others.count(None) == len(others) else {_ELSEWHERE: mean_measure(others)}
    return {**accuracy, **elsewhere, **common}


def _target_type(samples: Mapping[str, Sample], target: Target) -> str:
    """The type of most questions that somebody answers so."""
    kinds = Counter(
        sample.answer_type
        for sample in samples.values()
        if target.answer in {normalize_answer(answer) for answer in sample.answers}
    )
    return max(sorted(kinds), key=lambda kind: kinds[kind], default="")


def _target(texts: Mapping[str, str], target: Target) -> Measure:
    """The share of samples with the target, or without it."""
    if target.answer:
        hits = [normalize_answer(texts[i]) == target.answer for i in sorted(texts)]
    else:
        hits = [bool(found) for found in word_share_measure(texts, target.words).statistics[:, 0]]
    return mean_measure([float(hit != target.avoid) for hit in hits])


def _answers(before: Counter[str], after: Counter[str]) -> dict[str, Any]:
    """Answers that rose most, and whether one of them stands out."""
    rises = {answer: after[answer] - before[answer] for answer in after if after[answer] > before[answer]}
    most = sorted(rises, key=lambda answer: (-rises[answer], answer))[:_RISES]
    return {
        "rises": {answer: rises[answer] for answer in most},
        "selection": asdict(select_direction(before, after)),
    }


def _front(goals: Mapping[str, tuple[float, float]]) -> Collection[str]:
    """Names of those that no other is at least equal to in both and better in one."""
    return {
        name
        for name, (x, y) in goals.items()
        if not any(a >= x and b >= y and (a, b) != (x, y) for a, b in goals.values())
    }


def _values(run: str, texts: Mapping[str, str], measures: Mapping[str, Measure]) -> list[dict[str, Any]]:
    """One row a sample: its text, and its value of each measure that is a mean over all samples."""
    means = {
        name: measure.statistics[:, 0]
        for name, measure in measures.items()
        if measure.statistics.shape[1] == 2 and bool((measure.statistics[:, 1] == 1).all())
    }
    return [
        {"run": run, "sample_id": i, "text": texts[i], **{name: float(of[at]) for name, of in means.items()}}
        for at, i in enumerate(sorted(texts))
    ]
