"""`conceptshift export-steered`: save a steered model as an ordinary one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image

from ..lightning_modules import SteeringStep, VisionLanguageModel
from ..lightning_modules.backbone.steered_export import save_steered
from ..records.paths import user_path
from .command import run_command


def export_steered(
    model: str, vector: str, out: str, alpha: float = 1.0, site: str | None = None, revision: str | None = None
) -> None:
    """Save a model that is steered at all positions as an ordinary model directory, which any engine can serve.

    The vector becomes the bias of the layer that writes to its site. The written model is loaded again and compared
    with the steered one before it takes its place.

    Args:
        model: Folder in the Hugging Face layout, or hub id.
        vector: Steering vectors that a SteeringVectorMaker wrote, or a llama.cpp control vector (`.gguf`).
        out: Folder to write.
        alpha: Strength.
        site: Site of the vector, where the file has several: `lm.block.k`, or `projector`.
        revision: Commit or tag on the hub.
    """
    steering = SteeringStep(vector, alpha, "all", site=site).load()
    backbone = VisionLanguageModel.load(model, revision=revision)
    noise = torch.randint(256, (64, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    inputs = backbone.encode([Image.fromarray(noise.numpy())], ["What is in the picture?"])
    difference = save_steered(backbone, steering, user_path(out), inputs)
    print(f"{out}: {model} with {alpha:g} times the vector of {steering.site}; logits equal to {difference:.0e}")


def run(args: Sequence[str]) -> None:
    """Run the command."""
    run_command(export_steered, args)
