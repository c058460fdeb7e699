"""What is refused of steering before a run has begun: vectors that do not fit, or were made for another model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import lightning as L

from ...concepts import load_steering_vectors
from ...datamodules.base import PictureDataModule
from ...lightning_modules import BackboneModule, VisionLanguageModel
from ...lightning_modules.backbone import Steering
from ...lightning_modules.backbone.identity import model_destination_hash

_STAGES = {"test": "test", "predict": "predict"}


def check_weights(files: Iterable[str], backbone: VisionLanguageModel) -> None:
    """Refuse steering vectors that were made from the states of another model than the one that is steered.

    A pair is one model in this: vectors of its original steer the destination, and the other way round. Vectors that do
    not say what they are of, such as other programs' control vectors, pass.

    Args:
        files: Files of steering vectors.
        backbone: The model that is steered.

    Raises:
        ValueError: They are of another model; names both.
    """
    for file in dict.fromkeys(files):
        metadata = load_steering_vectors(file).metadata
        for side in ("target", "source"):
            check_same_model(file, metadata.get(side, {}).get("store", {}), backbone)


def check_same_model(file: str, made_from: Mapping[str, Any], backbone: VisionLanguageModel) -> None:
    """Refuse what was made from the states of another model than the running one, as far as it says from which.

    Args:
        file: What was made, for the message.
        made_from: Metadata of the states.
        backbone: The running model.

    Raises:
        ValueError: It is of another model; names both.
    """
    own, theirs = backbone.weights_hash(), made_from.get("weights_hash")
    pair = made_from.get("checkpoint_hashes", {}).values()
    as_destination = {model_destination_hash(backbone.hashes)} - {None}
    if theirs not in (None, own) and not as_destination & set(pair):
        raise ValueError(
            f"{file}: made from the states of {made_from.get('model_id')} (weights {theirs}), not of "
            f"{backbone.source} (weights {own}); make it anew from this model"
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
