"""Makes a steering vector from extracted states."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch import Tensor

from ..concepts import coarse_vector, save_steering_vector
from ..datamodules.stored_features import FeatureStore
from ..metrics import normalize_answer
from .parts.sources import store_folder


@dataclass
class StateSet:
    """Some states of a feature store.

    Attributes:
        selector: Selector of the states.
        features: The feature store; by default the one that a FeatureWriter listed before writes, or the one that is
            replayed.
        variant: `original`, `destination`, or the name of another checkpoint.
        answer: Only samples that the model answered with exactly this, after VQA normalisation.
    """

    selector: str
    features: str | None = None
    variant: str = "original"
    answer: str | None = None

    def states(self, store: FeatureStore, site: str) -> Tensor:
        """The states [N, D] at a site of their store.

        Raises:
            ValueError: There are none.
        """
        ids, states = store.states(site, self.selector, self.variant)
        if self.answer is None:
            return states
        wanted = normalize_answer(self.answer)
        texts = {sample_id: row["text"] for sample_id, row in store.samples(self.variant).items()}
        keep = [row for row, sample_id in enumerate(ids) if normalize_answer(texts[sample_id]) == wanted]
        if not keep:
            raise ValueError(f"{store.folder}: no {self.variant} sample was answered {self.answer!r}")
        return states[keep]


class SteeringVectorMaker(Callback):
    """After `predict`, writes the coarse vector s = mean(target) − mean(source) (arXiv 2501.03012, §4).

    Args:
        site: Site at which the states were read and at which the vector will be applied.
        target: States of what the model shall do.
        source: States of what it does.
        out: File to write.
    """

    def __init__(self, site: str, target: StateSet, source: StateSet, out: str) -> None:
        self.site = site
        self.target = target
        self.source = source
        self.out = Path(out)

    @property
    def state_key(self) -> str:
        """Several vectors may be made in one run."""
        return f"{type(self).__name__}[{self.out}]"

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what could not be done at the end."""
        for side in (self.target, self.source):
            store_folder(trainer, self, side.features)

    @rank_zero_only
    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Average, subtract, and write."""
        target, target_from = self._read(trainer, self.target)
        source, source_from = self._read(trainer, self.source)
        vector = coarse_vector(target, source)
        metadata = {"site": self.site, "target": target_from, "source": source_from}
        save_steering_vector(self.out, vector, metadata)
        rank_zero_info(
            f"{self.out}: mean of {len(target)} target minus mean of {len(source)} source states at {self.site}, "
            f"length {float(vector.norm()):.3g}"
        )

    def _read(self, trainer: L.Trainer, side: StateSet) -> tuple[Tensor, dict[str, Any]]:
        """The states of one side, and where they come from."""
        folder = store_folder(trainer, self, side.features)
        states = side.states(FeatureStore(folder), self.site)
        return states, {**vars(side), "features": str(folder), "states": len(states)}
