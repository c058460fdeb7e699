"""Steers a model while it is validated."""

from __future__ import annotations

from contextlib import ExitStack

import lightning as L
from lightning.pytorch.callbacks import Callback

from ..concepts import load_steering_vector
from ..lightning_modules import BackboneModule
from ..lightning_modules.backbone import Selector, Steering


class Steerer(Callback):
    """Adds a steering vector during `validate` and `test`: f ← f + α s.

    Args:
        vector: File that a SteeringVectorMaker wrote.
        alpha: Strength α; 0 leaves the model as it is.
        positions: Which positions: `all`, `prompt`, `last_prompt`, `image`, `text`, `answer`, an index or a range.
        site: Where; by default the site of the vector.
    """

    def __init__(self, vector: str, alpha: float = 1.0, positions: str = "answer", site: str | None = None) -> None:
        if Selector.parse(positions).needs_answer:
            raise ValueError(f"Steerer.positions: {positions!r} is known only after generation; give a role or a range")
        self.vector = vector
        self.alpha = alpha
        self.positions = positions
        self.site = site
        self._active = ExitStack()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to steer."""
        assert isinstance(pl_module, BackboneModule)
        vector, metadata = load_steering_vector(self.vector)
        site = self.site or metadata["site"]
        intervention = Steering(site, vector.to(pl_module.device), self.alpha, self.positions)
        self._active.enter_context(pl_module.backbone.intervene(intervention))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop steering."""
        self._active.close()

    on_test_start = on_validation_start
    on_test_end = on_validation_end

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Stop steering: Lightning calls this instead of the end hooks."""
        self._active.close()
