"""Averages visual tokens over the pictures of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from ..concepts import TokenMoments
from ..datamodules.instances import InstanceFile, PictureInstances
from ..datamodules.sample import Batch, Sample
from ..lightning_modules import Extraction, FeatureExtraction, VisionLanguageModel
from ..lightning_modules.backbone.visual_sets import object_tokens
from ..records.hashes import file_hash
from ..records.paths import user_path
from ..records.provenance import made_now
from .parts.processes import gather
from .parts.run_description import describe_run
from .parts.run_writer import RunWriter


class MeanTokenMaker(RunWriter):
    """Writes mean and variance of the visual tokens that a `FeatureExtraction` reads at its one site.

    With instances also a direction for each class of objects: what tokens on its objects have in common that tokens on
    other objects have not. A token is on an object whose mask its patch overlaps.

    Args:
        out: File to write; by default `mean.safetensors` in the run's folder.
        annotations: COCO's `instances_<split>.json` of the pictures, which it knows by the names of their files.
    """

    place = "mean.safetensors"

    def __init__(self, out: str | None = None, annotations: str | None = None) -> None:
        super().__init__(out)
        self.annotations = None if annotations is None else user_path(annotations)
        self._instances: dict[str, PictureInstances] = {}
        self._moments = TokenMoments()
        self._skipped = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Read the instances before a model is loaded."""
        if not isinstance(pl_module, FeatureExtraction):
            raise TypeError(f"MeanTokenMaker averages what FeatureExtraction reads, got {type(pl_module).__name__}")
        self.locate(trainer)
        if self.annotations is not None:
            if not self.annotations.is_file():
                raise FileNotFoundError(f"{self.annotations}: no such file; set --annotations, or leave it out")
            pictures = InstanceFile(self.annotations).pictures()
            self._instances = {Path(one.file_name).name: one for one in pictures}

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin anew, at one site: which these are, only the loaded model tells."""
        assert isinstance(pl_module, FeatureExtraction)
        sites = pl_module.sites
        if len(sites) != 1 or sites[0].positions == "patches":
            raise ValueError(
                f"--model.init_args.site must be one site of the language model, got "
                f"{', '.join(site.name for site in sites)}; choose `projector` or one of `lm.*`"
            )
        self._moments, self._skipped = TokenMoments(), 0

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: list[Extraction],
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the pictures of a batch."""
        assert isinstance(pl_module, FeatureExtraction)
        self._skipped += len(batch.skipped)
        for extraction in outputs:
            (rows,) = extraction.rows
            (states,) = rows.states.values()
            of_sample = torch.tensor(rows.samples, device=states.device)
            for number, sample in enumerate(batch.samples):
                self._moments.update(states[of_sample == number], self._objects(sample, pl_module.backbone))

    def _objects(self, sample: Sample, backbone: VisionLanguageModel) -> dict[str, Tensor]:
        """Class → which of a picture's tokens lie on its objects [P]."""
        if self.annotations is None:
            return {}
        found = self._instances.get(sample.image.name)
        if found is None:
            raise ValueError(
                f"{self.annotations}: knows no picture {sample.image.name!r}; give the instances of these pictures, or "
                "leave --annotations out"
            )
        height, width = found.size
        grid = backbone.patch_grid(width, height)
        tokens: dict[str, Tensor] = {}
        for instance in found.instances:
            on = object_tokens(grid, instance.mask())
            tokens[instance.category] = on | tokens[instance.category] if instance.category in tokens else on
        return tokens

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Join what all processes have seen, and write."""
        assert isinstance(pl_module, FeatureExtraction)
        parts: list[tuple[TokenMoments, int]] = gather([(self._moments, self._skipped)])
        if not trainer.is_global_zero:
            return
        moments = TokenMoments()
        for part, _ in parts:
            moments.merge(part)
        metadata: dict[str, Any] = {
            **describe_run(trainer, pl_module),
            "sites": [site.name for site in pl_module.sites],
            "annotations": None if self.annotations is None else str(self.annotations),
            "annotations_hash": None if self.annotations is None else file_hash(self.annotations),
            **made_now(),
            "skipped": sum(skipped for _, skipped in parts),
        }
        (site,) = (site.name for site in pl_module.sites)
        token = moments.finish(site, metadata)
        token.save(self.out)
        directions = f", directions of {len(token.objects)} classes" if token.objects else ""
        rank_zero_info(
            f"{self.out}: mean of {token.metadata['tokens']} visual tokens of {moments.pictures} pictures at {site}"
            f"{directions}"
        )
