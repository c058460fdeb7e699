"""Scores how well a dictionary's words fit pictures and captions that it was not fitted on, beside baselines."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from ..concepts import ConceptDictionary, Simple
from ..datamodules.images import read_image
from ..datamodules.stored_features import FeatureStore, Row
from ..lightning_modules import BackboneModule
from ..lightning_modules.backbone.identity import model_hashes
from ..metrics import BertScorer, ClipEncoder, GroundedConcepts, compare, concept_overlap, published_scores
from ..metrics.concept_scores import CAPTIONS, Columns, score_columns
from ..records.files import write_json
from ..records.paths import check_writable, user_path
from ..records.provenance import KEY
from .parts.concept_states import ConceptStates
from .parts.figures import tensorboard
from .parts.grounded_methods import WrittenDictionary, grounded, random_words
from .parts.noise import noise_states
from .parts.numbers import log_numbers
from .parts.processes import refuse_pieces
from .parts.run_description import provenance_of
from .parts.score_table import markdown, notes, plain, score_rows, write_samples
from .parts.sources import dictionary_place, readout_of, store_folder


class GroundingScorer(Callback):
    """After `predict`, scores a dictionary's words on samples that it was not fitted on (CoX-LMM, arXiv 2406.08074).

    Baselines: `Simple` fitted on the same states; the words of random directions; on request, a dictionary of pictures
    of noise; and, as an upper bound, the samples' own captions. Scores: CLIPScore, BERTScore and, of each dictionary,
    the overlap of its concepts. Writes `scores.json`, and `scores.parquet` with one row a sample and method.

    Args:
        dictionary: Name of a DictionaryFitter listed before this, or folder that one wrote in an earlier run.
        features: Feature store with the test samples; by default the one that a FeatureWriter listed before this
            writes, or the one that is replayed. Of the store that the dictionary was fitted on, the samples that were
            held out are the test samples; of another, all are.
        fitted_on: The store that the dictionary was fitted on, where `features` is another.
        clip_model: CLIP model for CLIPScore, a folder or hub id; the paper's is openai/clip-vit-base-patch32.
        bert_model: Text encoder for BERTScore, a folder or hub id, e.g. roberta-large.
        noise_images: Also score a dictionary of what the model sees in noise when it is given its own answers.
        top: How many of a sample's strongest concepts to score; one column each.
        seed: Seed of random directions, noise and bootstrap.
        batch_size: Samples at a time; changes no result.
        out: Folder to write; by default that of the dictionary.
    """

    def __init__(
        self,
        dictionary: str,
        features: str | None = None,
        fitted_on: str | None = None,
        clip_model: str | None = None,
        bert_model: str | None = None,
        noise_images: bool = False,
        top: tuple[int, ...] = (1, 3),
        seed: int = 0,
        batch_size: int = 16,
        out: str | None = None,
    ) -> None:
        if not top or min(top) < 1:
            raise ValueError(f"GroundingScorer: top must name numbers of concepts from 1 on, got {list(top)}")
        if batch_size < 1:
            raise ValueError(f"GroundingScorer: batch_size must be at least 1, got {batch_size}")
        self.dictionary = dictionary
        self.features = features
        self.fitted_on = fitted_on
        self.clip_model = clip_model
        self.bert_model = bert_model
        self.noise_images = noise_images
        self.top = top
        self.seed = seed
        self.batch_size = batch_size
        self.out = user_path(out or dictionary)
        self.told = out is not None

    @property
    def state_key(self) -> str:
        """Several dictionaries may be scored in one run."""
        return f"{type(self).__name__}[{self.out}]"

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what could not be done at the end."""
        if not self.told:
            self.out = dictionary_place(trainer, self, self.dictionary)
        check_writable(self.out, "GroundingScorer.out")
        store_folder(trainer, self, self.features)
        if self.noise_images and not isinstance(pl_module, BackboneModule):
            raise ValueError("GroundingScorer: noise_images needs the model; run with it instead of `Replay`")
        if self.noise_images:
            refuse_pieces(trainer, "GroundingScorer: noise_images")
        if trainer.is_global_zero:
            # Loaded again when they are needed, so that until then the model has their memory.
            self._encoders("cpu")

    @rank_zero_only
    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Score and write."""
        source = WrittenDictionary.read(dictionary_place(trainer, self, self.dictionary))
        store = FeatureStore(store_folder(trainer, self, self.features))
        fitted, test = source.states(store, None if self.fitted_on is None else FeatureStore(self.fitted_on))
        methods = self._methods(trainer, pl_module, source, store, fitted, test)
        ids = list(dict.fromkeys(test.ids))
        columns = self._columns(methods, [test.samples[sample_id] for sample_id in ids], pl_module.device)
        own = type(source.dictionary).__name__
        summary = {
            "method": own,
            "k": source.dictionary.n_concepts,
            **{name: source.metadata[name] for name in ("site", "selector", "variant", "held_out")},
            "features": str(store.folder),
            "clip_model": self.clip_model,
            "bert_model": self.bert_model,
            "encoder_hashes": {
                name: model_hashes(name, None).get("weights_hash")
                for name in (self.clip_model, self.bert_model)
                if name is not None
            },
            "seed": self.seed,
            "dictionary_hash": source.dictionary.content_hash,
            KEY: provenance_of(store.metadata, seed=self.seed),
            "samples": len(ids),
            "fitted_states": len(fitted.ids),
            "methods": [*methods, CAPTIONS],
            "scores": {score: compare(values, own, self.seed) for score, values in columns.items()},
            "overlap": {name: concept_overlap(concepts.words) for name, concepts in methods.items()},
            "words": {name: concepts.words for name, concepts in methods.items()},
            "inactive_samples": {name: concepts.inactive for name, concepts in methods.items()},
            "published": published_scores(source.metadata["selector"]),
        }
        write_samples(self.out / "scores.parquet", ids, methods, columns, max(self.top))
        write_json(self.out / "scores.json", summary)
        self._show(trainer, summary)

    def _methods(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        source: WrittenDictionary,
        store: FeatureStore,
        fitted: ConceptStates,
        test: ConceptStates,
    ) -> dict[str, GroundedConcepts]:
        """The dictionary, first, and its baselines."""
        readout = readout_of(pl_module, store)
        own = type(source.dictionary).__name__
        dictionaries: dict[str, ConceptDictionary] = {own: source.dictionary}
        if own != "Simple":
            dictionaries["Simple"] = Simple(source.dictionary.n_concepts).fit(fitted.states)
        if self.noise_images:
            assert isinstance(pl_module, BackboneModule)
            samples = [fitted.samples[sample_id] for sample_id in dict.fromkeys(fitted.ids)]
            Z = noise_states(trainer, pl_module.backbone, samples, source.metadata, self.seed, self.batch_size)
            dictionaries["Noise images"] = deepcopy(source.dictionary).fit(Z)
        methods = grounded(dictionaries, source, readout, test)
        methods["Random words"] = replace(methods[own], words=random_words(source, readout, self.seed))
        return methods

    def _columns(self, methods: dict[str, GroundedConcepts], samples: list[Row], device: torch.device) -> Columns:
        pictures = (read_image(Path(row["image"])) for row in samples)
        return score_columns(
            methods, pictures, [row["references"] for row in samples], self.top, *self._encoders(device)
        )

    def _encoders(self, device: torch.device | str) -> tuple[ClipEncoder | None, BertScorer | None]:
        return (
            None if self.clip_model is None else ClipEncoder(self.clip_model, device, self.batch_size),
            None if self.bert_model is None else BertScorer(self.bert_model, device, self.batch_size),
        )

    def _show(self, trainer: L.Trainer, summary: dict[str, Any]) -> None:
        rows = score_rows(summary)
        rank_zero_info(f"{self.out}: {notes(summary)}\n{plain(rows)}")
        log_numbers(
            trainer,
            {
                f"grounding/{self.out.name}/{score}/{method}": row["mean"]
                for score, found in summary["scores"].items()
                for method, row in found.items()
            }
            | {f"grounding/{self.out.name}/overlap/{method}": value for method, value in summary["overlap"].items()},
        )
        writer = tensorboard(trainer)
        if writer is not None:
            writer.add_text(f"grounding/{self.out.name}", f"{notes(summary)}\n\n{markdown(rows)}", trainer.global_step)
