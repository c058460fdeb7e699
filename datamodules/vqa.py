"""Questions and answers in VQAv2's format: VQAv2 on COCO, and Shapes."""

from __future__ import annotations

from typing import Any

from .annotations import read_annotations
from .base import PictureDataModule
from .images import image_path
from .sample import Sample

VQA_PROMPT = "\nAnswer the question using a single word or phrase."


class VQADataModule(PictureDataModule):
    """Questions about pictures with ten answers each, from VQAv2's files under their published names.

    A split is the name of a COCO folder (`train2014`, `val2014`): it reads
    `v2_OpenEnded_mscoco_<split>_questions.json` and `v2_mscoco_<split>_annotations.json` in `root`, and
    `<split>/COCO_<split>_<image id, 12 digits>.jpg`. The sample id is the question id.

    Args:
        root: Folder with the two files and the picture folder.
        prompt: What follows each question.
        train_split: Split that `fit` learns from.
        val_split: Split of `validate`.
        test_split: Split of `test`; VQAv2's own test answers are not public.
        predict_split: Split of `predict`.
        answer_types: Keep only questions of these types (`yes/no`, `number`, `other`); all by default.
        **loading: `limit` and how batches are loaded, see `PictureDataModule`.
    """

    def __init__(
        self,
        root: str,
        prompt: str = VQA_PROMPT,
        train_split: str = "train2014",
        val_split: str = "val2014",
        test_split: str = "val2014",
        predict_split: str = "val2014",
        answer_types: list[str] | None = None,
        **loading: Any,
    ) -> None:
        super().__init__(root, prompt, train_split, val_split, test_split, predict_split, **loading)
        self.answer_types = answer_types

    def describe(self, stage: str, most: int | None = None) -> dict[str, Any]:
        """What the samples of a stage depend on."""
        return {**super().describe(stage, most), "answer_types": self.answer_types}

    def read(self, split: str, training: bool) -> list[Sample]:
        """Read one split; see the class for what a sample is."""
        questions_path = self.root / f"v2_OpenEnded_mscoco_{split}_questions.json"
        answers_path = self.root / f"v2_mscoco_{split}_annotations.json"
        found = sorted(path.name.split("_")[2] for path in self.root.glob("v2_mscoco_*_annotations.json"))
        if not answers_path.is_file() and found:
            raise ValueError(f"{self.root}: no VQA split {split!r}; it has {', '.join(found)}")
        questions = read_annotations(questions_path, "questions")["questions"]
        annotations = read_annotations(answers_path, "annotations")["annotations"]
        try:
            by_id = {row["question_id"]: row for row in annotations}
            samples = [self._sample(row, by_id[row["question_id"]], split) for row in questions]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{questions_path}: an entry has no match or key {error}; are both files VQAv2's?"
            ) from error
        if self.answer_types is None:
            return samples
        known = sorted({sample.answer_type for sample in samples})
        unknown = sorted(set(self.answer_types) - set(known))
        if unknown:
            raise ValueError(f"--data.init_args.answer_types: no {unknown[0]!r}; {answers_path} has {', '.join(known)}")
        return [sample for sample in samples if sample.answer_type in self.answer_types]

    def _sample(self, question: dict[str, Any], answer: dict[str, Any], split: str) -> Sample:
        filename = f"COCO_{split}_{int(question['image_id']):012d}.jpg"
        return Sample(
            sample_id=str(question["question_id"]),
            image=image_path(self.root, split, filename),
            prompt=question["question"] + self.prompt,
            target=answer["multiple_choice_answer"],
            answers=tuple(given["answer"] for given in answer["answers"]),
            answer_type=answer["answer_type"],
            question_type=answer["question_type"],
        )
