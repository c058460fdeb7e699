"""What callbacks draw on: a feature store, the readout of the model it is of, and that model where it is running."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import lightning as L
from lightning.pytorch.callbacks import Callback

from ...concepts import ConceptDictionary
from ...datamodules.replay import StoredFeatures
from ...datamodules.stored_features import FeatureStore
from ...lightning_modules import BackboneModule, Replay, VisionLanguageModel
from ...lightning_modules.backbone.destinations import ORIGINAL
from ...lightning_modules.backbone.readout import Readout
from ...records.paths import user_path
from .run_writer import RunWriter


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
        return user_path(features)
    data = getattr(trainer, "datamodule", None)
    if isinstance(data, StoredFeatures):
        return data.folder
    folders = [writer.out for writer in writers_before(trainer, callback) if writer.makes == "features"]
    if len(folders) != 1:
        raise ValueError(
            f"{type(callback).__name__} needs `features`: {len(folders)} FeatureWriters are listed before it, and the "
            "data are no StoredFeatures"
        )
    return folders[0]


def writers_before(trainer: L.Trainer, callback: Callback) -> list[RunWriter]:
    """The callbacks that write, of those that are listed before one."""
    callbacks: list[Callback] = cast(Any, trainer).callbacks
    return [other for other in callbacks[: callbacks.index(callback)] if isinstance(other, RunWriter)]


def dictionary_place(trainer: L.Trainer, callback: Callback, given: str) -> Path:
    """Folder of a dictionary; it need not be written yet.

    Args:
        trainer: The trainer.
        callback: Who asks.
        given: Name of a DictionaryFitter listed before it, or a folder.
    """
    path = user_path(given)
    for writer in writers_before(trainer, callback):
        # Where it was told to write; a run that leaves something out may write beside that.
        told = None if writer.told is None else writer.told.resolve()
        if writer.makes == "dictionary" and (writer.name == given or told == path.resolve()):
            return writer.out
    return path


def read_concepts(path: Path, dictionary: ConceptDictionary) -> dict[str, Any]:
    """What a DictionaryFitter wrote of a dictionary beside it.

    Args:
        path: Its `concepts.json`.
        dictionary: The dictionary.

    Raises:
        ValueError: It is missing, or of another dictionary; names both.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; a DictionaryFitter writes it beside its dictionary")
    try:
        concepts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: malformed JSON ({error}); fit the dictionary again") from error
    of = concepts.get("dictionary_hash")
    if of != dictionary.content_hash:
        raise ValueError(
            f"{path}: is of another dictionary ({of}) than the one beside it ({dictionary.content_hash}); fit it again"
        )
    return concepts


def model_of(pl_module: L.LightningModule) -> VisionLanguageModel | None:
    """The running model; nothing under `Replay`, where what needs it is left out."""
    return pl_module.backbone if isinstance(pl_module, BackboneModule) else None


def other_model(one: Mapping[str, Any], other: Mapping[str, Any], variant: str) -> str | None:
    """In what a variant is another model in two feature stores, with both values; nothing where it is the same.

    Args:
        one: Metadata of one store.
        other: Metadata of the other.
        variant: `original`, or the name of a destination.
    """
    for name, found in (
        ("weights", [metadata.get("weights_hash") for metadata in (one, other)]),
        (variant, [metadata.get("checkpoint_hashes", {}).get(variant) for metadata in (one, other)]),
    ):
        if found[0] != found[1]:
            return f"{name} {found[0]} and {found[1]}"
    return None


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
            f"{store.folder}: its states are of another model than this run's (weights "
            f"{store.metadata.get('weights_hash')} and {readout.weights_hash}); take them alone, with --model Replay "
            f"--data StoredFeatures --data.init_args.folder {store.folder}"
        )
    return readout
