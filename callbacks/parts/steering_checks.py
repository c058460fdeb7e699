"""What is told of steering before a run has begun: vectors that do not fit, or were made for another model."""

from __future__ import annotations

from collections.abc import Iterable

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from ...concepts import load_steering_vectors
from ...datamodules.base import PictureDataModule
from ...lightning_modules import BackboneModule, VisionLanguageModel
from ...lightning_modules.backbone import Steering

_STAGES = {"test": "test", "predict": "predict"}


def warn_of_other_weights(files: Iterable[str], backbone: VisionLanguageModel) -> None:
    """Tell which steering vectors were made from the states of another model; it may be meant.

    Args:
        files: Files of steering vectors.
        backbone: The model that is steered.
    """
    own = backbone.weights_hash()
    for file in dict.fromkeys(files):
        store = load_steering_vectors(file).metadata.get("target", {}).get("store", {})
        if store.get("weights_hash", own) != own:
            rank_zero_warn(
                f"{file}: made from the states of {store.get('model_id')}, whose weights are not those of "
                f"{backbone.source} (or in another precision)"
            )


def try_on_longest_prompt(trainer: L.Trainer, module: BackboneModule, steerings: Iterable[Iterable[Steering]]) -> None:
    """Apply each group of interventions to the sample with the longest prompt, if its picture can be read.

    The longest, because a range of positions may lie behind the others.

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
    longest = max(data.samples(stage), key=lambda sample: len(sample.prompt))
    batch = next(iter(data.batches([longest], module.encode))).to(module.device)
    for group in steerings if batch.samples else ():
        module.backbone.try_steering(batch.inputs, list(group), module.max_new_tokens)
