"""Fits a concept dictionary to extracted states and grounds it in words and pictures."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor

from ..concepts import ConceptDictionary, stability
from ..datamodules.files import write_json
from ..datamodules.stored_features import FeatureStore, held_out_ids
from ..lightning_modules.extraction import Variant
from ..metrics import concept_overlap
from .concept_states import ConceptStates
from .figures import concept_figure, tensorboard
from .grounding import GroundingOptions, pictures_of, words_of
from .projector import add_states
from .sources import readout_of, store_folder

_GROUNDING = GroundingOptions()


class DictionaryFitter(Callback):
    """After `predict`, learns a dictionary from a feature store (CoX-LMM, arXiv 2406.08074).

    Writes `dictionary.safetensors` and `concepts.json` (words, pictures and scores) to `out`; to TensorBoard a figure,
    the objective, and states in the embedding projector.

    Args:
        site: Site of the states.
        selector: Selector of the states. Of `token_of_interest:WORD`, samples count whose references, where they have
            any, have the word too.
        dictionary: The method, e.g. `conceptshift.concepts.SemiNMF`.
        out: Folder to write.
        features: The feature store; by default the one that a FeatureWriter listed before this writes, or the one that
            is replayed.
        variant: `original` or `destination`.
        grounding: What the concepts are grounded in.
        held_out: Share of the samples to keep out of the fit, for scores. An id alone decides whether its sample is
            kept out, so that it is in every run.
        stability_seeds: Number of further seeds to fit with, to report how well each concept is found again.
    """

    def __init__(
        self,
        site: str,
        selector: str,
        dictionary: ConceptDictionary,
        out: str,
        features: str | None = None,
        variant: Variant = "original",
        grounding: GroundingOptions = _GROUNDING,
        held_out: float = 0.0,
        stability_seeds: int = 0,
    ) -> None:
        if stability_seeds < 0:
            raise ValueError(f"stability_seeds must be at least 0, got {stability_seeds}")
        held_out_ids([], held_out)
        self.site = site
        self.selector = selector
        self.dictionary = dictionary
        self.out = Path(out)
        self.features = features
        self.variant = variant
        self.grounding = grounding
        self.held_out = held_out
        self.stability_seeds = stability_seeds

    @property
    def state_key(self) -> str:
        """Several dictionaries may be fitted in one run."""
        return f"{type(self).__name__}[{self.out}]"

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what could not be done at the end."""
        store_folder(trainer, self, self.features)
        self.grounding.check()

    @rank_zero_only
    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Fit, ground, and write."""
        store = FeatureStore(store_folder(trainer, self, self.features))
        found = ConceptStates.read(store, self.site, self.selector, self.variant)
        kept_out = held_out_ids(found.ids, self.held_out)
        fitted = found.of(set(found.ids) - kept_out) if kept_out else found
        self.dictionary.fit(fitted.states)
        words = words_of(readout_of(pl_module, store), self.dictionary.dictionary, self.site, self.grounding)
        summary = {
            "variant": self.variant,
            "site": self.site,
            "selector": self.selector,
            "held_out": self.held_out,
            "held_out_samples": len(kept_out),
            "grounding": asdict(self.grounding),
            **summarise(self.dictionary, fitted, words, self.grounding.images),
            **reproducibility(self.dictionary, fitted.states, self.stability_seeds),
        }
        metadata = {name: summary[name] for name in ("site", "selector", "variant", "held_out")}
        self.dictionary.save(self.out / "dictionary.safetensors", {**metadata, "features": store.metadata})
        write_json(self.out / "concepts.json", summary)
        self._show(trainer, summary, fitted)

    def _show(self, trainer: L.Trainer, summary: dict[str, Any], fitted: ConceptStates) -> None:
        writer = tensorboard(trainer)
        if writer is None:
            return
        name = f"concepts/{self.out.name}"
        paths = [[picture["image"] for picture in pictures] for pictures in summary["images"]]
        missing = sorted({path for row in paths for path in row if not Path(path).is_file()})
        if missing:
            rank_zero_warn(f"{self.out}: {missing[0]} and other pictures are not there; TensorBoard shows them in gray")
        writer.add_figure(name, concept_figure(summary["words"], paths))
        for step, value in enumerate(self.dictionary.report.objective_history):
            writer.add_scalar(f"{name}/objective", value, step)
        for measure in ("explained_variance", "overlap", "l0"):
            writer.add_scalar(f"{name}/{measure}", summary[measure], trainer.global_step)
        assigned = self.dictionary.assign(fitted.states)
        add_states(writer, self.out.name, fitted, assigned, summary["words"], self.dictionary.seed)


def summarise(
    dictionary: ConceptDictionary, fitted: ConceptStates, words: list[list[str]], images: int
) -> dict[str, Any]:
    """What is reported of a dictionary.

    Args:
        dictionary: The dictionary, fitted.
        fitted: The states that it was fitted on.
        words: Words of each concept.
        images: Pictures per concept.
    """
    report, assigned = dictionary.report, dictionary.assign(fitted.states)
    return {
        "method": type(dictionary).__name__,
        "k": dictionary.n_concepts,
        "matched_samples": fitted.matched,
        "confirmed_samples": fitted.confirmed,
        "samples": len(fitted.samples),
        "states": len(fitted.ids),
        "explained_variance": report.explained_variance,
        "objective": report.objective,
        "iterations": report.iterations,
        "l0": report.l0,
        "dead_concepts": report.dead_concepts,
        "overlap": concept_overlap(words),
        "sizes": assigned[assigned >= 0].bincount(minlength=dictionary.n_concepts).tolist(),
        "words": words,
        "images": pictures_of(dictionary.transform(fitted.states), fitted.ids, fitted.samples, images),
    }


def reproducibility(dictionary: ConceptDictionary, Z: Tensor, seeds: int) -> dict[str, Any]:
    """Fit with further seeds and report, for each concept and on average, the cosine with its counterparts.

    Args:
        dictionary: The dictionary, fitted.
        Z: The states that it was fitted on [N, D].
        seeds: How many.
    """
    if not seeds:
        return {}
    others = []
    for further in range(1, seeds + 1):
        other = deepcopy(dictionary)
        other.seed = dictionary.seed + further
        others.append(other.fit(Z).dictionary)
    found = stability([dictionary.dictionary, *others])
    return {"stability": found.tolist(), "mean_stability": float(found.mean())}
