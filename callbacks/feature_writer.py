"""Writes extracted states to a feature store."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
import transformers
from lightning.pytorch.callbacks import Callback

from .. import __version__
from ..datamodules.base import PictureDataModule
from ..datamodules.sample import Batch
from ..datamodules.stored_features import (
    FeatureShardWriter,
    Row,
    begin_store,
    drop_last_shard,
    merge_store,
    written_ids,
)
from ..lightning_modules import Extraction, FeatureExtraction
from .parts.processes import gather


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
            self._writer.add(_sample_rows(outputs, batch), _state_rows(outputs, batch), _tensors(outputs))

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the rest and merge what all processes have written."""
        assert self._writer is not None
        self._writer.flush()
        skipped = gather(self._skipped)
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            merge_store(self.folder, skipped)
        trainer.strategy.barrier()


def _sample_rows(outputs: list[Extraction], batch: Batch) -> list[Row]:
    return [
        {
            "sample_id": sample.sample_id,
            "variant": extraction.variant,
            "image": str(sample.image),
            "prompt": sample.prompt,
            "text": text,
            "references": list(sample.references),
            "answers": list(sample.answers),
        }
        for extraction in outputs
        for sample, text in zip(batch.samples, extraction.texts, strict=True)
    ]


def _state_rows(outputs: list[Extraction], batch: Batch) -> list[Row]:
    return [
        {
            "sample_id": batch.samples[sample].sample_id,
            "variant": extraction.variant,
            "selector": rows.selector,
            "position": position,
            "token": token,
        }
        for extraction in outputs
        for rows in extraction.rows
        for sample, position, token in zip(rows.samples, rows.positions, rows.tokens, strict=True)
    ]


def _tensors(outputs: list[Extraction]) -> dict[str, torch.Tensor]:
    """Site → states in the order of `_state_rows`."""
    sites = outputs[0].rows[0].states
    return {
        site: torch.cat([rows.states[site] for extraction in outputs for rows in extraction.rows]) for site in sites
    }


def describe_run(trainer: L.Trainer, module: FeatureExtraction) -> Row:
    """What makes the states what they are, as far as the configuration tells."""
    data = getattr(trainer, "datamodule", None)
    return {
        "model_id": module.model_id,
        "revision": module.revision,
        "checkpoints": dict(module.destinations),
        "dtype": module.dtype_name,
        "site_patterns": module.site_patterns,
        "selectors": [selector.name for selector in module.selectors],
        "variants": list(module.variants),
        "answers": module.answers,
        "max_new_tokens": module.max_new_tokens,
        "precision": str(trainer.precision),
        "data": data.describe("predict") if isinstance(data, PictureDataModule) else {},
        "versions": {"conceptshift": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }


def describe_model(module: FeatureExtraction) -> Row:
    """What only the loaded model tells: its sites, and hashes of its weights."""
    return {
        "sites": [site.name for site in module.sites],
        "weights_hash": module.backbone.weights_hash(),
        "checkpoint_hashes": {name: module.backbone.destination_hash(name) for name in module.destinations},
    }
