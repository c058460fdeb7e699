"""What the callbacks share that look into an `Inspection`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, cast

import lightning as L
from lightning.pytorch.callbacks import Callback

from ...datamodules.base import PictureDataModule
from ...datamodules.objects import ObjectDataModule
from ...datamodules.sample import Sample
from ...lightning_modules import Inspection
from ...lightning_modules.inspection import STEERED
from ...records.provenance import made_now
from ..steerer import Steerer
from .journal import Journal
from .processes import gather, refuse_pieces
from .run_description import describe_inspection
from .run_writer import RunWriter
from .steering_checks import check_weights, try_on_longest_prompt


class Inspector(RunWriter, ABC):
    """Base of the callbacks that look into an `Inspection`, and keep in a journal what they have seen of each sample.

    An interrupted run, started again, goes on where it stopped. Several in one run see all samples that one of them has
    still to see.

    Args:
        out: Folder to write to.
        overwrite: Begin anew, whatever is there.
    """

    masks: ClassVar[bool]
    """Whether it needs the masks of objects."""

    def __init__(self, out: str | None, overwrite: bool) -> None:
        super().__init__(out)
        self.overwrite = overwrite
        self.skipped: dict[str, str] = {}

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """What it writes depends on, besides model and data."""

    @abstractmethod
    def prepare(self, trainer: L.Trainer, module: Inspection) -> None:
        """Check against the loaded model what is to be done.

        Raises:
            ValueError: It does not fit.
        """

    @abstractmethod
    def finish(self, trainer: L.Trainer, module: Inspection, skipped: dict[str, str]) -> None:
        """Write the result, on the first process.

        Args:
            trainer: The trainer.
            module: What was run.
            skipped: Id → why its picture could not be read.
        """

    @abstractmethod
    def forget(self, ids: Iterable[str]) -> None:
        """Remove the results of an earlier run.

        Args:
            ids: Its samples.
        """

    def wanted(self, samples: Sequence[Sample]) -> set[str]:
        """Ids of the samples that it has to see."""
        return {sample.sample_id for sample in samples}

    def is_kept(self, sample_id: str) -> bool:
        """Whether all that was written of a sample that has been seen is still there."""
        return True

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check what is asked for, and leave out of the data what has been seen."""
        name = type(self).__name__
        if not isinstance(pl_module, Inspection):
            raise TypeError(
                f"{name} looks into what Inspection runs, got {type(pl_module).__name__}; use --model Inspection"
            )
        data = getattr(trainer, "datamodule", None)
        if self.masks and not isinstance(data, ObjectDataModule):
            raise TypeError(f"{name} needs pictures with masks of their objects: --data ObjectDataModule")
        if not isinstance(data, PictureDataModule):
            raise TypeError(f"{name} needs a data module of pictures, such as --data PicturesDataModule")
        callbacks: list[Callback] = cast(Any, trainer).callbacks
        if any(isinstance(other, Steerer) for other in callbacks):
            raise ValueError(
                f"{name}: a Steerer beside it would steer the original, too; give its vectors to "
                "--model.init_args.steering instead"
            )
        inspectors = [other for other in callbacks if isinstance(other, Inspector)]
        self.locate(trainer)
        self.journal = Journal(self.out, self.overwrite)
        refuse_pieces(trainer, name)
        samples = data.samples("predict")
        wanted = self.wanted(samples)
        done: set[str] = set()
        if trainer.is_global_zero:
            seen = self.journal.resume(self._describe(trainer, pl_module), wanted, trainer.world_size)
            done = {sample_id for sample_id in seen if self.is_kept(sample_id)}
        done = trainer.strategy.broadcast(done) | {sample.sample_id for sample in samples} - wanted
        data.exclude_ids = frozenset(done if inspectors[0] is self else done & data.exclude_ids)

    def _describe(self, trainer: L.Trainer, module: Inspection) -> dict[str, Any]:
        return {**describe_inspection(trainer, module), type(self).__name__: self.options()}

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the model, try the steering on the first sample, and prepare the folder.

        Raises:
            ValueError: The model has no visual tokens, or something does not fit it.
        """
        assert isinstance(pl_module, Inspection)
        if reason := pl_module.backbone.structure.without_visual_tokens:
            raise ValueError(
                f"{pl_module.model_id} has no visual tokens for {type(self).__name__} to look at: {reason}; choose a "
                "model whose sequence holds them (`conceptshift architectures`)"
            )
        if STEERED in pl_module.variants:
            check_weights([step.file for step in pl_module.steering], pl_module.backbone)
            try_on_longest_prompt(trainer, pl_module, [pl_module.steerings])
        self.prepare(trainer, pl_module)
        if trainer.is_global_zero:
            earlier = self.journal.rows()
            if self.journal.begin({**self._describe(trainer, pl_module), **made_now()}):
                self.forget(earlier)
        trainer.strategy.barrier()
        self.skipped = {}

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the result."""
        assert isinstance(pl_module, Inspection)
        skipped = dict(gather(sorted(self.skipped.items())))
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            self.finish(trainer, pl_module, skipped)
        trainer.strategy.barrier()
