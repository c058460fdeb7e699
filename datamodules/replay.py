"""Feeds a finished feature store to callbacks, in place of pictures."""

from __future__ import annotations

from dataclasses import dataclass

import lightning as L
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..records.paths import user_path
from .stored_features import FeatureStore


@dataclass
class StoredShard:
    """States of one shard.

    Attributes:
        name: The shard.
        rows: How many states the store's index has of it.
        states: Site → states [rows, D], as they are on disk.
    """

    name: str
    rows: int
    states: dict[str, Tensor]


class _Shards(Dataset[StoredShard]):
    """Reads each shard when it is asked for."""

    def __init__(self, store: FeatureStore) -> None:
        self.store = store
        self.rows = list(store.shard_rows().items())

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> StoredShard:
        name, rows = self.rows[index]
        return StoredShard(name, rows, self.store.read_shard(name))


class StoredFeatures(L.LightningDataModule):
    """The states of a finished feature store, for `conceptshift predict` with the module `Replay`.

    Args:
        folder: The feature store.
        batch_size: Shards per batch.
        num_workers: Loader processes.
    """

    def __init__(self, folder: str, batch_size: int = 1, num_workers: int = 0) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"--data.init_args.batch_size must be at least 1, got {batch_size}")
        self.folder = user_path(folder)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self._store: FeatureStore | None = None

    def setup(self, stage: str) -> None:
        """Open the store.

        Raises:
            ValueError: It is none, or unfinished, or empty, or something else than `predict` is to be done.
        """
        if stage != "predict":
            raise ValueError(f"StoredFeatures is for `conceptshift predict`, not for {stage}: it has no pictures")
        self._store = FeatureStore(self.folder)
        if not self._store.shard_rows():
            raise ValueError(f"{self.folder}: holds no state; did its selectors match anything?")

    def predict_dataloader(self) -> DataLoader[StoredShard]:
        """Batches of whole shards, in order.

        Raises:
            TypeError: The module wants pictures.
            ValueError: There are fewer batches than processes, which Lightning cannot share out.
        """
        assert self._store is not None
        module = None if self.trainer is None else self.trainer.lightning_module
        if hasattr(module, "encode"):
            raise TypeError(f"StoredFeatures has no pictures for {type(module).__name__}; run it with --model Replay")
        batches = -(-len(self._store.shard_rows()) // self.batch_size)
        if self.trainer is not None and batches < self.trainer.world_size:
            raise ValueError(
                f"{self.folder}: {batches} batches of shards for {self.trainer.world_size} processes; use at most "
                f"--trainer.devices {batches}"
            )
        # `batch_size` by keyword: Lightning makes the loader anew under DDP from its keyword arguments.
        return DataLoader(
            _Shards(self._store), batch_size=self.batch_size, num_workers=self.num_workers, collate_fn=list
        )
