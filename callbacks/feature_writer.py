"""Writes extracted states to a feature store."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from ..datamodules.base import PictureDataModule
from ..datamodules.sample import Batch
from ..datamodules.stored_features import (
    FeatureShardWriter,
    begin_store,
    drop_last_shard,
    is_finished,
    merge_store,
    reusable,
    written_ids,
)
from ..lightning_modules import Extraction, FeatureExtraction
from ..records.files import beside, put_in_place
from ..records.provenance import made_now
from .parts.processes import gather
from .parts.run_description import describe_run
from .parts.run_writer import RunWriter
from .parts.store_rows import store_rows


class FeatureWriter(RunWriter):
    """Writes the states of a `FeatureExtraction` to safetensors shards with a parquet index, and the model's readout.

    An interrupted extraction, started again, goes on where it stopped; a finished one of the same model, data and
    options is used again. Memory does not grow with the data.

    Args:
        folder: The feature store; by default `features` in the run's folder.
        shard_rows: States per shard.
        overwrite: Let this run's store take the place of another run's, once it is whole.
    """

    place = "features"
    option = "folder"
    makes = "features"

    def __init__(self, folder: str | None = None, shard_rows: int = 4096, overwrite: bool = False) -> None:
        super().__init__(folder)
        self.shard_rows = shard_rows
        self.overwrite = overwrite
        self._writer: FeatureShardWriter | None = None
        self._working = Path()
        self._reused = self._resumed = False
        self._skipped: list[dict[str, str]] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave out of the data what is there already; loaders are made after this."""
        if not isinstance(pl_module, FeatureExtraction):
            raise TypeError(f"FeatureWriter writes what FeatureExtraction reads, got {type(pl_module).__name__}")
        self.locate(trainer)
        data = getattr(trainer, "datamodule", None)
        done: set[str] = set()
        # A finished store stays where it is until this one is.
        self._reused, self._working = False, beside(self.out) if is_finished(self.out) else self.out
        if trainer.is_global_zero and isinstance(data, PictureDataModule):
            run = describe_run(trainer, pl_module)
            ids = {sample.sample_id for sample in data.samples("predict")}
            if reusable(self.out, run, self.overwrite) and not _others_read(trainer, self):
                self._reused, done = True, ids
                rank_zero_info(f"{self.out}: is a finished store of exactly these states; it is used again")
            elif not self.overwrite or self._working != self.out:
                done = written_ids(self._working, run)
            if self._reused:
                # Without a batch Lightning would call nothing, and no process may be without one.
                done -= set(sorted(ids)[: trainer.world_size])
            elif done >= ids:
                # Only the merge is missing.
                done -= drop_last_shard(self._working)
        self._reused, self._working, done = trainer.strategy.broadcast((self._reused, self._working, done))
        self._resumed = bool(done)
        if isinstance(data, PictureDataModule):
            data.exclude_ids = frozenset(done)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prepare the store."""
        assert isinstance(pl_module, FeatureExtraction)
        self._skipped, self._writer = [], None
        if trainer.is_global_zero:
            metadata = {
                **describe_run(trainer, pl_module),
                "sites": [site.name for site in pl_module.sites],
                **made_now(),
            }
            # Asked again: of a model on the hub, only now is it known what it is.
            same = reusable(self.out, metadata, self.overwrite)
            if self._reused and not same:
                raise ValueError(f"{self.out}: is not of this run, now that the model is loaded; set `overwrite: true`")
            if not self._reused:
                begin_store(self._working, metadata, self._resumed, self.overwrite)
                pl_module.readout.save(self._working)
        trainer.strategy.barrier()
        if not self._reused:
            self._writer = FeatureShardWriter(self._working, trainer.global_rank, self.shard_rows)

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: list[Extraction],
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add one batch, all variants of its samples at once."""
        if self._writer is None:
            return
        self._skipped += [{"sample_id": item.sample_id, "reason": item.reason} for item in batch.skipped]
        if outputs:
            self._writer.add(*store_rows(outputs, batch))

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the rest and merge what all processes have written."""
        if self._writer is None:
            return
        self._writer.flush()
        skipped = gather(self._skipped)
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            merge_store(self._working, skipped)
            if self._working != self.out:
                put_in_place(self._working, self.out)
        trainer.strategy.barrier()


def _others_read(trainer: L.Trainer, writer: FeatureWriter) -> bool:
    """Whether another callback reads what the model says, which a store that is used again has not to be asked for."""
    callbacks: list[Callback] = cast(Any, trainer).callbacks
    return any(
        type(other).on_predict_batch_end is not Callback.on_predict_batch_end
        for other in callbacks
        if other is not writer and not type(other).__module__.startswith("lightning.")
    )
