"""What the scoring callbacks share: collect answers, score the whole set at once, log and write."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from ..datamodules.files import write_json
from ..datamodules.sample import Batch
from ..metrics import RowMetric
from .parts.processes import gather


class Scorer(Callback, ABC):
    """Base of the scoring callbacks; works in `validate`, `test`, and the validation of `fit`.

    Args:
        metric: Scores a whole set; its rows become the file's predictions.
        tag: First part of the names in TensorBoard.
        out: JSON file to write: scores, predictions, skipped samples.
    """

    def __init__(self, metric: RowMetric, tag: str, out: str | None) -> None:
        self.metric = metric
        self.tag = tag
        self.out = None if out is None else Path(out)
        self._skipped: list[dict[str, str]] = []
        self._losses: list[tuple[str, tuple[float, int]]] = []

    @abstractmethod
    def add(self, batch: Batch, texts: list[str]) -> None:
        """Give one batch to the metric."""

    @abstractmethod
    def summary(self, rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """More for the file, from id → row of the whole set; numbers at its top level are logged too."""

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start with an empty set."""
        self.metric.reset()
        self.metric.to(pl_module.device)
        self._skipped = []
        self._losses = []

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect one batch."""
        self._skipped += [{"sample_id": item.sample_id, "reason": item.reason} for item in batch.skipped]
        if batch.samples:
            self._losses += zip(batch.sample_ids, outputs["losses"], strict=True)
            self.add(batch, outputs["texts"])

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Score, log on all processes, write on the first."""
        if trainer.sanity_checking:
            return
        if not any(gather([self.metric.update_called])):
            reasons = [item["reason"] for item in gather(self._skipped)]
            raise ValueError(f"no readable picture among the samples: {'; '.join(reasons[:1])}")
        scores = {name: float(value) for name, value in self.metric.compute().items()}
        rows = dict(self.metric.rows)
        summary = self.summary(rows)
        scores.update({name: value for name, value in summary.items() if isinstance(value, float)})
        skipped = {item["sample_id"]: item["reason"] for item in gather(self._skipped)}
        # Per sample and by id, the loss does not depend on batches, processes or the samplers' repetitions.
        sums, tokens = zip(*dict(sorted(gather(self._losses))).values(), strict=True)
        stage = "test" if trainer.testing else "val"
        pl_module.log(f"loss/{stage}", sum(sums) / sum(tokens))
        pl_module.log_dict({f"{self.tag}/{name}": value for name, value in scores.items()})
        if self.out is not None and trainer.is_global_zero:
            content = {**summary, "scores": scores, "samples": len(rows), "skipped": skipped, "predictions": rows}
            write_json(self.out, content)

    # `test` is scored as `validate` is.
    on_test_start = on_validation_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end
