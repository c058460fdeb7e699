"""Region phrases in Visual Genome's format: Visual Genome, and Shapes."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from operator import index
from pathlib import Path
from typing import Any

from .base import PictureDataModule
from .captioning import CAPTION_PROMPT
from .sample import Sample
from .word_classes import first_with, has_word, word_class

SPLITS = {"train": 0.90, "val": 0.95, "test": 1.00}
"""Split → where its share of the pictures ends: 90 % train, 5 % val, 5 % test."""

_FOLDERS = ("VG_100K", "VG_100K_2")
_CHUNK = 2**20
_BETWEEN = re.compile(r"[\s,]*")


class VisualGenomeDataModule(PictureDataModule):
    """Pictures with phrases about their regions, from Visual Genome's `region_descriptions.json`.

    For `fit`, each phrase is a sample of its own (id `<picture>#<region_id>`; it has no other references); otherwise
    each picture with a phrase is one (id `<picture>`) with all its phrases as references. The model sees the whole
    picture in both cases.

    There is no official split: a hash of the picture's id decides, whatever else is in the file (see `SPLITS`). About
    half of the pictures are COCO's, from its train and val folders alike (`coco_id` in `image_data.json` says which):
    a model that learned here may have seen what it is scored on there.

    The file has some 5.4 million phrases of 108,000 pictures. It is read picture by picture, and only what the filters
    keep stays in memory. For comparison, arXiv 2501.03012 (A.2) fine-tuned on about 21,000 phrases with colors, 27,000
    with places and 5,000 with sentiments, by word lists of its own.

    Args:
        root: Folder with `region_descriptions.json` and the pictures in `VG_100K` and `VG_100K_2`.
        prompt: What the model is asked.
        train_split: Split that `fit` learns from; several are joined with `+`.
        val_split: Split of `validate`.
        test_split: Split of `test`.
        predict_split: Split of `predict`.
        caption_words: Learn only from phrases with a word of this class: `colors`, `places`, `sentiments`, a list of
            words, or a `.txt` file with one word a line. Validation and prediction keep all pictures and phrases.
        reference_words: Keep only pictures with one of these words in a phrase, e.g. a token of interest. In
            validation and prediction the first phrase that has one is the target.
        **loading: `limit` and how batches are loaded, see `PictureDataModule`.
    """

    def __init__(
        self,
        root: str,
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
        self.caption_words = None if caption_words is None else word_class(caption_words)
        self.reference_words = None if reference_words is None else word_class(reference_words)

    def describe(self, stage: str, most: int | None = None) -> dict[str, Any]:
        """What the samples of a stage depend on."""
        return {
            **super().describe(stage, most),
            "caption_words": None if self.caption_words is None else sorted(self.caption_words),
            "reference_words": None if self.reference_words is None else sorted(self.reference_words),
        }

    def filters(self, training: bool) -> list[str]:
        """`caption_words` and `reference_words`, as far as they are given and apply."""
        words = {"caption_words": self.caption_words if training else None, "reference_words": self.reference_words}
        return [name for name, given in words.items() if given is not None]

    def read(self, split: str, training: bool) -> list[Sample]:
        """Read one split; see the class for what a sample is."""
        if split not in SPLITS:
            raise ValueError(f"{self.root}: no split {split!r}; Visual Genome is split into {', '.join(SPLITS)}")
        folders = self._picture_folders()
        path = self.root / "region_descriptions.json"
        samples: list[Sample] = []
        try:
            for row in _entries(path):
                if split_of(picture := index(row["id"])) == split:
                    image = folders.get(f"{picture}.jpg", self.root / _FOLDERS[0]) / f"{picture}.jpg"
                    samples += self._samples_of(picture, image, row["regions"], training)
                    if self.limit is not None and len(samples) >= self.limit:
                        break
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}: an entry lacks {error}; is this Visual Genome's region_descriptions.json?"
            ) from error
        return samples

    def _samples_of(self, picture: int, image: Path, regions: list[dict[str, Any]], training: bool) -> Iterator[Sample]:
        phrases = [(region["region_id"], " ".join(region["phrase"].split())) for region in regions]
        references = tuple(phrase for _, phrase in phrases if phrase)
        if not any(has_word(phrase, self.reference_words) for phrase in references):
            return
        if training:
            for region, phrase in phrases:
                if phrase and has_word(phrase, self.caption_words):
                    yield Sample(f"{picture}#{region}", image, self.prompt, phrase)
        else:
            target = first_with(self.reference_words or self.caption_words, references)
            yield Sample(str(picture), image, self.prompt, target, references)

    def _picture_folders(self) -> dict[str, Path]:
        """File name → folder: no id tells in which of the two a picture is."""
        found = [self.root / name for name in _FOLDERS if (self.root / name).is_dir()]
        if not found:
            raise FileNotFoundError(
                f"{self.root}: neither {' nor '.join(_FOLDERS)} is there; unpack Visual Genome's pictures into it"
            )
        return {entry.name: folder for folder in found for entry in os.scandir(folder)}


def split_of(picture: int) -> str:
    """Split of a picture, by a hash of its id.

    The hash is not that of the bare id, by which `DictionaryFitter.held_out` chooses: within one split, it would hold
    out all pictures or none.
    """
    place = int.from_bytes(hashlib.sha256(f"visual genome {picture}".encode()).digest()[:8]) / 2**64
    return next(split for split, end in SPLITS.items() if place < end)


def _entries(path: Path) -> Iterator[Any]:
    """The entries of a JSON list, one by one: a file of 700 MB would take several GB as a whole."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such annotation file; is --data.init_args.root right?")
    decode = json.JSONDecoder().raw_decode
    try:
        with path.open(encoding="utf-8") as file:
            text, at = file.read(_CHUNK).lstrip(), 1
            if not text.startswith("["):
                raise ValueError(
                    f"{path}: expected a list of pictures; is this Visual Genome's region_descriptions.json?"
                )
            while True:
                at = _BETWEEN.match(text, at).end()  # type: ignore[union-attr]
                try:
                    entry, at = decode(text, at)
                except json.JSONDecodeError as error:
                    if text.startswith("]", at):
                        return
                    # Twice as much each time: a damaged file is not decoded over and over.
                    more = file.read(max(_CHUNK, len(text) - at))
                    if not more:
                        raise ValueError(
                            f"{path}: malformed JSON ({error.msg}); download or generate it again"
                        ) from error
                    text, at = text[at:] + more, 0
                else:
                    yield entry
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: malformed JSON ({error}); download or generate it again") from error
