"""Numbers, to every logger of a run and to its `callback_metrics`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch


def log_numbers(trainer: L.Trainer, numbers: Mapping[str, float], step: int | None = None) -> None:
    """Log what `LightningModule.log` cannot: outside of its steps, in `predict`, or at a step of one's own.

    Args:
        trainer: The trainer; of several processes, the first one's loggers log.
        numbers: Tag → value.
        step: Training step that they are of; by default the current one.
    """
    if not numbers:
        return
    trainer.callback_metrics.update({name: torch.tensor(float(value)) for name, value in numbers.items()})
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            logger.log_metrics(dict(numbers), trainer.global_step if step is None else step)


def log_rows(trainer: L.Trainer, name: str, summary: Mapping[str, Any], of: str, measure: str) -> None:
    """Log one number of each row of a result: `<name>/<variant>/<setting>/<what was done>/<measure>`.

    Args:
        trainer: The trainer.
        name: First part of the tags.
        summary: `variants`, each with its `rows`.
        of: Key in a row of what was done.
        measure: Key of the number.
    """
    log_numbers(
        trainer,
        {
            f"{name}/{variant}/{row['setting']}/{row[of]}/{measure}": row[measure]
            for variant, found in summary["variants"].items()
            for row in found["rows"]
            if row[measure] is not None
        },
    )
