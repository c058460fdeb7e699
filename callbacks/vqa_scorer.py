"""Scores answers while a model is validated."""

from __future__ import annotations

from typing import Any

from ..datamodules.sample import Batch
from ..metrics import VQAAccuracy, answer_counts
from .scorer import Scorer


class VQAScorer(Scorer):
    """Official VQA accuracy, overall, per answer type and per question type, and the count of each answer.

    Args:
        out: JSON file to write: scores, answers, counts, skipped samples.
    """

    def __init__(self, out: str | None = None) -> None:
        super().__init__(VQAAccuracy(), "vqa", out)

    def add(self, batch: Batch, texts: list[str]) -> None:
        """Give one batch of answers to the metric."""
        assert isinstance(self.metric, VQAAccuracy)
        self.metric.update(
            batch.sample_ids,
            texts,
            [sample.answers for sample in batch.samples],
            [sample.answer_type for sample in batch.samples],
            [sample.question_type for sample in batch.samples],
        )

    def summary(self, rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """How often each whole normalised answer was given, most frequent first."""
        counts = answer_counts(row["prediction"] for row in rows.values())
        return {"answers": dict(counts.most_common())}
