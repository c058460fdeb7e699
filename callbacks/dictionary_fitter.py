"""Fits a concept dictionary to extracted states and grounds it in words and pictures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from tqdm import tqdm

from ..concepts import ConceptDictionary, stability, strongest
from ..datamodules.stored_features import FeatureStore, held_out_ids
from ..lightning_modules import VisionLanguageModel
from ..metrics import concept_overlap
from ..records.files import write_json
from ..records.provenance import KEY, made_now
from .parts.concept_states import ConceptStates
from .parts.figures import concept_figure, tensorboard
from .parts.grounding import GroundingOptions, pictures_of, words_of
from .parts.heat_maps import heat_maps
from .parts.numbers import log_numbers
from .parts.projector import add_states
from .parts.run_description import provenance_of
from .parts.run_writer import RunWriter
from .parts.sources import model_of, readout_of, same_destination, store_folder

_GROUNDING = GroundingOptions()
# Bytes of states that are kept in memory; more are read again on every pass.
_IN_MEMORY = 2**31

Pictures = list[list[dict[str, Any]]]


class DictionaryFitter(RunWriter):
    """After `predict`, learns a dictionary from a feature store (CoX-LMM, arXiv 2406.08074).

    Writes `dictionary.safetensors` and `concepts.json` (words, pictures and scores) to `out`; to TensorBoard a figure,
    the objective, and states in the embedding projector.

    Args:
        site: Site of the states.
        selector: Selector of the states. Of `token_of_interest:WORD`, samples count whose references, where they have
            any, have the word too.
        dictionary: The method, e.g. `conceptshift.concepts.SemiNMF`.
        out: Folder to write; by default `concepts/<name>` in the run's folder.
        features: The feature store; by default the one that a FeatureWriter listed before this writes, or the one that
            is replayed.
        variant: `original`, `destination`, or the name of another checkpoint.
        grounding: What the concepts are grounded in.
        held_out: Share of the samples to keep out of the fit, for scores. An id alone decides whether its sample is
            kept out, so that it is in every run.
        heat_maps: Whether to draw each concept over its pictures; it takes one more pass over these pictures.
        stability_seeds: Number of further seeds to fit with, to report how well each concept is found again.
    """

    place = "concepts/{name}"
    makes = "dictionary"

    def __init__(
        self,
        site: str,
        selector: str,
        dictionary: ConceptDictionary,
        out: str | None = None,
        features: str | None = None,
        variant: str = "original",
        grounding: GroundingOptions = _GROUNDING,
        held_out: float = 0.0,
        heat_maps: bool = True,
        stability_seeds: int = 0,
    ) -> None:
        if stability_seeds < 0:
            raise ValueError(f"stability_seeds must be at least 0, got {stability_seeds}")
        held_out_ids([], held_out)
        super().__init__(out)
        self.site = site
        self.selector = selector
        self.dictionary = dictionary
        self.features = features
        self.variant = variant
        self.grounding = grounding
        self.held_out = held_out
        self.heat_maps = heat_maps
        self.stability_seeds = stability_seeds

    @property
    def default_name(self) -> str:
        """Its method: `semi_nmf`."""
        return re.sub("(?<=[a-z])(?=[A-Z])", "_", method_of(self.dictionary)).lower()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what could not be done at the end."""
        self.locate(trainer)
        store_folder(trainer, self, self.features)
        self.grounding.check()

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Fit, on all processes, then ground and write."""
        store = FeatureStore(store_folder(trainer, self, self.features))
        found = ConceptStates.read(store, self.site, self.selector, self.variant)
        kept_out = held_out_ids(found.ids, self.held_out)
        fitted = found.of(set(found.ids) - kept_out) if kept_out else found
        if not fitted.ids:
            raise ValueError(f"{self.out}: held_out = {self.held_out} keeps out all {len(kept_out)} samples; lower it")
        shared = self.dictionary.adds_up and trainer.world_size > 1
        if trainer.is_global_zero or shared:
            Z = _features(fitted, trainer.global_rank, trainer.world_size if shared else 1, pl_module.device)
            self.dictionary.fit(Z, distributed=shared)
            again = reproducibility(self.dictionary, Z, shared, self.stability_seeds)
            if trainer.is_global_zero:
                self._finish(trainer, pl_module, fitted, {"held_out_samples": len(kept_out), **again})
        trainer.strategy.barrier()

    def _finish(
        self, trainer: L.Trainer, pl_module: L.LightningModule, fitted: ConceptStates, more: dict[str, Any]
    ) -> None:
        words = words_of(readout_of(pl_module, fitted.store), self.dictionary.dictionary, self.site, self.grounding)
        V = torch.cat([self.dictionary.transform(Z) for Z in fitted.shards])
        summary = {
            "variant": self.variant,
            "site": self.site,
            "selector": self.selector,
            "held_out": self.held_out,
            "grounding": asdict(self.grounding),
            "grounding_hashes": self.grounding.hashes(),
            **summarise(self.dictionary, fitted, V, words, self.grounding.images),
            **more,
            "dictionary_hash": self.dictionary.content_hash,
            KEY: provenance_of(fitted.store.metadata, seed=self.dictionary.seed),
        }
        metadata = {name: summary[name] for name in ("site", "selector", "variant", "held_out")}
        self.dictionary.save(
            self.out / "dictionary.safetensors", {**metadata, "features": fitted.store.metadata, **made_now()}
        )
        write_json(self.out / "concepts.json", summary)
        if self.heat_maps:
            summary["images"] = self._drawn(model_of(pl_module), summary["images"], fitted)
            write_json(self.out / "concepts.json", summary)
        self._show(trainer, summary, fitted, strongest(V))

    def _drawn(self, backbone: VisionLanguageModel | None, pictures: Pictures, fitted: ConceptStates) -> Pictures:
        """The pictures, with heat-maps where these can be drawn; the dictionary is written by then."""
        if backbone is None:
            rank_zero_info(f"{self.out}: no heat-maps, because no model is running")
            return pictures
        if not same_destination(fitted.store, backbone, self.variant):
            rank_zero_warn(f"{self.out}: no heat-maps: the states are of another {self.variant} than this run's")
            return pictures
        try:
            return heat_maps(
                backbone, self.dictionary.dictionary, self.site, pictures, fitted.samples, self.out,
                variant=self.variant, signed=self.dictionary.signed,
            )  # fmt: skip
        except ValueError as error:
            rank_zero_warn(f"{self.out}: no heat-maps: {error}")
            return pictures

    def _show(self, trainer: L.Trainer, summary: dict[str, Any], fitted: ConceptStates, assigned: Tensor) -> None:
        name = f"concepts/{self.out.name}"
        for step, value in enumerate(self.dictionary.report.objective_history):
            log_numbers(trainer, {f"{name}/objective": value}, step)
        measures = {f"{name}/{measure}": summary[measure] for measure in ("explained_variance", "overlap", "l0")}
        log_numbers(trainer, {tag: value for tag, value in measures.items() if value is not None})
        writer = tensorboard(trainer)
        if writer is None:
            return
        paths = [[picture["image"] for picture in pictures] for pictures in summary["images"]]
        missing = sorted({path for row in paths for path in row if not Path(path).is_file()})
        if missing:
            rank_zero_warn(f"{self.out}: {missing[0]} and other pictures are not there; TensorBoard shows them in gray")
        drawn = [
            [str(self.out / picture["heat_map"]) for picture in pictures if "heat_map" in picture]
            for pictures in summary["images"]
        ]
        writer.add_figure(name, concept_figure(summary["words"], paths, drawn if any(drawn) else None))
        add_states(writer, self.out.name, fitted, assigned, summary["words"], self.dictionary.seed)


def method_of(dictionary: ConceptDictionary) -> str:
    """Name of a method; of a library of methods, that of the one in use."""
    return str(getattr(dictionary, "method", type(dictionary).__name__))


def summarise(
    dictionary: ConceptDictionary, fitted: ConceptStates, V: Tensor, words: list[list[str]], images: int
) -> dict[str, Any]:
    """What is reported of a dictionary.

    Args:
        dictionary: The dictionary, fitted.
        fitted: The states that it was fitted on.
        V: Their activations [N, K].
        words: Words of each concept.
        images: Pictures per concept.
    """
    report, assigned = dictionary.report, strongest(V)
    return {
        "method": method_of(dictionary),
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
        "images": pictures_of(V, fitted.ids, fitted.samples, images),
    }


def reproducibility(
    dictionary: ConceptDictionary, Z: Tensor | Iterable[Tensor], distributed: bool, seeds: int
) -> dict[str, Any]:
    """Fit with further seeds and report, for each concept and on average, the cosine with its counterparts.

    Args:
        dictionary: The dictionary, fitted.
        Z: The states that it was fitted on [N, D].
        distributed: Whether these are the rows of this process only.
        seeds: How many.
    """
    if not seeds:
        return {}
    others = []
    for further in range(1, seeds + 1):
        other = deepcopy(dictionary)
        other.seed = dictionary.seed + further
        others.append(other.fit(Z, distributed=distributed).dictionary)
    found = stability([dictionary.dictionary, *others])
    return {"stability": found.tolist(), "mean_stability": float(found.mean())}


def _features(found: ConceptStates, rank: int, processes: int, device: torch.device) -> Tensor | Iterable[Tensor]:
    """What one of several processes fits on: its block of rows, on its device if they are few enough to stay there."""
    if device.type == "mps":
        device = torch.device("cpu")  # sums are in float64, which Apple's GPUs lack
    bounds = [len(found.ids) * part // processes for part in (rank, rank + 1)]
    own = found.shards if processes == 1 else found.shards.take(range(*bounds))
    width = next(iter(found.shards.take([0]))).shape[1]
    if len(found.ids) * width * 4 <= _IN_MEMORY:
        return own.load().to(device) if len(own) else torch.zeros(0, width, device=device)
    return _OnDevice(own, device)


class _OnDevice:
    """Shards, moved one at a time."""

    def __init__(self, shards: Iterable[Tensor], device: torch.device) -> None:
        self.shards = shards
        self.device = device
        self.passes = 0

    def __iter__(self) -> Iterator[Tensor]:
        self.passes += 1
        # The length of the shards counts states; of the pieces, only that they go on is shown.
        for shard in tqdm(iter(self.shards), f"pass {self.passes} over the states", leave=False):
            yield shard.to(self.device)
