"""Tries steering on one sample, so that what does not fit is told before a run has begun."""

from __future__ import annotations

from collections.abc import Iterable

import lightning as L

from ...datamodules.base import PictureDataModule
from ...lightning_modules import BackboneModule
from ...lightning_modules.backbone import Steering

_STAGES = {"test": "test", "predict": "predict"}


def try_on_first_sample(trainer: L.Trainer, module: BackboneModule, steerings: Iterable[Iterable[Steering]]) -> None:
    """Apply each group of interventions to the first sample of the running stage, if its picture can be read.

    Args:
        trainer: The trainer.
        module: The model.
        steerings: Interventions that are applied together, several times over.

    Raises:
        ValueError: As `VisionLanguageModel.try_steering`.
    """
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, PictureDataModule):
        return
    stage = _STAGES.get(str(trainer.state.stage.value if trainer.state.stage else ""), "validate")
    first = next(iter(data.batches(data.samples(stage)[:1], module.encode))).to(module.device)
    for group in steerings if first.samples else ():
        module.backbone.try_steering(first.inputs, list(group), module.max_new_tokens)
