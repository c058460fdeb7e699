"""Stands in for a model where states have been stored already."""

from __future__ import annotations

from functools import cached_property

import lightning as L

from ..datamodules.replay import StoredFeatures, StoredShard
from .backbone.readout import Readout


class Replay(L.LightningModule):
    """Goes through a finished feature store and loads no model; the callbacks do in `predict` what they do else.

    To learn other dictionaries, measure the shift or make steering vectors again, from `StoredFeatures`. Every shard
    is read once and checked before any of this begins.
    """

    def setup(self, stage: str) -> None:
        """Check that there are stored states.

        Raises:
            TypeError: The data are something else.
        """
        self._data()

    def _data(self) -> StoredFeatures:
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, StoredFeatures):
            raise TypeError(f"Replay goes through --data StoredFeatures, got {type(data).__name__}")
        return data

    @cached_property
    def readout(self) -> Readout:
        """The readout that was stored with the states.

        Raises:
            ValueError: There is none.
        """
        return Readout.load(self._data().folder)

    def predict_step(self, batch: list[StoredShard], batch_idx: int) -> int:
        """Check that shards are whole.

        Returns:
            How many states they have at each site.

        Raises:
            ValueError: One lacks states, or has some that are not finite.
        """
        for shard in batch:
            for site, states in shard.states.items():
                if len(states) != shard.rows:
                    raise ValueError(
                        f"{shard.name}: {len(states)} states at {site!r}, but the index of the store has {shard.rows}; "
                        "extract again"
                    )
                bad = int((~states.isfinite().all(dim=1)).sum())
                if bad:
                    raise ValueError(f"{shard.name}: {bad} states at {site!r} are not finite; extract again")
        return sum(shard.rows for shard in batch)
