"""Writes the trained model where other tools can load it."""

from __future__ import annotations

from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback

from ..lightning_modules.base import BackboneModule


class ModelExport(Callback):
    """After `fit`, writes the adapter in PEFT's layout, or after full fine-tuning the whole model.

    Args:
        folder: Where to write. `PeftModel.from_pretrained` or `from_pretrained` loads it, and so does
            `--model.init_args.adapter` or `--model.init_args.model_id`.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the model on rank 0."""
        if not isinstance(pl_module, BackboneModule):
            raise TypeError(f"ModelExport exports a FineTuning module, got {type(pl_module).__name__}")
        if trainer.is_global_zero:
            pl_module.backbone.save(self.folder)
