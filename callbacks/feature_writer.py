"""Writes extracted states to a feature store."""

from __future__ import annotations

from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback

from ..datamodules.base import PictureDataModule
from ..datamodules.sample import Batch
from ..datamodules.stored_features import (
    FeatureShardWriter,
    begin_store,
    drop_last_shard,
    merge_store,
    written_ids,
)
from ..lightning_modules import Extraction, FeatureExtraction
from .parts.processes import gather
from .parts.run_description import describe_model, describe_run
from .parts.store_rows import store_rows


class FeatureWriter(Callback):
    """Writes the states of a `FeatureExtraction` to safetensors shards with a parquet index, and the model's readout.

    An interrupted extraction, started again, goes on where it stopped. Memory does not grow with the data.

    Args:
        folder: The feature store.
        shard_rows: States per shard.
        overwrite: Replace whatever store is there; an interrupted one is not resumed.
    """

    def __init__(self, folder: str, shard_rows: int = 4096, overwrite: bool = False) -> None:
        self.folder = Path(folder)
        self.shard_rows = shard_rows
        self.overwrite = overwrite
        self._writer: FeatureShardWriter | None = None
        self._resumed = False
        self._skipped: list[dict[str, str]] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave out of the data what an interrupted run has already written; loaders are made after this."""
        if not isinstance(pl_module, FeatureExtraction):
            raise TypeError(f"FeatureWriter writes what FeatureExtraction reads, got {type(pl_module).__name__}")
        data = getattr(trainer, "datamodule", None)
        done: set[str] = set()
        if trainer.is_global_zero and isinstance(data, PictureDataModule) and not self.overwrite:
            done = written_ids(self.folder, describe_run(trainer, pl_module))
            if done >= {sample.sample_id for sample in data.samples("predict")}:
                # Only the merge is missing, but without a batch Lightning would call nothing that could do it.
                done -= drop_last_shard(self.folder)
        done = trainer.strategy.broadcast(done)
        self._resumed = bool(done)
        if isinstance(data, PictureDataModule):
            data.exclude_ids = frozenset(done)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prepare the store."""
        assert isinstance(pl_module, FeatureExtraction)
        if trainer.is_global_zero:
            metadata = {**describe_run(trainer, pl_module), **describe_model(pl_module)}
            begin_store(self.folder, metadata, self._resumed, self.overwrite)
            pl_module.readout.save(self.folder)
        trainer.strategy.barrier()
        self._writer = FeatureShardWriter(self.folder, trainer.global_rank, self.shard_rows)
        self._skipped = []

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
        assert self._writer is not None
        self._skipped += [{"sample_id": item.sample_id, "reason": item.reason} for item in batch.skipped]
        if outputs:
            self._writer.add(*store_rows(outputs, batch))

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the rest and merge what all processes have written."""
        assert self._writer is not None
        self._writer.flush()
        skipped = gather(self._skipped)
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            merge_store(self.folder, skipped)
        trainer.strategy.barrier()
