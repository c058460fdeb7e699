"""Captions in Karpathy's format: COCO, Flickr, and Shapes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .annotations import read_annotations
from .base import PictureDataModule
from .images import image_path
from .sample import Sample
from .word_classes import first_with, has_word, word_class

CAPTION_PROMPT = "Provide a one-sentence caption for the provided image."


class CaptionDataModule(PictureDataModule):
    """Pictures with reference captions, from a Karpathy `dataset_*.json`.

    For `fit`, each caption is a sample of its own (id `<picture>#<sentence>`); otherwise each picture is one
    (id `<picture>`) with all its captions as references. A picture's id is its `cocoid`, or its `imgid` where
    the file has none.

    Args:
        root: Folder with the annotation file and the picture folders it names.
        annotations: Name of the annotation file in `root`.
        prompt: What the model is asked.
        train_split: Split that `fit` learns from; `train+restval` joins two.
        val_split: Split of `validate`.
        test_split: Split of `test`.
        predict_split: Split of `predict`.
        caption_words: Learn only from captions with a word of this class: `colors`, `places`, `sentiments`, a
            list of words, or a `.txt` file with one word a line. Validation and prediction keep all pictures and
            captions.
        reference_words: Keep only pictures with one of these words in a reference, e.g. a token of interest. In
            validation and prediction the first caption that has one is the target.
        **loading: `limit` and how batches are loaded, see `PictureDataModule`.
    """

    def __init__(
        self,
        root: str,
        annotations: str = "dataset_coco.json",
        prompt: str = CAPTION_PROMPT,
        train_split: str = "train",
        val_split: str = "val",
        test_split: str = "test",
        predict_split: str = "val",
        caption_words: str | list[str] | None = None,
        reference_words: str | list[str] | None = None,
        **loading: Any,
    ) -> None:
        super().__init__(root, prompt, train_split, val_split, test_split, predict_split, **loading)
        self.annotations = annotations
        self.caption_words = None if caption_words is None else word_class(caption_words)
        self.reference_words = None if reference_words is None else word_class(reference_words)

    def describe(self, stage: str, most: int | None = None) -> dict[str, Any]:
        """What the samples of a stage depend on."""
        return {
            **super().describe(stage, most),
            "annotations": self.annotations,
            "caption_words": None if self.caption_words is None else sorted(self.caption_words),
            "reference_words": None if self.reference_words is None else sorted(self.reference_words),
        }

    def filters(self, training: bool) -> list[str]:
        """`caption_words` and `reference_words`, as far as they are given and apply."""
        words = {"caption_words": self.caption_words if training else None, "reference_words": self.reference_words}
        return [name for name, given in words.items() if given is not None]

    def read(self, split: str, training: bool) -> list[Sample]:
        """Read one split; see the class for what a sample is."""
        path = self.root / self.annotations
        rows = read_annotations(path, "images")["images"]
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{path}: expected a list of objects under `images`; is this Karpathy's format?")
        splits = sorted({str(row.get("split")) for row in rows})
        if split not in splits:
            raise ValueError(f"{path}: no split {split!r}; it has {', '.join(splits)}")
        try:
            samples = [self._samples_of(row, training) for row in rows if row["split"] == split]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: an entry of `images` lacks {error}; is this Karpathy's format?") from error
        return [sample for of_picture in samples for sample in of_picture]

    def _samples_of(self, row: dict[str, Any], training: bool) -> Iterable[Sample]:
        picture = str(row["cocoid"] if "cocoid" in row else row["imgid"])
        path = image_path(self.root, row.get("filepath", ""), row["filename"])
        references = tuple(" ".join(sentence["raw"].split()) for sentence in row["sentences"])
        if not references:
            raise KeyError("sentences")
        if not any(has_word(text, self.reference_words) for text in references):
            return []
        if training:
            return [
                Sample(f"{picture}#{number}", path, self.prompt, caption, references)
                for number, caption in enumerate(references)
                if has_word(caption, self.caption_words)
            ]
        target = first_with(self.reference_words or self.caption_words, references)
        return [Sample(picture, path, self.prompt, target, references)]
