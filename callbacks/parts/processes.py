"""What callbacks share across the processes of a distributed run."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

SHARDING = (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)
"""Strategies under which a process has only its pieces of the parameters."""


def gather(rows: list[Any]) -> list[Any]:
    """The rows of all processes, on every process."""
    if not (dist.is_available() and dist.is_initialized()):
        return rows
    parts: list[list[Any]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]
