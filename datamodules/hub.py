"""Pictures with texts from any data set of the Hugging Face hub, or a local one in a format of `datasets`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import uuid4

from .base import PictureDataModule
from .files import write_whole
from .images import image_path
from .sample import Sample

_WAY_OUT = "see --data.init_args.path, .name and .revision"
_VQA_ANSWERS = 10
# First bytes → ending, for those who look at the folder; pictures are read by their content.
_ENDINGS = {
    b"\xff\xd8": ".jpg",
    b"\x89PNG": ".png",
    b"GIF8": ".gif",
    b"RIFF": ".webp",
    b"BM": ".bmp",
    b"II*\0": ".tif",
    b"MM\0*": ".tif",
}


class HubDataModule(PictureDataModule):
    """Pictures with captions, questions or labels, from a data set that the `datasets` library reads.

    Each row is a sample, in `fit` too. Pictures that are files stay where they are; embedded ones are written to
    `pictures` as they are, once, under names made from their content. A data set's own code is never run.

    A local folder (parquet, JSON, `imagefolder`, …), and a data set of the hub with a `limit`, is read row by row, no
    further than needed; without a `limit`, one of the hub is downloaded whole and kept by `datasets`. For many runs
    over a part of a large one, download it first (`hf download --repo-type dataset`), and give the folder.

    Args:
        path: Id on the hub, or a folder.
        image: Column of the pictures: embedded ones, or names of files in the data set.
        name: Configuration of the data set, where it has several.
        revision: Commit, branch or tag on the hub.
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
        pictures: Folder to write embedded pictures to.
        train_split: Split that `fit` learns from; several are joined with `+`.
        val_split: Split of `validate`.
        test_split: Split of `test`.
        predict_split: Split of `predict`.
        limit: At most this many samples of each split, the first ones.
        batch_size: Samples per batch and process.
        num_workers: Loader processes.
        seed: Seed of the shuffling in `fit`.
        skip_bad_images: Leave out unreadable pictures and list them in the result.
    """

    def __init__(
        self,
        path: str,
        image: str = "image",
        name: str | None = None,
        revision: str | None = None,
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
        pictures: str = "~/.cache/conceptshift/pictures",
        train_split: str = "train",
        val_split: str = "validation",
        test_split: str = "test",
        predict_split: str = "validation",
        limit: int | None = None,
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
        skip_bad_images: bool = False,
    ) -> None:
        super().__init__(
            pictures, prompt, train_split, val_split, test_split, predict_split,
            limit, batch_size, num_workers, seed, skip_bad_images,
        )  # fmt: skip
        if not prompt and question is None:
            raise ValueError("--data.init_args.prompt or .question must say what is asked about a picture")
        if labels is not None and label is None:
            raise ValueError("--data.init_args.labels needs .label, the column that they are in")
        self.path = path
        self.folder = Path(path).expanduser() if Path(path).expanduser().is_dir() else None
        self.name = name
        self.revision = revision
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
        self._hash = ""

    def setup(self, stage: str) -> None:
        """Read the rows of a stage, and write their pictures where that has not been done."""
        self.root.mkdir(parents=True, exist_ok=True)
        super().setup(stage)

    def describe(self, stage: str) -> dict[str, Any]:
        """What the samples of a stage depend on; `hash`, known after `setup`, is of the commit or the local files."""
        return {
            "class": type(self).__name__,
            "path": self.path,
            "name": self.name,
            "revision": self.revision,
            "hash": self._hash,
            "columns": self.columns,
            "labels": self.labels,
            "prompt": self.prompt,
            "split": self.splits[stage],
            "limit": self.limit,
        }

    def read(self, split: str, training: bool) -> list[Sample]:
        """Read one split; see the class for what a sample is."""
        seen: dict[str, None] = {}
        samples = list(islice(self._samples_of(split, seen), self.limit))
        if not samples:
            wanted = f" with one of --data.init_args.labels, only with {', '.join(seen)}" if seen else ""
            raise ValueError(f"{self.path}: split {split!r} has no row{wanted}")
        return samples

    def _read_all(self, stage: str) -> list[Sample]:
        samples = super()._read_all(stage)
        ids: set[str] = set()
        for sample in samples:
            if sample.sample_id in ids:
                raise ValueError(
                    f"{self.path}: two samples have the id {sample.sample_id!r}; leave out --data.init_args.sample_id, "
                    "or give a column of unique values"
                )
            ids.add(sample.sample_id)
        return samples

    def _samples_of(self, split: str, seen: dict[str, None]) -> Iterator[Sample]:
        """The samples of a split.

        Args:
            split: Its name.
            seen: Takes up the labels that come by.
        """
        rows, names = self._open(split)
        for number, values in enumerate(self._one_by_one(rows)):
            row = _Row(self.path, self.columns, number, values)
            label = row.label(names)
            seen[label] = None
            if self.labels is None or label in self.labels:
                yield self._sample(row, label, f"{split}/{number}")

    def _sample(self, row: _Row, label: str, row_id: str) -> Sample:
        references, answers = row.references(), row.answers()
        return Sample(
            sample_id=row.name("sample_id") or row_id,
            image=self._picture(row),
            prompt=row.text("question") + self.prompt,
            target=row.text("target") or next(iter(references), "") or max(answers, key=answers.count, default=""),
            references=references,
            answers=answers * _VQA_ANSWERS if len(answers) == 1 else answers,
            answer_type=row.text("answer_type"),
            question_type=row.text("question_type"),
            label=label,
        )

    def _open(self, split: str) -> tuple[Iterable[dict[str, Any]], list[str] | None]:
        """Rows of a split, without any that is read yet, and the names of the label's classes if they are numbered."""
        # Takes a second to import, which no other data module needs.
        import datasets

        builder, splits = self._builder_and_splits()
        if split not in splits:
            raise ValueError(f"{self.path}: no split {split!r}; it has {', '.join(splits)}")
        self._hash = builder.hash
        rows = splits[split]
        # JSON has no declared columns.
        features: Mapping[str, Any] = rows.features or dict.fromkeys(next(iter(self._one_by_one(rows)), {}))
        for option, column in self.columns.items():
            if column not in features:
                raise ValueError(
                    f"{self.path}: no column {column!r} for --data.init_args.{option}; it has {', '.join(features)}"
                )
        rows = rows.select_columns(sorted(set(self.columns.values())))
        if isinstance(features[self.columns["image"]], datasets.Image):
            rows = rows.cast_column(self.columns["image"], datasets.Image(decode=False))
        return rows, getattr(features.get(self.columns.get("label", "")), "names", None)

    def _builder_and_splits(self) -> tuple[Any, Mapping[str, Any]]:
        import datasets

        # As it is given, a folder called "json" would be taken for the format.
        path = self.path if self.folder is None else str(self.folder.absolute())
        try:
            builder = datasets.load_dataset_builder(path, self.name, revision=self.revision)
            if self.folder is not None or self.limit is not None:
                return builder, builder.as_streaming_dataset()
            builder.download_and_prepare()
            return builder, builder.as_dataset()
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            raise _in_a_line(self.path, error) from error

    def _one_by_one(self, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The rows; what goes wrong while they are read is told in a line."""
        import datasets

        try:
            yield from rows
        except (OSError, ValueError, TypeError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            raise _in_a_line(self.path, error) from error

    def _picture(self, row: _Row) -> Path:
        """The file of a row's picture; of a row without one, a file that is not there, as of any missing picture."""
        match row.values["image"]:
            case bytes(content) | {"bytes": bytes(content)}:
                return self._kept(content)
            case str(name) | {"path": str(name)}:
                return self._file(name)
            case None | {"path": None}:
                return self.root / f"no picture in row {row.number}"
        raise row.odd("image", "pictures")

    def _kept(self, content: bytes) -> Path:
        """Write a picture where it is not there yet."""
        ending = next((ending for start, ending in _ENDINGS.items() if content.startswith(start)), "")
        path = self.root / f"{hashlib.sha256(content).hexdigest()[:40]}{ending}"
        if not path.is_file():
            # Several processes may write the same picture.
            own = self.root / f".{uuid4().hex}"
            write_whole(own, lambda working: working.write_bytes(content))
            os.replace(own, path)
        return path

    def _file(self, name: str) -> Path:
        """A picture that the data set names: a file, or something within an archive or on the hub."""
        import datasets
        import pyarrow as pa

        if "://" in name:
            if not self._has(name.split("::")[-1]):
                raise ValueError(
                    f"{self.path}: {name} is no picture of this data set; download them, and give a folder"
                )
            as_named = pa.array([{"bytes": None, "path": name}], datasets.Image.pa_type)
            return self._kept(datasets.Image().embed_storage(as_named)[0].as_py()["bytes"])
        if self.folder is not None:
            return image_path(self.folder, name)
        cache = Path(datasets.config.HF_CACHE_HOME).resolve()
        if not Path(name).resolve().is_relative_to(cache):
            raise ValueError(f"{self.path}: has no picture {name!r}, only its name; download them, and give a folder")
        return Path(name)

    def _has(self, source: str) -> bool:
        """Whether a file on the hub or an archive is of this data set."""
        if self.folder is None:
            return source.startswith(f"hf://datasets/{self.path}@")
        return Path(source).resolve().is_relative_to(self.folder.resolve())


class _Row:
    """The values of one row, by option, checked for their types."""

    def __init__(self, path: str, columns: Mapping[str, str], number: int, values: Mapping[str, Any]) -> None:
        self.path = path
        self.columns = columns
        self.number = number
        self.values = {option: values[column] for option, column in columns.items()}

    def odd(self, option: str, expected: str) -> ValueError:
        """The error for a value of another type."""
        return ValueError(
            f"{self.path}: column {self.columns[option]!r}, row {self.number}: expected {expected} for "
            f"--data.init_args.{option}, got {type(self.values[option]).__name__}"
        )

    def text(self, option: str) -> str:
        """A text; empty where there is none."""
        match self.values.get(option):
            case None:
                return ""
            case str(text):
                return text
        raise self.odd(option, "a text")

    def name(self, option: str) -> str:
        """A text or a number."""
        match self.values.get(option):
            case None:
                return ""
            case str() | int() as value:
                return str(value)
        raise self.odd(option, "texts or numbers")

    def label(self, names: list[str] | None) -> str:
        """The label; of numbered classes its name."""
        number = self.values.get("label")
        if names is not None and isinstance(number, int):
            return names[number] if number >= 0 else ""
        return self.name("label")

    def references(self) -> tuple[str, ...]:
        """Reference captions, each on one line."""
        return tuple(" ".join(text.split()) for text in self._list("references"))

    def answers(self) -> tuple[str, ...]:
        """Answers."""
        return self._list("answers")

    def _list(self, option: str) -> tuple[str, ...]:
        match self.values.get(option):
            case None:
                return ()
            case str(text):
                return (text,)
            case list(given):
                found = [each["answer"] if isinstance(each, dict) and "answer" in each else each for each in given]
                if all(isinstance(text, str) for text in found):
                    return tuple(found)
        raise self.odd(option, "a text or a list of texts")


def _in_a_line(path: str, error: Exception) -> ValueError:
    """The error of a data set in one line."""
    reason = " ".join(str(error).split()).split(" Example of usage")[0]
    return ValueError(f"{path}: cannot be read as a data set ({reason}); {_WAY_OUT}")
