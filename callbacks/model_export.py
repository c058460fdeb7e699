"""Writes the trained model where other tools can load it."""

from __future__ import annotations

import shutil
import tempfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_warn

from ..datamodules.files import replacing
from ..lightning_modules.backbone.destinations import step_name, step_of
from ..lightning_modules.base import BackboneModule

# Every export has one of the first two; the others are what PEFT, models, processors and tokenizers write beside them.
_HEADS = ("adapter_config.json", "config.json")
_EXPORTED = (
    *_HEADS, "adapter_model.*", "base_model.json", "README.md", "generation_config.json", "model*.safetensors",
    "model.safetensors.index.json", "*processor_config.json", "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "chat_template.*", "additional_chat_templates", "vocab.*", "merges.txt", "*.model",
)  # fmt: skip


class ModelExport(Callback):
    """Writes the adapter in PEFT's layout, or after full fine-tuning the whole model: at the end, or as a series.

    An export is whole or not there, and replaces an earlier one in its folder.

    Args:
        folder: Where to write. `PeftModel.from_pretrained` or `from_pretrained` loads it, and so does
            `--model.init_args.destination`, `.adapter` or `.model_id`. Anything else in it is refused.
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
        if stage != "fit":
            return
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            raise ValueError(
                "ModelExport cannot write a model that DeepSpeed has in pieces; use --trainer.strategy ddp or --config "
                "configs/fsdp.yaml"
            )
        for folder in [self.folder] if self.every_n_steps is None else self._series():
            if odd := _foreign(folder):
                raise ValueError(
                    f"{folder}: ModelExport would replace it, but {odd} is no part of an export; move that away, or "
                    "choose another folder"
                )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget checkpoints of an earlier run, which would be taken for some of this one."""
        if self.every_n_steps is not None and trainer.is_global_zero:
            for path in self._series():
                if (step_of(path.name) or 0) > trainer.global_step:
                    shutil.rmtree(path)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write one checkpoint of a series."""
        step = trainer.global_step
        # With accumulated gradients several batches end at one step, the first of them at step 0.
        if self.every_n_steps is not None and step % self.every_n_steps == 0 and step not in (0, self._written):
            self._write(trainer, pl_module, self.folder / step_name(step))
            self._written = step

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the model, or the last checkpoint of the series."""
        if self.every_n_steps is None:
            self._write(trainer, pl_module, self.folder)
        elif trainer.global_step != self._written and trainer.global_step > 0:
            self._write(trainer, pl_module, self.folder / step_name(trainer.global_step))

    def _series(self) -> list[Path]:
        return [path for path in sorted(self.folder.glob("step-*")) if step_of(path.name) is not None]

    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule, folder: Path) -> None:
        assert isinstance(pl_module, BackboneModule)
        # Of a sharded model every process has pieces.
        state = pl_module.backbone.gathered_state()
        if not trainer.is_global_zero:
            return
        if odd := _foreign(folder):
            # It came while the model was trained; neither is to be lost.
            beside = tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent)
            rank_zero_warn(f"ModelExport: {odd} has come into {folder}; the export is in {beside} instead")
            folder = Path(beside)
        with replacing(folder) as working:
            pl_module.backbone.save(working, state)


def _foreign(folder: Path) -> str | None:
    """Name of something in a folder that no export has, if there is any."""
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if names and not set(names) & set(_HEADS):
        return names[0]
    return next((name for name in names if not any(fnmatch(name, pattern) for pattern in _EXPORTED)), None)
