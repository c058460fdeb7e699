"""Pictures with texts from any data set of the Hugging Face hub, or a local one in a format of `datasets`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any
from uuid import uuid4

from ..records.files import write_whole
from ..records.paths import located, user_path
from .columns import ColumnsDataModule
from .images import image_path
from .row import Row
from .sample import Batch, Encoder, Sample
from .stream import StreamedPictures, StreamLoader, StreamSampler

_WAY_OUT = "see --data.init_args.path, .name and .revision"
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


class HubDataModule(ColumnsDataModule):
    """Pictures with captions, questions or labels, from a data set that the `datasets` library reads.

    Each row is a sample, in `fit` too. Pictures that are files stay where they are; embedded ones are written to
    `pictures` as they are, once, under names made from their content. A data set's own code is never run, and nothing
    is unpickled: `datasets` refuses both.

    A local folder (parquet, Arrow, JSON, WebDataset, `imagefolder`, …), and a data set of the hub with a `limit`, is
    read row by row before the run, no further than needed; without a `limit`, one of the hub is downloaded whole and
    kept by `datasets`. For many runs over a part of a large one, download it first (`hf download --repo-type dataset`),
    and give the folder.

    With `streaming`, rows are read while the model runs: nothing is downloaded beforehand, and only the ids of what was
    read stay in memory. Samples, ids, batches and what each process gets are the same as without. What differs: each
    process reads the whole stream, and keeps its share; `fit` shuffles in a buffer of 1000 rows, too few to mix rows
    sorted by class, and needs `--trainer.max_steps`; embedded pictures are written by `predict` only; `FeatureWriter`,
    `VQAScorer` and `SweepScorer` list the texts beforehand (of parquet, only those are read for it). `Steerer`,
    `ShiftMonitor` and `MixtureDataModule` need the samples beforehand, and refuse it.

    Args:
        path: Id on the hub, or a folder.
        image: Column of the pictures: embedded ones, or names of files in the data set.
        name: Configuration of the data set, where it has several.
        revision: Commit, branch or tag on the hub.
        streaming: Read rows while the model runs.
        pictures: Folder to write embedded pictures to.
        train_split: Split that `fit` learns from; several are joined with `+`.
        val_split: Split of `validate`.
        test_split: Split of `test`.
        predict_split: Split of `predict`.
        **options: See `ColumnsDataModule`.
    """

    def __init__(
        self,
        path: str,
        image: str = "image",
        name: str | None = None,
        revision: str | None = None,
        streaming: bool = False,
        pictures: str = "~/.cache/conceptshift/pictures",
        train_split: str = "train",
        val_split: str = "validation",
        test_split: str = "test",
        predict_split: str = "validation",
        **options: Any,
    ) -> None:
        super().__init__(path, pictures, train_split, val_split, test_split, predict_split, image, **options)
        self.path = path
        self.folder = folder if (folder := user_path(path)).is_dir() else None
        self.name = name
        self.revision = revision
        self.streaming = streaming
        self._hash = ""
        self._rows_declared: dict[str, int | None] = {}

    def setup(self, stage: str) -> None:
        """Read the rows of a stage, and write their pictures where that has not been done; of a stream, one row."""
        self.root.mkdir(parents=True, exist_ok=True)
        if not self.streaming:
            super().setup(stage)
            return
        if stage == "fit" and self.trainer is not None and self.trainer.max_steps == -1:
            raise ValueError(
                "--data.init_args.streaming: how many samples there are is not known before they are read, and the "
                "learning rate depends on it; set --trainer.max_steps"
            )
        for part in self._parts(stage):
            # A wrong option is told before the model is loaded.
            self._sample(next(self._rows(part)))

    def samples(self, stage: str) -> list[Sample]:
        """The samples of a stage, after `setup`; those of a stream are read now, without embedded pictures."""
        if not self.streaming:
            return super().samples(stage)
        return [self._sample(row)[0] for row in self._rows(stage, listing=True)]

    def describe(self, stage: str, most: int | None = None) -> dict[str, Any]:
        """What the samples of a stage depend on; `fingerprint`, known after `setup`, is of the commit or local files.

        So is the `hash` of a stream, whose samples are not at hand.
        """
        described = super().describe(stage, most)
        # Where embedded pictures are written does not matter.
        del described["root"]
        return {
            "hash": self._hash,
            **described,
            "path": self.path,
            "name": self.name,
            "revision": self.revision,
            "fingerprint": self._hash,
        }

    def available(self, stage: str) -> int | None:
        """As many rows as the data set declares, unless `labels` choose among them."""
        if self.limit is None:
            return super().available(stage)
        counts = [self._rows_declared.get(split) for split in self.splits[stage].split("+")]
        known = [count for count in counts if count is not None]
        return sum(known) if self.labels is None and len(known) == len(counts) else None

    def read(self, split: str, training: bool) -> list[Sample]:
        """Read one split; see the class for what a sample is."""
        return [self._kept(row)[0] for row in islice(self._rows_of(split), self.limit)]

    def batches(self, samples: Sequence[Sample], encode: Encoder) -> Iterable[Batch]:
        """Batches of some samples, in order, without a Trainer; not of a stream, whose pictures are not at hand."""
        if self.streaming:
            raise ValueError(
                "--data.init_args.streaming: Steerer and ShiftMonitor try samples beforehand, and a stream has none "
                "at hand; leave `streaming` out, and set --data.init_args.limit to read no more than needed"
            )
        return super().batches(samples, encode)

    def train_dataloader(self) -> Iterable[Batch]:
        """Shuffled batches with targets; after an interruption, those of the epoch that are still to come."""
        if not self.streaming:
            return super().train_dataloader()
        epoch, done = self._reached()
        return self._stream("fit", self.seed, epoch, done)

    def _in_order(self, stage: str) -> Iterable[Batch]:
        return self._stream(stage) if self.streaming else super()._in_order(stage)

    def _stream(self, stage: str, seed: int | None = None, epoch: int = 0, skip: int = 0) -> StreamLoader:
        trainer = self._trainer()
        # Pictures are looked at again where states were extracted from them.
        read = self._kept if stage == "predict" else self._sample
        sampler = StreamSampler(
            partial(self._rows, stage), trainer.global_rank, trainer.world_size,
            padded=stage != "predict", seed=seed, epoch=epoch, skip=skip,
        )  # fmt: skip
        return StreamLoader(self._loader(StreamedPictures(read, self.skip_bad_images), sampler))

    def _rows(self, stage: str, listing: bool = False) -> Iterator[Row]:
        """The rows of a stage, one by one, up to the limit.

        Args:
            stage: `fit`, `validate`, `test` or `predict`.
            listing: Without pictures, and with those in `exclude_ids`.
        """
        splits = self.splits[stage].split("+")
        ids: set[str] = set()
        for row in islice(chain.from_iterable(self._rows_of(split, listing) for split in splits), self.limit):
            self._check_new(row.sample_id, ids)
            if listing or row.sample_id not in self.exclude_ids:
                yield row

    def _rows_of(self, split: str, listing: bool = False) -> Iterator[Row]:
        columns = {option: column for option, column in self.columns.items() if option != "image" or not listing}
        rows, classes = self._open(split, columns)
        return self._with_labels(
            split,
            (
                Row.of(f"{split}/{number}", f"{self.path}: row {number}", columns, values, classes)
                for number, values in enumerate(self._one_by_one(rows))
            ),
        )

    def _sample(self, row: Row) -> tuple[Sample, bytes | None]:
        """The sample of a row, and its picture if that is embedded."""
        path, content = self._picture(row)
        return row.sample(path, self.prompt), content

    def _kept(self, row: Row) -> tuple[Sample, bytes | None]:
        """As `_sample`; an embedded picture is written where it is not there yet."""
        sample, content = self._sample(row)
        if content is not None and not sample.image.is_file():
            # Several processes may write the same picture.
            own = self.root / f".{uuid4().hex}"
            write_whole(own, lambda working: working.write_bytes(content))
            os.replace(own, sample.image)
        return sample, content

    def _open(self, split: str, columns: Mapping[str, str]) -> tuple[Iterable[dict[str, Any]], list[str] | None]:
        """Rows of a split, without any that is read yet, and the names of the label's classes if they are numbered."""
        # Takes a second to import, which no other data module needs.
        import datasets

        builder, splits = self._builder_and_splits()
        if split not in splits:
            raise ValueError(f"{self.path}: no split {split!r}; it has {', '.join(splits)}")
        self._hash = builder.hash
        self._rows_declared = {name: one.num_examples for name, one in (builder.info.splits or {}).items()}
        rows = splits[split]
        # JSON has no declared columns.
        features: Mapping[str, Any] = rows.features or dict.fromkeys(next(iter(self._one_by_one(rows)), {}))
        for option, column in columns.items():
            if column not in features:
                raise ValueError(
                    f"{self.path}: no column {column!r} for --data.init_args.{option}; it has {', '.join(features)}"
                )
        wanted = sorted(set(columns.values()))
        if isinstance(rows, datasets.IterableDataset) and hasattr(builder.config, "columns"):
            # Selected below, the others would be dropped only after they have been fetched.
            builder.config.columns = wanted
        rows = rows.select_columns(wanted)
        image = columns.get("image")
        if image is not None and isinstance(features[image], datasets.Image):
            rows = rows.cast_column(image, datasets.Image(decode=False))
        return rows, getattr(features.get(self.columns.get("label", "")), "names", None)

    def _builder_and_splits(self) -> tuple[Any, Mapping[str, Any]]:
        import datasets

        # As it is given, a folder called "json" would be taken for the format.
        path = self.path if self.folder is None else str(self.folder.absolute())
        try:
            located(path, "folder", owned=False)
            builder = datasets.load_dataset_builder(path, self.name, revision=self.revision)
            if self.streaming or self.folder is not None or self.limit is not None:
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

    def _picture(self, row: Row) -> tuple[Path, bytes | None]:
        """The file of a row's picture, and its content if that is embedded.

        Of a row without a picture, it is a file that is not there, as of any missing picture.
        """
        match row.value("image"):
            case bytes(content) | {"bytes": bytes(content)}:
                return self._named(content), content
            case str(name) | {"path": str(name)}:
                return self._file(name)
            case None | {"path": None}:
                return self.root / f"no picture of {row.sample_id.replace('/', ' ')}", None
        raise row.odd("image", "pictures")

    def _named(self, content: bytes) -> Path:
        """Where an embedded picture is written, if it is."""
        ending = next((ending for start, ending in _ENDINGS.items() if content.startswith(start)), "")
        return self.root / f"{hashlib.sha256(content).hexdigest()[:40]}{ending}"

    def _file(self, name: str) -> tuple[Path, bytes | None]:
        """A picture that the data set names: a file, or something within an archive or on the hub."""
        import datasets
        import pyarrow as pa

        if "://" in name:
            if not self._has(name.split("::")[-1]):
                raise ValueError(
                    f"{self.path}: {name} is no picture of this data set; download them, and give a folder"
                )
            as_named = pa.array([{"bytes": None, "path": name}], datasets.Image.pa_type)
            content = datasets.Image().embed_storage(as_named)[0].as_py()["bytes"]
            return self._named(content), content
        if self.folder is not None:
            return image_path(self.folder, name), None
        cache = Path(datasets.config.HF_CACHE_HOME).resolve()
        if not Path(name).resolve().is_relative_to(cache):
            raise ValueError(f"{self.path}: has no picture {name!r}, only its name; download them, and give a folder")
        return Path(name), None

    def _has(self, source: str) -> bool:
        """Whether a file on the hub or an archive is of this data set."""
        if self.folder is None:
            return source.startswith(f"hf://datasets/{self.path}@")
        return Path(source).resolve().is_relative_to(self.folder.resolve())


def _in_a_line(path: str, error: Exception) -> ValueError:
    """The error of a data set in one line."""
    reason = " ".join(str(error).split()).split(" Example of usage")[0]
    return ValueError(f"{path}: cannot be read as a data set ({reason}); {_WAY_OUT}")
