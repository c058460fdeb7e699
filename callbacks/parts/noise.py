"""States of pictures of noise: what a model's answer alone, without its picture, says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...datamodules.images import read_image
from ...datamodules.stored_features import Row
from ...lightning_modules import VisionLanguageModel
from ...lightning_modules.backbone import Selector


def noise_picture(size: tuple[int, int], sample_id: str, seed: int) -> Image.Image:
    """Uniform noise; that of a sample does not depend on which others there are.

    Args:
        size: Width and height in pixels.
        sample_id: The sample whose picture it replaces.
        seed: Seed of all noise.
    """
    rng = np.random.default_rng([seed, *sample_id.encode()])
    width, height = size
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def noise_states(
    trainer: L.Trainer,
    backbone: VisionLanguageModel,
    samples: Sequence[Row],
    source: Mapping[str, Any],
    seed: int,
    batch_size: int,
) -> Tensor:
    """States while a model reads what it once said, with noise of the same size in place of the pictures.

    Args:
        trainer: Runs the model, in the precision in which it ran before.
        backbone: The model.
        samples: Rows of a feature store.
        source: `site`, `selector` and `variant` of the states, as a dictionary's metadata have them.
        seed: Seed of the noise.
        batch_size: Samples at a time; changes no result.

    Returns:
        States [N, D], float32, on the CPU.
    """
    (found,) = backbone.sites([source["site"]])
    positions = Selector.parse(source["selector"])
    precision = trainer.precision_plugin
    parts = []
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        pictures = [noise_picture(read_image(Path(row["image"])).size, row["sample_id"], seed) for row in batch]
        encoded = backbone.encode(pictures, [row["prompt"] for row in batch], [row["text"] for row in batch])
        inputs = {name: value.to(backbone.model.device) for name, value in encoded.items()}
        with backbone.running_as(source["variant"]), precision.predict_step_context():
            generation = backbone.read(precision.convert_input(inputs), [found])
        parts.append(generation.select(positions, backbone.vocabulary).states[found.name].float().cpu())
    return torch.cat(parts)
