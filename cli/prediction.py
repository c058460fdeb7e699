"""What the commands share that run a prediction of their own, without LightningCLI."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import lightning as L
from lightning.pytorch.callbacks import Callback

from ..datamodules import PicturesDataModule
from ..lightning_modules import BackboneModule
from .lightning_cli import hush


def predict(module: BackboneModule, data: PicturesDataModule, callbacks: Sequence[Callback], devices: int = 1) -> None:
    """Run a module over pictures, for what its callbacks write.

    Args:
        module: The module.
        data: The pictures.
        callbacks: What writes.
        devices: GPUs, with a process each; on a machine without, processes.
    """
    hush()
    trainer = L.Trainer(
        callbacks=list(callbacks), devices=devices, logger=False, enable_checkpointing=False, enable_model_summary=False
    )
    trainer.predict(module, data, return_predictions=False)


@contextmanager
def own_flags() -> Iterator[None]:
    """Within the context, errors name the flags of such a command in place of those of `conceptshift predict`."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        message = str(error).replace("--data.init_args.root", "--images").replace("=true", "")
        own = re.sub(r"--(?:model|data)\.init_args\.|--trainer\.|LogitLens\.", "--", message)
        raise type(error)(own) from error
