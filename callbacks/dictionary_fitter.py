"""Fits a concept dictionary to extracted states and grounds it in words and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from ..concepts import ConceptDictionary
from ..datamodules.files import write_json
from ..datamodules.stored_features import FeatureStore
from ..lightning_modules import BackboneModule
from ..lightning_modules.extraction import Variant
from ..metrics import concept_overlap
from .figures import concept_figure, tensorboard
from .grounding import pictures_of, words_of


class DictionaryFitter(Callback):
    """After `predict`, learns a dictionary from a feature store (CoX-LMM, arXiv 2406.08074).

    Writes `dictionary.safetensors` and `concepts.json` (words, pictures and scores) to `out`, and a figure to
    TensorBoard.

    Args:
        features: The feature store; list this callback after the FeatureWriter that fills it.
        site: Site of the states.
        selector: Selector of the states.
        dictionary: The method, e.g. `conceptshift.concepts.SemiNMF`.
        out: Folder to write.
        variant: `original` or `destination`.
        words: Words per concept.
        candidates: Tokens among which words are looked for.
        images: Pictures per concept.
    """

    def __init__(
        self,
        features: str,
        site: str,
        selector: str,
        dictionary: ConceptDictionary,
        out: str,
        variant: Variant = "original",
        words: int = 10,
        candidates: int = 50,
        images: int = 5,
    ) -> None:
        self.features = features
        self.site = site
        self.selector = selector
        self.dictionary = dictionary
        self.out = Path(out)
        self.variant = variant
        self.words = words
        self.candidates = candidates
        self.images = images

    @property
    def state_key(self) -> str:
        """Several dictionaries may be fitted in one run."""
        return f"{type(self).__name__}[{self.out}]"

    @rank_zero_only
    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Fit, ground, and write."""
        assert isinstance(pl_module, BackboneModule)
        store = FeatureStore(self.features)
        ids, Z = store.states(self.site, self.selector, self.variant)
        samples = store.samples(self.variant)
        matched = len(set(ids))
        rank_zero_info(f"{self.out}: {self.selector} matched {matched} of {len(samples)} {self.variant} samples")
        self.dictionary.fit(Z)
        words = words_of(pl_module.backbone, self.dictionary.dictionary, self.site, self.words, self.candidates)
        pictures = pictures_of(self.dictionary.transform(Z), ids, samples, self.images)
        report = self.dictionary.report
        summary: dict[str, Any] = {
            "method": type(self.dictionary).__name__,
            "k": self.dictionary.n_concepts,
            "variant": self.variant,
            "site": self.site,
            "selector": self.selector,
            "matched_samples": matched,
            "samples": len(samples),
            "states": len(ids),
            "explained_variance": report.explained_variance,
            "objective": report.objective,
            "iterations": report.iterations,
            "l0": report.l0,
            "dead_concepts": report.dead_concepts,
            "overlap": concept_overlap(words),
            "sizes": self.dictionary.assign(Z).bincount(minlength=self.dictionary.n_concepts).tolist(),
            "words": words,
            "images": pictures,
        }
        self.dictionary.save(
            self.out / "dictionary.safetensors",
            {"site": self.site, "selector": self.selector, "variant": self.variant, "features": store.metadata},
        )
        write_json(self.out / "concepts.json", summary)
        self._show(trainer, summary, report.objective_history)

    def _show(self, trainer: L.Trainer, summary: dict[str, Any], objective: tuple[float, ...]) -> None:
        writer = tensorboard(trainer)
        if writer is None:
            return
        name = f"concepts/{self.out.name}"
        paths = [[picture["image"] for picture in pictures] for pictures in summary["images"]]
        writer.add_figure(name, concept_figure(summary["words"], paths))
        for step, value in enumerate(objective):
            writer.add_scalar(f"{name}/objective", value, step)
        for measure in ("explained_variance", "overlap", "l0"):
            writer.add_scalar(f"{name}/{measure}", summary[measure], trainer.global_step)
