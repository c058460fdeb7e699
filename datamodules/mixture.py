"""Several data modules as one, for instance captions and questions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .base import PictureDataModule
from .sample import Sample


class MixtureDataModule(PictureDataModule):
    """Joins the samples of several data modules; each reads its own splits under its own limit.

    Sample ids get the part's number in front (`0/`, `1/`, …) and so stay unique.

    Args:
        parts: The data modules to join. Their batch sizes, workers and seeds do not count.
        batch_size: Samples per batch and process.
        num_workers: Loader processes.
        seed: Seed of the shuffling in `fit`.
        skip_bad_images: Leave out unreadable pictures and list them in the result.
    """

    def __init__(
        self,
        parts: list[PictureDataModule],
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
        skip_bad_images: bool = False,
    ) -> None:
        if not parts:
            raise ValueError("--data.init_args.parts: expected at least one data module, got none")
        if any(part.streaming for part in parts):
            raise ValueError("--data.init_args.parts: a mixture needs its samples beforehand; leave `streaming` out")
        super().__init__(str(parts[0].root), "", "", "", "", "", None, batch_size, num_workers, seed, skip_bad_images)
        self.parts = parts

    def setup(self, stage: str) -> None:
        """Read the annotation files of every part."""
        for part in self.parts:
            part.setup(stage)
        super().setup(stage)

    def read(self, split: str, training: bool) -> list[Sample]:
        """Not used: each part reads its own splits."""
        raise NotImplementedError

    def describe(self, stage: str, most: int | None = None) -> dict[str, Any]:
        """What each part depends on."""
        described = {"class": type(self).__name__, "parts": [part.describe(stage) for part in self.parts]}
        return {**described, **self.content(stage, most)}

    def available(self, stage: str) -> int | None:
        """As many as its parts would have together."""
        counts = [part.available(stage) for part in self.parts]
        return None if None in counts else sum(count for count in counts if count is not None)

    def _read_all(self, stage: str) -> list[Sample]:
        return [
            replace(sample, sample_id=f"{number}/{sample.sample_id}")
            for number, part in enumerate(self.parts)
            for sample in part.samples(stage)
        ]
