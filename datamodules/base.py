"""What all picture-and-text data modules share: splits, limits, collation, loaders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from ..records.hashes import file_hashes, joined_hash, value_hash
from ..records.paths import user_path
from .annotations import data_folder
from .images import BadImageError, read_image
from .sample import Batch, Encoder, Sample, SkippedSample

Item = tuple[Sample, Image.Image] | SkippedSample
# What is hashed apart, by its content.
_FIELDS = tuple(field.name for field in fields(Sample) if field.name not in ("image", "instances"))


class _Pictures(Dataset[Item]):
    """Reads each sample's picture when it is asked for."""

    def __init__(self, samples: list[Sample], skip_bad_images: bool) -> None:
        self.samples = samples
        self.skip_bad_images = skip_bad_images

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Item:
        return read_item(self.samples[index], None, self.skip_bad_images)


def read_item(sample: Sample, content: bytes | None, skip_bad_images: bool) -> Item:
    """Read the picture of a sample.

    Args:
        sample: The sample.
        content: What is in the picture's file, where that is at hand.
        skip_bad_images: Say why a picture is unreadable, instead of raising `BadImageError`.
    """
    try:
        return sample, read_image(sample.image, content)
    except BadImageError as error:
        if not skip_bad_images:
            raise
        return SkippedSample(sample.sample_id, str(error))


def picture_hashes(samples: Sequence[Sample]) -> list[str]:
    """SHA-256 of each sample's picture file; where there is none (embedded pictures are named by content), its name."""
    there = cache(Path.is_file)
    paths = [sample.image for sample in samples]
    hashes = iter(file_hashes([path for path in paths if there(path)]))
    return [next(hashes) if there(path) else path.name for path in paths]


def samples_hash(samples: Sequence[Sample]) -> str:
    """Hash of all that samples have, pictures by content, whatever their order."""
    rows = [
        (sample.sample_id, _sample_hash(sample, picture))
        for sample, picture in zip(samples, picture_hashes(samples), strict=True)
    ]
    return joined_hash(part for row in sorted(rows) for part in row)


def input_hashes(samples: Sequence[Sample]) -> list[str]:
    """Hash of what the model is shown of each sample: its prompt, and its picture by content."""
    return [
        value_hash([sample.prompt, picture]) for sample, picture in zip(samples, picture_hashes(samples), strict=True)
    ]


def _sample_hash(sample: Sample, picture: str) -> str:
    instances = [
        [one.category, {name: str(value) for name, value in one.segmentation.items()}] for one in sample.instances
    ]
    return value_hash([picture, instances, {name: getattr(sample, name) for name in _FIELDS}])


class _Collate:
    """Builds a `Batch` in the loader's worker, so that encoding overlaps with the model."""

    def __init__(self, encode: Encoder) -> None:
        self.encode = encode

    def __call__(self, items: list[Item]) -> Batch:
        skipped = [item for item in items if isinstance(item, SkippedSample)]
        read = [item for item in items if not isinstance(item, SkippedSample)]
        samples = [sample for sample, _ in read]
        if not samples:
            return Batch([], {}, skipped)
        inputs = self.encode(
            [image for _, image in read],
            [sample.prompt for sample in samples],
            [sample.target for sample in samples],
        )
        return Batch(samples, inputs, skipped)


class _EpochSampler(DistributedSampler[Item]):
    """Shuffles by seed and epoch, and can leave out what an interrupted epoch has already seen."""

    def __init__(self, dataset: _Pictures, rank: int, world_size: int, seed: int, skip: int) -> None:
        super().__init__(dataset, num_replicas=world_size, rank=rank, shuffle=True, seed=seed)
        self.skip = skip

    def __iter__(self) -> Iterator[Any]:
        indices = list(super().__iter__())[self.skip :]
        self.skip = 0
        return iter(indices)


class PictureDataModule(L.LightningDataModule, ABC):
    """Base of the data modules that read pictures with texts.

    Subclasses implement `read`. The running LightningModule must have an `encode` method (see
    `sample.Encoder`); batches are `sample.Batch`.

    Args:
        root: Data folder.
        prompt: What is asked about each picture (captioning), or what follows each question (VQA).
        train_split: Split that `fit` learns from. Several are joined with `+`.
        val_split: Split of `validate` and of validation during `fit`.
        test_split: Split of `test`.
        predict_split: Split of `predict`.
        limit: At most this many samples of each split, the first ones; all by default.
        batch_size: Samples per batch and process.
        num_workers: Loader processes.
        seed: Seed of the shuffling in `fit`.
        skip_bad_images: Leave out unreadable pictures and list them in the result; by default one stops the run.
    """

    streaming = False
    """Whether samples are read while the model runs."""

    def __init__(
        self,
        root: str,
        prompt: str,
        train_split: str,
        val_split: str,
        test_split: str,
        predict_split: str,
        limit: int | None = None,
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
        skip_bad_images: bool = False,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"--data.init_args.batch_size must be at least 1, got {batch_size}")
        if limit is not None and limit < 1:
            raise ValueError(f"--data.init_args.limit must be at least 1, got {limit}; leave it out for all")
        self.root = user_path(root)
        self.prompt = prompt
        self.splits = {
            "fit": train_split,
            "validate": val_split,
            "test": test_split,
            "predict": predict_split,
        }
        self.limit = limit
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.skip_bad_images = skip_bad_images
        # A resumed extraction sets this to the samples whose states are already on disk.
        self.exclude_ids: frozenset[str] = frozenset()
        self._samples: dict[str, list[Sample]] = {}
        self._available: dict[str, int] = {}
        self._hashes: dict[tuple[str, int | None], str] = {}

    @abstractmethod
    def read(self, split: str, training: bool) -> list[Sample]:
        """Read the samples of one split.

        Args:
            split: Name of one split, without `+`.
            training: Whether the samples are to be learned from.
        """

    def filters(self, training: bool) -> list[str]:
        """Names of the options that may have left samples out, for messages.

        Args:
            training: Whether the samples are to be learned from.
        """
        return []

    def setup(self, stage: str) -> None:
        """Read the annotation files of a stage."""
        data_folder(self.root)
        for part in self._parts(stage):
            if part not in self._samples:
                self._samples[part] = self._read_all(part)

    @staticmethod
    def _parts(stage: str) -> tuple[str, ...]:
        """The stages whose samples a stage of Lightning needs."""
        return ("fit", "validate") if stage == "fit" else (stage,)

    def samples(self, stage: str) -> list[Sample]:
        """The samples of `fit`, `validate`, `test` or `predict`, after `setup`."""
        return self._samples[stage]

    def describe(self, stage: str, most: int | None = None) -> dict[str, Any]:
        """What the samples of a stage depend on, for the metadata of what is made from them.

        After `setup` also how many `samples` these are, `of` how many (where that is known) before the limit, and a
        `hash` of their ids, texts and pictures.

        Args:
            stage: `fit`, `validate`, `test` or `predict`.
            most: Only the first samples are taken, so many at most.
        """
        return {
            "class": type(self).__name__,
            "root": str(self.root),
            "prompt": self.prompt,
            "split": self.splits[stage],
            "limit": self.limit,
            **self.content(stage, most),
        }

    def content(self, stage: str, most: int | None = None) -> dict[str, Any]:
        """What the samples of a stage are, whatever they were read from; nothing before `setup`, or of a stream."""
        if stage not in self._samples:
            return {}
        if (stage, most) not in self._hashes:
            self._hashes[stage, most] = samples_hash(self.samples(stage)[:most])
        samples = len(self.samples(stage)[:most])
        return {"samples": samples, "of": self.available(stage), "hash": self._hashes[stage, most]}

    def available(self, stage: str) -> int | None:
        """How many samples a stage would have without a limit, if that is known."""
        return self._available.get(stage)

    def _read_all(self, stage: str) -> list[Sample]:
        samples: list[Sample] = []
        for split in self.splits[stage].split("+"):
            samples += self.read(split, training=stage == "fit")
        if not samples:
            filters = " and ".join(self.filters(training=stage == "fit"))
            with_words = f" with words of {filters}; choose others" if filters else ""
            raise ValueError(f"{self.root}: split {self.splits[stage]!r} has no samples for `{stage}`{with_words}")
        self._available[stage] = len(samples)
        return self.limited(samples)

    def limited(self, samples: list[Sample]) -> list[Sample]:
        """What `limit` leaves of the samples of a stage."""
        return samples[: self.limit]

    def train_dataloader(self) -> Iterable[Batch]:
        """Shuffled batches with targets; after an interruption, those of the epoch that are still to come."""
        trainer = self._trainer()
        dataset = _Pictures(self.samples("fit"), self.skip_bad_images)
        epoch, done = self._reached()
        sampler = _EpochSampler(dataset, trainer.global_rank, trainer.world_size, self.seed, skip=done)
        # Loader processes begin to read before Lightning tells the sampler its epoch.
        sampler.set_epoch(epoch)
        return self._loader(dataset, sampler)

    def _reached(self) -> tuple[int, int]:
        """The epoch of a training, and how many samples of it this process has seen before an interruption."""
        loop = self._trainer().fit_loop
        progress = loop.epoch_loop.batch_progress
        # A checkpoint is written when its batch counts as processed, but not yet as completed.
        done = 0 if progress.is_last_batch else cast(Any, progress.current).processed
        return loop.epoch_progress.current.ready - (1 if done else 0), done * self.batch_size

    def val_dataloader(self) -> Iterable[Batch]:
        """Batches of the validation split, in order."""
        return self._in_order("validate")

    def test_dataloader(self) -> Iterable[Batch]:
        """Batches of the test split, in order."""
        return self._in_order("test")

    def predict_dataloader(self) -> Iterable[Batch]:
        """Batches of the predict split, in order, without those in `exclude_ids`."""
        return self._in_order("predict")

    def batches(self, samples: Sequence[Sample], encode: Encoder) -> Iterable[Batch]:
        """Batches of some samples, in order, without a Trainer."""
        return DataLoader(
            _Pictures(list(samples), self.skip_bad_images),
            batch_size=self.batch_size,
            collate_fn=_Collate(encode),
            # A loader draws a seed even where nothing is shuffled; training is to keep its own random numbers.
            generator=torch.Generator(),
        )

    def _in_order(self, stage: str) -> Iterable[Batch]:
        samples = [sample for sample in self.samples(stage) if sample.sample_id not in self.exclude_ids]
        return self._loader(_Pictures(samples, self.skip_bad_images))

    def _loader(self, dataset: Dataset[Item], sampler: Sampler[Any] | None = None) -> DataLoader[Item]:
        encode = cast(Encoder, self._trainer().lightning_module.encode)
        # `batch_size` by keyword: Lightning makes the loader anew under DDP from its keyword arguments.
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=_Collate(encode),
            persistent_workers=self.num_workers > 0,
        )

    def _trainer(self) -> L.Trainer:
        if self.trainer is None:
            raise RuntimeError("a data module gives loaders to a Trainer only: pass it to trainer.fit and the like")
        return self.trainer
