"""What the data modules share whose samples are rows with named columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from .base import PictureDataModule
from .row import Row
from .sample import Sample


class ColumnsDataModule(PictureDataModule):
    """Base of the data modules whose samples are rows, made of named columns.

    Args:
        source: The data set, for messages.
        root: Data folder.
        train_split: Split that `fit` learns from.
        val_split: Split of `validate`.
        test_split: Split of `test`.
        predict_split: Split of `predict`.
        image: Column of the pictures.
        prompt: What is asked about every picture, or what follows each question.
        question: Column of what is asked.
        target: Column of what the model should answer; by default the first of `references`, or the most frequent of
            `answers`.
        references: Column of reference captions, one or a list.
        answers: Column of answers to a question: a list of strings, or of objects with `answer`. VQA accuracy needs
            ten of them: a single one is repeated ten times.
        answer_type: Column of VQAv2's `yes/no`, `number` or `other`.
        question_type: Column of the kinds of questions.
        label: Column of classes.
        sample_id: Column of the ids; by default a sample's is `<split>/<number of its row>`.
        labels: Keep only samples with these labels.
        **loading: `limit` and how batches are loaded, see `PictureDataModule`.
    """

    def __init__(
        self,
        source: str,
        root: str,
        train_split: str,
        val_split: str,
        test_split: str,
        predict_split: str,
        image: str,
        prompt: str = "",
        question: str | None = None,
        target: str | None = None,
        references: str | None = None,
        answers: str | None = None,
        answer_type: str | None = None,
        question_type: str | None = None,
        label: str | None = None,
        sample_id: str | None = None,
        labels: list[str] | None = None,
        **loading: Any,
    ) -> None:
        super().__init__(root, prompt, train_split, val_split, test_split, predict_split, **loading)
        if not prompt and question is None:
            raise ValueError("--data.init_args.prompt or .question must say what is asked about a picture")
        if labels is not None and label is None:
            raise ValueError("--data.init_args.labels needs .label, the column that they are in")
        options = {
            "image": image,
            "question": question,
            "target": target,
            "references": references,
            "answers": answers,
            "answer_type": answer_type,
            "question_type": question_type,
            "label": label,
            "sample_id": sample_id,
        }
        self.columns = {option: column for option, column in options.items() if column is not None}
        self.labels = labels
        self._source = source

    def describe(self, stage: str, most: int | None = None) -> dict[str, Any]:
        """What the samples of a stage depend on."""
        return {**super().describe(stage, most), "columns": self.columns, "labels": self.labels}

    def _read_all(self, stage: str) -> list[Sample]:
        ids: set[str] = set()
        samples = super()._read_all(stage)
        for sample in samples:
            self._check_new(sample.sample_id, ids)
        return samples

    def _check_new(self, sample_id: str, ids: set[str]) -> None:
        """Take up an id that must not be among the others."""
        if sample_id in ids:
            raise ValueError(
                f"{self._source}: two samples have the id {sample_id!r}; leave out --data.init_args.sample_id, "
                "or give a column of unique values"
            )
        ids.add(sample_id)

    def _with_labels(self, split: str, rows: Iterable[Row]) -> Iterator[Row]:
        """Those rows of a split that have one of `labels`."""
        seen: dict[str, None] = {}
        found = False
        for row in rows:
            seen[row.label] = None
            if self.labels is None or row.label in self.labels:
                found = True
                yield row
        if not found:
            wanted = f" with one of --data.init_args.labels, only with {', '.join(seen)}" if seen else ""
            raise ValueError(f"{self._source}: split {split!r} has no row{wanted}")
