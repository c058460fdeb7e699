"""What callbacks share across the processes of a distributed run."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

SHARDING = (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)
"""Strategies under which a process has only its pieces of the parameters."""


def refuse_pieces(trainer: L.Trainer, what: str) -> None:
    """Refuse to run a model outside the batches of a run where every process has only pieces of it.

    Raises:
        ValueError: The strategy leaves every process with pieces.
    """
    if isinstance(trainer.strategy, SHARDING):
        raise ValueError(
            f"{what} runs the model outside of its batches, which {type(trainer.strategy).__name__} cannot do; use "
            "--trainer.strategy ddp, or leave it out"
        )


def gather(rows: list[Any]) -> list[Any]:
    """The rows of all processes, on every process."""
    if not (dist.is_available() and dist.is_initialized()):
        return rows
    parts: list[list[Any]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]
