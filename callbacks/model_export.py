"""Writes the trained model where other tools can load it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from ..lightning_modules.backbone.destinations import step_of
from ..lightning_modules.base import BackboneModule


class ModelExport(Callback):
    """Writes the adapter in PEFT's layout, or after full fine-tuning the whole model: at the end, or as a series.

    Args:
        folder: Where to write. `PeftModel.from_pretrained` or `from_pretrained` loads it, and so does
            `--model.init_args.destination`, `.adapter` or `.model_id`.
        every_n_steps: Write a series instead: `step-000060`, `step-000120`, … in `folder`, and where training ends. As
            `--model.init_args.destination`, the folder gives the trajectory of the shift.
    """

    def __init__(self, folder: str, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps of ModelExport must be at least 1, got {every_n_steps}")
        self.folder = Path(folder)
        self.every_n_steps = every_n_steps
        self._written: int | None = None

    @property
    def state_key(self) -> str:
        """One run may write a series and its end."""
        return f"{type(self).__name__}[{self.folder}]"

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what could not be done at the end."""
        if not isinstance(pl_module, BackboneModule):
            raise TypeError(f"ModelExport exports a FineTuning module, got {type(pl_module).__name__}")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget checkpoints of an earlier run, which would be taken for some of this one."""
        if self.every_n_steps is not None and trainer.is_global_zero:
            for path in self.folder.glob("step-*"):
                if (step_of(path.name) or 0) > trainer.global_step:
                    shutil.rmtree(path)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write one checkpoint of a series."""
        step = trainer.global_step
        # With accumulated gradients several batches end at one step.
        if self.every_n_steps is not None and step % self.every_n_steps == 0 and step != self._written:
            self._write(trainer, pl_module, self.folder / _name(step))
            self._written = step

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the model, or the last checkpoint of the series."""
        if self.every_n_steps is None:
            self._write(trainer, pl_module, self.folder)
        elif trainer.global_step != self._written and trainer.global_step > 0:
            self._write(trainer, pl_module, self.folder / _name(trainer.global_step))

    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule, folder: Path) -> None:
        assert isinstance(pl_module, BackboneModule)
        if not trainer.is_global_zero:
            return
        if self.every_n_steps is None:
            pl_module.backbone.save(folder)
            return
        # Whole or not at all: a series is read by what lies in its folder.
        working = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(working, ignore_errors=True)
        pl_module.backbone.save(working)
        shutil.rmtree(folder, ignore_errors=True)
        working.rename(folder)


def _name(step: int) -> str:
    return f"step-{step:06d}"
