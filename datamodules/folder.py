"""Pictures in a folder, and JSON lines that say what belongs to them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from .columns import ColumnsDataModule
from .images import BadImageError, image_path
from .row import Row
from .sample import Sample


class FolderDataModule(ColumnsDataModule):
    """A folder of pictures with captions, questions or labels in JSON lines: each line an object, and a sample.

    A split is the name of a file in `root` without its ending: `metadata` reads `metadata.jsonl`. The columns are the
    keys of the lines; each that is named here must be in every line, and `null` is no value. A sample's number is its
    line's. Nothing but JSON and pictures is read.

    Args:
        root: Folder with the JSON lines and the pictures.
        image: Key of the pictures' file names, which start from `root`.
        train_split: Split that `fit` learns from; several are joined with `+`.
        val_split: Split of `validate`.
        test_split: Split of `test`.
        predict_split: Split of `predict`.
        **options: See `ColumnsDataModule`.
    """

    def __init__(
        self,
        root: str,
        image: str = "file_name",
        train_split: str = "train",
        val_split: str = "val",
        test_split: str = "test",
        predict_split: str = "metadata",
        **options: Any,
    ) -> None:
        super().__init__(root, root, train_split, val_split, test_split, predict_split, image, **options)

    def read(self, split: str, training: bool) -> list[Sample]:
        """Read one split; see the class for what a sample is."""
        rows = self._with_labels(split, self._rows(split))
        return [row.sample(self._picture(row), self.prompt) for row in islice(rows, self.limit)]

    def available(self, stage: str) -> int | None:
        """The lines of a stage's files; not known where `labels` choose among them."""
        if self.labels is not None:
            return None
        return sum(self._lines(split) for split in self.splits[stage].split("+"))

    def _lines(self, split: str) -> int:
        with (self.root / f"{split}.jsonl").open("rb") as file:
            return sum(bool(line.strip()) for line in file)

    def _rows(self, split: str) -> Iterator[Row]:
        path = self.root / f"{split}.jsonl"
        if not path.is_file():
            found = ", ".join(sorted(file.stem for file in self.root.glob("*.jsonl"))) or "none"
            raise FileNotFoundError(f"{path}: no such file; the splits of --data.init_args.root are: {found}")
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    place = f"{path}: line {number}"
                    yield Row.of(f"{split}/{number}", place, self.columns, self._values(place, line))

    def _values(self, place: str, line: bytes) -> dict[str, Any]:
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: malformed JSON ({getattr(error, 'msg', error)}); mend the line") from error
        if not isinstance(values, dict):
            raise ValueError(f"{place}: expected an object, got {type(values).__name__}; mend the line")
        for option, key in self.columns.items():
            if key not in values:
                raise ValueError(f"{place}: no key {key!r} for --data.init_args.{option}; it has {', '.join(values)}")
        return values

    def _picture(self, row: Row) -> Path:
        name = row.value("image")
        if not isinstance(name, str):
            raise row.odd("image", "a file name")
        try:
            return image_path(self.root, name)
        except BadImageError as error:
            raise ValueError(f"{row.place}: {error}") from error
