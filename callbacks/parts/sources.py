"""What callbacks draw on: a feature store, the readout of the model it is of, and that model where it is running."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import lightning as L
from lightning.pytorch.callbacks import Callback

from ...datamodules.replay import StoredFeatures
from ...datamodules.stored_features import FeatureStore
from ...lightning_modules import BackboneModule, Replay, VisionLanguageModel
from ...lightning_modules.backbone.destinations import ORIGINAL
from ...lightning_modules.backbone.readout import Readout
from ..feature_writer import FeatureWriter


def store_folder(trainer: L.Trainer, callback: Callback, features: str | None) -> Path:
    """The feature store of a callback; it need not be written yet.

    Args:
        trainer: The trainer.
        callback: Who asks.
        features: The store it was given, if any; else the one that this run writes before it, or reads.

    Raises:
        ValueError: There is none.
    """
    if features is not None:
        return Path(features)
    data = getattr(trainer, "datamodule", None)
    if isinstance(data, StoredFeatures):
        return data.folder
    callbacks: list[Callback] = cast(Any, trainer).callbacks
    before = callbacks[: callbacks.index(callback)]
    folders = [writer.folder for writer in before if isinstance(writer, FeatureWriter)]
    if len(folders) != 1:
        raise ValueError(
            f"{type(callback).__name__} needs `features`: {len(folders)} FeatureWriters are listed before it, and the "
            "data are no StoredFeatures"
        )
    return folders[0]


def model_of(pl_module: L.LightningModule) -> VisionLanguageModel | None:
    """The running model; nothing under `Replay`, where what needs it is left out."""
    return pl_module.backbone if isinstance(pl_module, BackboneModule) else None


def same_model(one: Mapping[str, Any], other: Mapping[str, Any], variant: str) -> bool:
    """Whether a variant is the same model in two feature stores.

    Args:
        one: Metadata of one store.
        other: Metadata of the other.
        variant: `original`, or the name of a destination.
    """
    hashes = [metadata.get("checkpoint_hashes", {}).get(variant) for metadata in (one, other)]
    return one.get("weights_hash") == other.get("weights_hash") and hashes[0] == hashes[1]


def same_destination(store: FeatureStore, backbone: VisionLanguageModel, variant: str) -> bool:
    """Whether a variant of a store is the running model's of that name; the original always is."""
    stored = store.metadata.get("checkpoint_hashes", {}).get(variant)
    return variant == ORIGINAL or bool(stored == backbone.destination_hash(variant))


def readout_of(pl_module: L.LightningModule, store: FeatureStore) -> Readout:
    """The readout of the model whose states a store holds.

    Raises:
        ValueError: The running model, or that of the replayed store, is another one.
    """
    assert isinstance(pl_module, BackboneModule | Replay)
    readout = pl_module.readout
    if store.metadata.get("weights_hash") != readout.weights_hash:
        raise ValueError(
            f"{store.folder}: its states are of another model than this run's; take them alone, with --model Replay "
            f"--data StoredFeatures --data.init_args.folder {store.folder}"
        )
    return readout
