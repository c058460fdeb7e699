"""The metadata of a feature store: what makes its states what they are."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, cast

import lightning as L
import torch
import transformers
from lightning.pytorch.callbacks import Callback

from ... import __version__
from ...concepts import content_hash, load_steering_vectors
from ...datamodules.base import PictureDataModule
from ...datamodules.stored_features import Row
from ...lightning_modules import FeatureExtraction, Inspection, SteeringStep, SteeringSweep
from ...lightning_modules.backbone.destinations import ORIGINAL
from ...lightning_modules.base import BackboneModule
from ...lightning_modules.variants import VariantsModule
from ..steerer import Steerer


def describe_run(trainer: L.Trainer, module: FeatureExtraction) -> Row:
    """What an extraction depends on, as far as the configuration tells."""
    return {
        **_describe(trainer, module, getattr(trainer, "datamodule", None)),
        "checkpoints": dict(module.destinations),
        "site_patterns": module.site_patterns,
        "selectors": [selector.name for selector in module.selectors],
        "variants": list(module.variants),
        "answers": module.answers,
        "steering": [_describe_step(step) for step in _steps(trainer)],
    }


def describe_sweep(trainer: L.Trainer, module: SteeringSweep) -> Row:
    """What the answers of a sweep depend on, as far as it is known before the model is loaded."""
    return {**_describe(trainer, module, getattr(trainer, "datamodule", None)), **module.describe()}


def describe_inspection(trainer: L.Trainer, module: Inspection) -> Row:
    """What the answers of an inspection depend on, as far as the configuration tells."""
    return {
        **_describe(trainer, module, getattr(trainer, "datamodule", None)),
        "checkpoints": dict(module.destinations),
        "variants": list(module.variants),
        "steering": [_describe_step(step) for step in module.steering],
    }


def describe_model(module: FeatureExtraction) -> Row:
    """What only the loaded model tells: its sites, and hashes of its weights."""
    return {"sites": [site.name for site in module.sites], **describe_weights(module)}


def describe_weights(module: VariantsModule) -> Row:
    """Hashes of the weights of a loaded model and of its destinations."""
    return {
        "weights_hash": module.backbone.weights_hash(),
        "checkpoint_hashes": {name: module.backbone.destination_hash(name) for name in module.destinations},
    }


def describe_probe(
    trainer: L.Trainer, module: BackboneModule, data: PictureDataModule, samples: int, site: str, selector: str
) -> Row:
    """What the states of a probe set depend on, and the loaded original's hash.

    Args:
        trainer: Trains the model.
        module: The model.
        data: Where the probe set is from.
        samples: How many samples it has at most.
        site: Where they are read.
        selector: At which positions.
    """
    return {
        **_describe(trainer, module, data),
        "samples": samples,
        "checkpoints": {},
        "checkpoint_hashes": {},
        "sites": [site],
        "selectors": [selector],
        "variants": [ORIGINAL],
        "answers": "target",
        "weights_hash": module.backbone.weights_hash(),
    }


def _steps(trainer: L.Trainer) -> list[SteeringStep]:
    """What steers this run, in order."""
    callbacks: list[Callback] = cast(Any, trainer).callbacks
    return [step for callback in callbacks if isinstance(callback, Steerer) for step in callback.vectors]


def _describe_step(step: SteeringStep) -> Row:
    return {**asdict(step), "content_hash": content_hash(load_steering_vectors(step.file).vectors)}


def _describe(trainer: L.Trainer, module: BackboneModule, data: Any) -> Row:
    return {
        "model_id": module.model_id,
        "revision": module.revision,
        "dtype": module.dtype_name,
        "quantization": module.quantization,
        "max_new_tokens": module.max_new_tokens,
        "precision": str(trainer.precision),
        "data": data.describe("predict") if isinstance(data, PictureDataModule) else {},
        "versions": {"conceptshift": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }
