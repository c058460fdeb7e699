"""Writes the trained model where other tools can load it."""

from __future__ import annotations

import os
import shutil
import tempfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from uuid import uuid4

import lightning as L
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_warn

from ..lightning_modules.backbone.destinations import run_of, step_name, step_of
from ..lightning_modules.base import BackboneModule
from ..records.files import beside, put_in_place, replacing
from ..records.provenance import KEY
from .parts.run_description import provenance
from .parts.run_writer import RunWriter

# Every export has one of the first two; the others are what PEFT, models, processors and tokenizers write beside them.
_HEADS = ("adapter_config.json", "config.json")
_EXPORTED = (
    *_HEADS, "adapter_model.*", "base_model.json", "README.md", "generation_config.json", "model*.safetensors",
    "model.safetensors.index.json", "*processor_config.json", "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "chat_template.*", "additional_chat_templates", "vocab.*", "merges.txt", "*.model",
)  # fmt: skip


class ModelExport(RunWriter):
    """Writes the adapter in PEFT's layout, or after full fine-tuning the whole model: at the end, or as a series.

    An export is whole or not there, and replaces an earlier one in its folder: when training has ended, and not before.
    What trained it is told in its `base_model.json`.

    Args:
        folder: Where to write; by default `adapter`, `model` or `series` in the run's folder.
            `PeftModel.from_pretrained` or `from_pretrained` loads it, and so does `--model.init_args.destination`,
            `.adapter` or `.model_id`. Anything else in it is refused.
        every_n_steps: Write a series instead: `step-000060`, `step-000120`, … in `folder`, and where training ends. As
            `--model.init_args.destination`, the folder gives the trajectory of the shift.
    """

    option = "folder"

    def __init__(self, folder: str | None = None, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps of ModelExport must be at least 1, got {every_n_steps}")
        super().__init__(folder)
        self.every_n_steps = every_n_steps
        self.place = "adapter" if every_n_steps is None else "series"  # type: ignore[misc]
        # Tells the checkpoints of one training from those of another; a resumed one goes on with it.
        self._run = ""
        # Where the series grows: beside one of an earlier training, until this one has ended.
        self._growing = Path()
        self._written: int | None = None

    @property
    def default_name(self) -> str:
        """One run may write a series and its end."""
        return "end" if self.every_n_steps is None else "series"

    def state_dict(self) -> dict[str, Any]:
        """Which training this is."""
        return {"run": self._run}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with a training."""
        self._run = state_dict["run"]

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
        if self.every_n_steps is None and getattr(pl_module, "lora", None) is None:
            self.place = "model"  # type: ignore[misc]
        self.locate(trainer)
        for folder in [self.out] if self.every_n_steps is None else _series(self.out):
            if odd := _foreign(folder):
                raise ValueError(
                    f"{folder}: ModelExport would replace it, but {odd} is no part of an export; move that away, or "
                    "choose another folder"
                )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin a series, or go on with that of the training that is resumed."""
        resumed = bool(self._run) and trainer.global_step > 0
        self._run = trainer.strategy.broadcast(self._run if resumed else uuid4().hex)
        if self.every_n_steps is None:
            return
        step, self._growing = trainer.global_step, self.out
        if trainer.is_global_zero:
            new = beside(self.out)
            if not (resumed and _run_of(new) == self._run):
                shutil.rmtree(new, ignore_errors=True)
                own = resumed and _run_of(self.out) == self._run
                if own and step < max(map(_step, _series(self.out))):
                    # It has been longer: what comes after this step stays until there is something in its place.
                    _link(self.out, new)
                elif not own and _series(self.out):
                    new.mkdir(parents=True)
            self._growing = new if new.exists() else self.out
            for path in _series(self._growing):
                if _step(path) > step:
                    shutil.rmtree(path)
        self._growing = trainer.strategy.broadcast(self._growing)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write one checkpoint of a series."""
        step = trainer.global_step
        # With accumulated gradients several batches end at one step, the first of them at step 0.
        if self.every_n_steps is not None and step % self.every_n_steps == 0 and step not in (0, self._written):
            self._write(trainer, pl_module, self._growing / step_name(step))
            self._written = step

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the model, or the last checkpoint of the series."""
        if self.every_n_steps is None:
            self._write(trainer, pl_module, self.out)
            return
        if trainer.global_step != self._written and trainer.global_step > 0:
            self._write(trainer, pl_module, self._growing / step_name(trainer.global_step))
        if trainer.is_global_zero and self._growing != self.out:
            put_in_place(self._growing, self.out)

    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule, folder: Path) -> None:
        assert isinstance(pl_module, BackboneModule)
        # Of a sharded model every process has pieces.
        state = pl_module.backbone.gathered_state()
        if not trainer.is_global_zero:
            return
        if odd := _foreign(folder):
            # It came while the model was trained; neither is to be lost.
            beside_it = tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent)
            rank_zero_warn(f"ModelExport: {odd} has come into {folder}; the export is in {beside_it} instead")
            folder = Path(beside_it)
        made = {"run": self._run, "step": trainer.global_step, KEY: provenance(trainer, pl_module)}
        with replacing(folder) as working:
            pl_module.backbone.save(working, state, made)


def _series(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("step-*")) if step_of(path.name) is not None]


def _step(path: Path) -> int:
    return step_of(path.name) or 0


def _run_of(folder: Path) -> str | None:
    """Which training a series is of."""
    steps = _series(folder)
    return None if not steps else run_of(steps[0])


def _link(series: Path, new: Path) -> None:
    """Copy a series, without copying what is in its files."""
    try:
        shutil.copytree(series, new, copy_function=os.link)
    except shutil.Error:  # a file system without links
        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(series, new)


def _foreign(folder: Path) -> str | None:
    """Name of something in a folder that no export has, if there is any."""
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if names and not set(names) & set(_HEADS):
        return names[0]
    return next((name for name in names if not any(fnmatch(name, pattern) for pattern in _EXPORTED)), None)
