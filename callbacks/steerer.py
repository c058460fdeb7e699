"""Steers a model while it is validated, tested, or read."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, cast

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from ..lightning_modules import BackboneModule, SteeringStep
from ..lightning_modules.backbone import Steering
from ..lightning_modules.backbone.interventions import Applied
from .parts.processes import gather
from .parts.steering_checks import check_weights, try_on_longest_prompt


class Steerer(Callback):
    """Changes hidden states along steering vectors during `validate`, `test` and `predict`: f ← f + α (f′ − f).

    Args:
        vectors: What to apply. Several at one site are applied in this order; that of two Steerers would be unknown, so
            that they must not share a site.
    """

    def __init__(self, vectors: list[SteeringStep]) -> None:
        if not vectors:
            raise ValueError("Steerer.vectors: expected at least one vector, got an empty list")
        self.vectors = vectors
        self._loaded: list[Steering] = []
        self._active = ExitStack()
        self._applied: list[Applied] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Read the vectors, so that what is wrong with them is told before a model is loaded."""
        self._loaded = [step.load() for step in self.vectors]
        callbacks: list[Callback] = cast(Any, trainer).callbacks
        before = callbacks[: callbacks.index(self)]
        taken = {steering.site for other in before if isinstance(other, Steerer) for steering in other._loaded}
        for steering in self._loaded:
            if steering.site in taken:
                raise ValueError(
                    f"two Steerers at {steering.site!r}, in no known order: list both vectors under `vectors` of one "
                    "Steerer, in the order in which they are to be applied"
                )

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Try the vectors on the first sample, then begin to steer."""
        assert isinstance(pl_module, BackboneModule)
        check_weights([step.file for step in self.vectors], pl_module.backbone)
        try_on_longest_prompt(trainer, pl_module, [self._loaded])
        self._applied = self._active.enter_context(pl_module.backbone.intervene(*self._loaded))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop steering, and tell whom the conditions let pass."""
        self._active.close()
        for applied, step in zip(self._applied, self.vectors, strict=True):
            passed, samples = map(sum, zip(*gather([(applied.passed, applied.samples)]), strict=True))
            if applied.steering.condition is not None:
                tell = rank_zero_info if passed else rank_zero_warn
                tell(f"{step.file}: its condition let {passed} of {samples} pass (samples, each time they were run)")

    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end
    on_predict_epoch_start = on_validation_epoch_start
    on_predict_epoch_end = on_validation_epoch_end

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Stop steering: Lightning calls this instead of the end hooks."""
        self._active.close()
