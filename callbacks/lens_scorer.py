"""Scores the logit lens against the objects in pictures, and captions against what the model is sure to see."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pyarrow as pa
import pyarrow.parquet as pq
from lightning.pytorch.utilities import rank_zero_info

from ..datamodules.images import read_image
from ..datamodules.objects import ObjectDataModule
from ..datamodules.sample import Batch, Sample
from ..lightning_modules import Answers, Inspection
from ..lightning_modules.backbone.logit_lens import LensQuery
from ..metrics import published_lens
from ..records.files import write_json, write_whole
from ..records.provenance import KEY, made_now
from .parts.class_tokens import ClassTokens, class_tokens
from .parts.inspector import Inspector
from .parts.lens_score_figure import lens_score_figure, log_lens_scores
from .parts.lens_scores import Row, background, left_out, object_rows, score_picture, summarize_lens
from .parts.run_description import covered
from .parts.trial_figures import show_figures
from .parts.trials import check_objects, locate

_RESULT = "lens.json"


class LensScorer(Inspector):
    """Scores what the visual tokens of an `Inspection` decode to, at every layer, by the objects in their pictures.

    - The share of an object's patches (covered by it to at least half) whose most probable token says its class, in its
      own name (`strict`) or by a synonym (`lenient`), as a mean over objects. Beside it the share of objects with at
      least one such patch (`any`), the layer at which most patches do (`peak_layer`, counted from 0 for what enters the
      language model), and, for comparison, the share of patches without any object that say that class (`background`).
      (Towards Interpreting Visual Information Processing in Vision-Language Models, arXiv 2410.07149, §4.)
    - The confidence of a class is the largest probability of its name over layers and visual tokens: how well it tells
      classes that are there from those that are not (`presence`), and, in captions (setting `generative`), named ones
      that are there from hallucinated ones (`confidence`). The largest over layers at each patch is a map of the object
      (`segmentation`): its pixels above the mean of the map, and average precision. (Interpreting and Editing
      Vision-Language Representations to Mitigate Hallucinations, arXiv 2410.02762.)
    - CHAIR, the share of classes in captions that are not there, where there are captions.

    A picture runs once, whatever number of samples it has. Writes `lens.json`, `samples.parquet` (a row for each object
    and variant) and `figures/`. Intervals are bootstraps over pictures, at 95 %. An interrupted run, started again,
    goes on where it stopped.

    Args:
        out: Folder to write to; by default `lens` in the run's folder.
        overwrite: Begin anew, whatever is there.
    """

    masks = True

    place = "lens"

    def __init__(self, out: str | None = None, overwrite: bool = False) -> None:
        super().__init__(out, overwrite)
        self._pictures: dict[str, dict[str, Sample]] = {}
        self._tokens: dict[str, ClassTokens] = {}

    def options(self) -> dict[str, Any]:
        """The scores depend on model and data alone."""
        return {}

    def wanted(self, samples: Sequence[Sample]) -> set[str]:
        """One sample of each picture: others would be read the same."""
        self._pictures = _by_picture(samples)
        return set(self._pictures)

    def forget(self, ids: Iterable[str]) -> None:
        """Remove the result of an earlier run."""
        (self.out / _RESULT).unlink(missing_ok=True)

    def prepare(self, trainer: L.Trainer, module: Inspection) -> None:
        """Check all objects, and ask for the tokens that say a class.

        Raises:
            ValueError: No token says a class, or an object is smaller than a patch.
        """
        backbone, data = module.backbone, _data(trainer)
        samples = [
            sample for i, objects in self._pictures.items() if i not in data.exclude_ids for sample in objects.values()
        ]
        check_objects(samples, backbone)
        self._tokens = class_tokens(backbone, data.names)
        asked = sorted({token for tokens in self._tokens.values() for token in tokens.strict})
        if not asked:
            raise ValueError(
                f"{module.model_id}: no token begins the name of a class ({', '.join(data.names.categories[:5])}, "
                "...), so that none can be decoded; take data with classes that the model has words for"
            )
        layers = tuple(site.name for site in backbone.sites(["lm.embed", "lm.block.*"]))
        module.lens = LensQuery(layers, top_k=1, tokens=tuple(asked), positions="image")

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: list[Answers],
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Score the pictures of one batch."""
        assert isinstance(pl_module, Inspection)
        self.skipped |= {item.sample_id: item.reason for item in batch.skipped}
        rows = [
            self._score(trainer, pl_module, outputs, sample, number)
            for number, sample in enumerate(batch.samples)
            if sample.sample_id in self._pictures
        ]
        self.journal.write(trainer.global_rank, rows)

    def _score(
        self, trainer: L.Trainer, module: Inspection, outputs: list[Answers], sample: Sample, number: int
    ) -> Row:
        """The row of one picture, the one of that number in a batch."""
        assert module.lens is not None
        names = _data(trainer).names
        objects = self._pictures[sample.sample_id]
        places = {name: locate(one, module.backbone) for name, one in objects.items()}
        _check_size(sample)
        reasons = {name: left_out(name, place, self._tokens) for name, place in places.items()}
        outside = background(sample, next(iter(places.values())).grid)
        variants = {}
        for answers in outputs:
            reading = answers.lens
            assert reading is not None
            here = reading.samples == number
            if int(here.sum()) != len(outside):
                raise ValueError(
                    f"sample {sample.sample_id!r}: {int(here.sum())} visual tokens, where {len(outside)} patches are "
                    "placed in its picture; the lens cannot be scored for this model"
                )
            variants[answers.variant] = {
                "named": names.named(answers.texts[number]) if sample.setting == "generative" else None,
                **score_picture(
                    outside,
                    {name: place for name, place in places.items() if not reasons[name]},
                    self._tokens,
                    module.lens.tokens,
                    reading.top_ids[:, here, 0],
                    reading.token_probabilities[here],
                ),
            }
        there = {one.category for one in sample.instances}
        there |= {name for text in sample.references for name in names.named(text)}
        return {
            "sample_id": sample.sample_id,
            "there": sorted(there),
            "left_out": {objects[name].sample_id: reason for name, reason in reasons.items() if reason},
            "variants": variants,
        }

    def finish(self, trainer: L.Trainer, module: Inspection, skipped: dict[str, str]) -> None:
        """Write scores, table and figure."""
        rows = {i: row for i, row in self.journal.rows().items() if i in self._pictures}
        skipped = {i: reason for i, reason in skipped.items() if i in self._pictures}
        if missing := sorted(self._pictures.keys() - rows.keys() - skipped.keys()):
            raise ValueError(
                f"{self.out}: {len(missing)} pictures were left out ({missing[0]}, ...); take fewer by "
                "--data.init_args.limit, not by the Trainer, and run the same command again to go on"
            )
        reasons = {i: reason for row in rows.values() for i, reason in row["left_out"].items()}
        if not any(row["variants"][module.variants[0]]["objects"] for row in rows.values()):
            why = next(iter([*reasons.values(), *skipped.values()]), "none was run")
            raise ValueError(f"{self.out}: no object could be scored: {why}")
        layers = [site.name for site in module.backbone.sites(["lm.embed", "lm.block.*"])]
        summary: Row = {
            "meter": type(self).__name__,
            "model_id": module.model_id,
            KEY: {**self.journal.description(), **made_now()},
            "coverage": covered(trainer, len(rows), len(skipped)),
            "layers": layers,
            "variants": {variant: summarize_lens(rows, variant, layers) for variant in module.variants},
            "published": published_lens(),
            "left_out": reasons,
            "skipped": skipped,
        }
        table = pa.Table.from_pylist(object_rows(rows, self._pictures))
        write_whole(self.out / "samples.parquet", lambda path: pq.write_table(table, path))
        write_json(self.out / _RESULT, summary)
        show_figures({"lens_score": lens_score_figure(summary)}, self.out, trainer)
        log_lens_scores(summary, trainer)
        for variant, found in summary["variants"].items():
            best, why = found["best"], "; ".join(sorted(set(reasons.values())))
            where = f", at {best['layer']}" if best["share"] else ""
            rank_zero_info(
                f"{self.out / _RESULT}: {variant}: at most {best['share']:.1%} of an object's patches decode to it"
                f"{where} (objects: {found['objects']}; left out: {len(reasons)}{why and f', as {why}'})"
            )


def _by_picture(samples: Sequence[Sample]) -> dict[str, dict[str, Sample]]:
    """Id of the sample that a picture runs as, a caption if there is one → class → a sample of it."""
    of_pictures: dict[Path, list[Sample]] = {}
    for sample in samples:
        of_pictures.setdefault(sample.image, []).append(sample)
    return {
        min(of_picture, key=lambda sample: sample.setting != "generative").sample_id: {
            sample.object: sample for sample in reversed(of_picture)
        }
        for of_picture in of_pictures.values()
    }


def _check_size(sample: Sample) -> None:
    """Refuse a picture that the masks of its objects are not of.

    Raises:
        ValueError: It has another size.
    """
    picture = read_image(sample.image)
    height, width = sample.instances[0].segmentation["size"]
    if picture.size != (width, height):
        raise ValueError(
            f"{sample.image}: {picture.width} x {picture.height} pixels, but the masks of its objects have "
            f"{width} x {height}; are they of this picture?"
        )


def _data(trainer: L.Trainer) -> ObjectDataModule:
    data: ObjectDataModule = trainer.datamodule  # type: ignore[attr-defined]
    return data
