"""A frozen probe set: the same samples, read by a model while it trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import lightning as L
from torch import nn

from ...datamodules.base import PictureDataModule
from ...datamodules.sample import Batch
from ...lightning_modules import Extraction, VisionLanguageModel
from ...lightning_modules.backbone import Selector, Site

Probed = list[tuple[Batch, Extraction]]


@dataclass(frozen=True)
class Probe:
    """Samples with their answers, encoded once, of which this process reads its share.

    Attributes:
        batches: The share of this process, on the CPU.
        skipped: What of it has no readable picture: `sample_id` and `reason`.
        site: Where states are read.
        selector: At which positions of the samples' own answers.
    """

    batches: list[Batch]
    skipped: list[dict[str, str]]
    site: Site
    selector: Selector

    @classmethod
    def load(
        cls, data: PictureDataModule, samples: int, backbone: VisionLanguageModel, site: str, selector: str, *,
        rank: int, processes: int,
    ) -> Probe:  # fmt: skip
        """Read the pictures.

        Args:
            data: Where the samples are from: the first ones of its predict split.
            samples: How many at most.
            backbone: The model.
            site: Where states are read.
            selector: At which positions.
            rank: This process.
            processes: How many there are.

        Raises:
            ValueError: The site matches nothing, or several.
        """
        found = backbone.sites([site])
        if len(found) != 1 or found[0].positions == "patches":
            raise ValueError(f"site {site!r}: ShiftMonitor reads one site of the language model, such as lm.block.3")
        data.setup("predict")
        own = data.samples("predict")[:samples][rank::processes]
        batches = list(data.batches(own, backbone.encode))
        skipped = [{"sample_id": item.sample_id, "reason": item.reason} for batch in batches for item in batch.skipped]
        return cls([batch for batch in batches if batch.samples], skipped, found[0], Selector.parse(selector))

    def read(self, trainer: L.Trainer, backbone: VisionLanguageModel, variant: str) -> Probed:
        """Read the states with the model as it is, in evaluation mode; nothing of its training changes.

        Args:
            trainer: Runs the model, in the precision of the training.
            backbone: The model.
            variant: What to call it.
        """
        precision = trainer.precision_plugin
        probed: Probed = []
        with _evaluating(backbone), precision.predict_step_context():
            for batch in self.batches:
                inputs = precision.convert_input(batch.to(backbone.model.device).inputs)
                generation = backbone.read(inputs, [self.site])
                rows = generation.select(self.selector, backbone.vocabulary)
                rows.states = {name: states.cpu() for name, states in rows.states.items()}
                probed.append((Batch(batch.samples, {}), Extraction(variant, generation.texts, [rows])))
        return probed


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
