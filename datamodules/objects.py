"""Objects in pictures, to be described, confirmed, or asked about: COCO instances, and Shapes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from ..records.hashes import file_hash
from ..records.paths import user_path
from .annotations import read_annotations
from .base import PictureDataModule
from .captioning import CAPTION_PROMPT
from .images import image_path
from .instances import InstanceFile, PictureInstances
from .object_names import ObjectNames, with_article
from .sample import Sample
from .vqa import VQA_PROMPT, VQADataModule

Setting = Literal["generative", "polling", "vqa"]

SETTINGS: tuple[Setting, ...] = ("generative", "polling", "vqa")

_KARPATHY = "dataset_coco.json"


class ObjectDataModule(PictureDataModule):
    """Objects in pictures with their masks; a sample is a picture and a class of objects in it, in one setting.

    - `generative` (id `generative/<image>/<class>`): the model describes the picture and is to name the class.
    - `polling` (`polling/<image>/<class>`): it is asked whether there is such an object; yes is right.
    - `vqa` (`vqa/<question>`): VQAv2's questions about it: those in which question or most frequent answer name
      exactly one class that is in the picture.

    A split is the name of a COCO folder (`val2014`). It reads the masks, in `vqa` also the two files that
    `VQADataModule` reads, and, where it is there, Karpathy's `dataset_coco.json` for reference captions. The samples of
    a picture come after each other. Each has all `instances` of its picture, crowds among them; a class with a crowd is
    no sample, because its objects are not told apart.

    After `setup`, `names` finds the classes in texts.

    Args:
        root: Folder with the annotation files and the picture folders.
        settings: Some of `generative`, `polling` and `vqa`.
        annotations: Name of the file of instances in `root`.
        categories: Only these classes; all by default.
        least_area: Share of the picture that the objects of a class must cover together. A patch of LLaVA-1.5 is 0.0017
            of it.
        most_area: Share of the picture that they may cover together.
        generative_prompt: What is asked for in `generative`.
        polling_prompt: The question of `polling`; {object} stands for the class with its article.
        vqa_prompt: What follows each question of `vqa`.
        synonyms: A JSON or YAML file, class → list of words that mean it, in the singular; they take the place of those
            built in.
        train_split: Split that `fit` learns from.
        val_split: Split of `validate`.
        test_split: Split of `test`.
        predict_split: Split of `predict`.
        limit: At most this many pictures of each split, the first that have samples; all by default. So all settings
            are about the same pictures.
        **loading: How batches are loaded, see `PictureDataModule`.
    """

    def __init__(
        self,
        root: str,
        settings: list[Setting] | None = None,
        annotations: str = "annotations/instances_{split}.json",
        categories: list[str] | None = None,
        least_area: float = 0.002,
        most_area: float = 1.0,
        generative_prompt: str = CAPTION_PROMPT,
        polling_prompt: str = "Is there {object} in the image?" + VQA_PROMPT,
        vqa_prompt: str = VQA_PROMPT,
        synonyms: str | None = None,
        train_split: str = "train2014",
        val_split: str = "val2014",
        test_split: str = "val2014",
        predict_split: str = "val2014",
        limit: int | None = None,
        **loading: Any,
    ) -> None:
        super().__init__(
            root, generative_prompt, train_split, val_split, test_split, predict_split, limit=limit, **loading
        )
        self.settings = list(SETTINGS) if settings is None else settings
        if not self.settings or set(self.settings) - set(SETTINGS):
            raise ValueError(f"--data.init_args.settings: expected some of {', '.join(SETTINGS)}, got {self.settings}")
        if not 0 <= least_area <= most_area <= 1:
            raise ValueError(
                "--data.init_args.least_area and .most_area are shares of a picture, the first at most the second, got "
                f"{least_area} and {most_area}"
            )
        if "{object}" not in polling_prompt:
            raise ValueError("--data.init_args.polling_prompt: write {object} where the object is to stand")
        self.annotations = annotations
        self.categories = categories
        self.least_area = least_area
        self.most_area = most_area
        self.polling_prompt = polling_prompt
        self.vqa_prompt = vqa_prompt
        self.synonyms = None if synonyms is None else user_path(synonyms)
        self.names = ObjectNames({})

    def describe(self, stage: str, most: int | None = None) -> dict[str, Any]:
        """What the samples of a stage depend on."""
        return {
            **super().describe(stage, most),
            "settings": self.settings,
            "annotations": self.annotations,
            "categories": self.categories,
            "least_area": self.least_area,
            "most_area": self.most_area,
            "polling_prompt": self.polling_prompt,
            "vqa_prompt": self.vqa_prompt,
            "synonyms": None if self.synonyms is None else str(self.synonyms),
            "synonyms_hash": None if self.synonyms is None else file_hash(self.synonyms),
        }

    def available(self, stage: str) -> int | None:
        """Not known with a limit: the masks behind it are not read."""
        return super().available(stage) if self.limit is None else None

    def limited(self, samples: list[Sample]) -> list[Sample]:
        """All samples of the first `limit` pictures."""
        pictures = set(islice(dict.fromkeys(sample.image for sample in samples), self.limit))
        return [sample for sample in samples if sample.image in pictures]

    def read(self, split: str, training: bool) -> list[Sample]:
        """Read one split; see the class for what a sample is."""
        file = InstanceFile(self.root / self.annotations.format(split=split))
        known = list(dict.fromkeys([*self.names.categories, *file.categories]))
        if unknown := sorted(set(self.categories or ()) - set(known)):
            raise ValueError(
                f"--data.init_args.categories: no {unknown[0]!r}; {file.path} has {', '.join(file.categories)}"
            )
        self.names = ObjectNames.from_categories(known, self.synonyms)
        of_pictures = (samples for samples in self._of_pictures(file, split) if samples)
        found = [sample for samples in islice(of_pictures, self.limit) for sample in samples]
        if not found:
            raise ValueError(
                f"{file.path}: no picture has what is asked for; change --data.init_args.categories, .settings, "
                ".least_area or .most_area"
            )
        return found

    def _of_pictures(self, file: InstanceFile, split: str) -> Iterator[list[Sample]]:
        """The samples of each picture."""
        references = self._references() if "generative" in self.settings else {}
        questions = self._questions(split) if "vqa" in self.settings else {}
        for picture in file.pictures():
            path = image_path(self.root, split, picture.file_name)
            objects = self._objects(picture)
            samples = []
            for name in objects:
                if "generative" in self.settings:
                    samples.append(self._described(picture, path, name, references.get(picture.file_name, ())))
                if "polling" in self.settings:
                    samples.append(self._polled(picture, path, name))
            yield samples + self._asked(questions.get(path, []), picture, objects)

    def _objects(self, picture: PictureInstances) -> list[str]:
        """The classes of a picture that are samples."""
        names = dict.fromkeys(one.category for one in picture.instances)
        return [
            name
            for name in names
            if name not in picture.crowds
            and (self.categories is None or name in self.categories)
            and self.least_area <= picture.share(name) <= self.most_area
        ]

    def _described(self, picture: PictureInstances, path: Path, name: str, references: tuple[str, ...]) -> Sample:
        return Sample(
            sample_id=f"generative/{picture.image_id}/{name}",
            image=path,
            prompt=self.prompt,
            target=name,
            references=references,
            instances=picture.instances,
            object=name,
            setting="generative",
        )

    def _polled(self, picture: PictureInstances, path: Path, name: str) -> Sample:
        return Sample(
            sample_id=f"polling/{picture.image_id}/{name}",
            image=path,
            prompt=self.polling_prompt.replace("{object}", with_article(name)),
            target="yes",
            answers=("yes",) * 10,
            answer_type="yes/no",
            question_type="is there",
            instances=picture.instances,
            object=name,
            setting="polling",
        )

    def _asked(self, questions: list[Sample], picture: PictureInstances, objects: list[str]) -> list[Sample]:
        """The questions that are about one class of a picture, if that is among its `objects`."""
        there = {one.category for one in picture.instances}
        samples = []
        for question in questions:
            text = question.prompt.removesuffix(self.vqa_prompt)
            about = there & {*self.names.named(text), *self.names.named(question.target)}
            if len(about) == 1 and about <= set(objects):
                samples.append(
                    replace(
                        question,
                        sample_id=f"vqa/{question.sample_id}",
                        instances=picture.instances,
                        object=about.pop(),
                        setting="vqa",
                    )
                )
        return samples

    def _questions(self, split: str) -> dict[Path, list[Sample]]:
        """Picture → VQAv2's questions."""
        try:
            samples = VQADataModule(str(self.root), self.vqa_prompt).read(split, training=False)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; without it, leave `vqa` out of --data.init_args.settings") from error
        of_pictures: dict[Path, list[Sample]] = {}
        for sample in samples:
            of_pictures.setdefault(sample.image, []).append(sample)
        return of_pictures

    def _references(self) -> dict[str, tuple[str, ...]]:
        """Name of a picture → its reference captions, where Karpathy's file is there."""
        path = self.root / _KARPATHY
        if not path.is_file():
            return {}
        try:
            return {
                row["filename"]: tuple(" ".join(sentence["raw"].split()) for sentence in row["sentences"])
                for row in read_annotations(path, "images")["images"]
            }
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: an entry of `images` lacks {error}; is this Karpathy's format?") from error
