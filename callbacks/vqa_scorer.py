"""Scores answers while a model is validated, tested, or read."""

from __future__ import annotations

from typing import Any

import lightning as L

from ..datamodules.base import PictureDataModule
from ..datamodules.sample import Batch
from ..metrics import Measure, VQAAccuracy, answer_counts, learn_answer_types, normalize_answer, predicted_types
from ..records.hashes import file_hash
from ..records.paths import user_path
from .parts.questions import check_questions
from .scorer import Rows, Scorer, read_object


class VQAScorer(Scorer):
    """Official VQA accuracy, overall, per answer type and per question type, and the count of each answer.

    Args:
        out: JSON file to write: scores with 95 % intervals, answers with their accuracy, counts, skipped samples;
            by default `answers.json` in the run's folder, if it has one, and not while a model is trained.
        baseline: File that a VQAScorer wrote for another run, usually the unsteered one: what has changed since then
            is written too.
        variant: Whose answers to score in `predict`: `original`, or the name of a destination.
        training_annotations: Annotation file of VQAv2's training questions, from which the type of each answer is
            learned: which types of answers the model gives to each type of question is written too.
    """

    place = "answers{variant}.json"

    def __init__(
        self,
        out: str | None = None,
        baseline: str | None = None,
        variant: str = "original",
        training_annotations: str | None = None,
    ) -> None:
        super().__init__(VQAAccuracy(), "vqa", "prediction", out, baseline, variant)
        self.training_annotations = None if training_annotations is None else user_path(training_annotations)
        self._types: dict[str, str] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what could not be done at the end."""
        super().setup(trainer, pl_module, stage)
        if self.training_annotations is not None and not self.writes_at_all:
            raise ValueError("VQAScorer.training_annotations: set `out` too, for the types of the answers")
        data = getattr(trainer, "datamodule", None)
        if isinstance(data, PictureDataModule):
            check_questions(data.samples("validate" if stage == "fit" else stage))

    def prepare(self) -> None:
        """Read the baseline, and learn the type of each answer."""
        super().prepare()
        if self.training_annotations is not None:
            option = "VQAScorer.training_annotations"
            content = read_object(self.training_annotations, option, "annotations")
            try:
                self._types = learn_answer_types(content["annotations"])
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{option}: {self.training_annotations} holds no VQAv2 annotations ({error}); is it the right file?"
                ) from error

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

    def values(self, measures: dict[str, Measure]) -> dict[str, Measure]:
        """The accuracy of each answer."""
        return {"accuracy": measures["overall"]}

    def said(self, row: Any) -> str:
        """The normalised answer."""
        return normalize_answer(row["prediction"])

    def summary(self, rows: Rows) -> dict[str, Any]:
        """How often each whole normalised answer was given, most frequent first; and the types of the answers."""
        counts = answer_counts(row["prediction"] for row in rows.values())
        summary: dict[str, Any] = {"answers": dict(counts.most_common())}
        if self.training_annotations is not None:
            summary["training_annotations_hash"] = file_hash(self.training_annotations)
            summary["predicted_types"] = predicted_types(rows.values(), self._types)
        return summary

    def more_changes(self, before: Rows, after: Rows) -> dict[str, Any]:
        """How often an answer was and is given, where that has changed, the biggest change first."""
        was, now = (answer_counts(row["prediction"] for row in rows.values()) for rows in (before, after))
        changes = {answer: [was[answer], now[answer]] for answer in was | now if was[answer] != now[answer]}
        return {"answers": dict(sorted(changes.items(), key=lambda item: (-abs(item[1][1] - item[1][0]), item[0])))}
