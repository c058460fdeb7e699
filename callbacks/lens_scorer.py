"""Scores the logit lens against the objects in pictures, and captions against what the model is sure to see."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import lightning as L
import pyarrow as pa
import pyarrow.parquet as pq
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from ..datamodules.files import write_json, write_whole
from ..datamodules.images import read_image
from ..datamodules.objects import ObjectDataModule
from ..datamodules.sample import Batch, Sample
from ..lightning_modules import Answers, Inspection
from ..lightning_modules.backbone.logit_lens import LensQuery
from ..lightning_modules.inspection import STEERED
from ..metrics import published_lens
from .parts.class_tokens import ClassTokens, class_tokens
from .parts.journal import Journal
from .parts.lens_score_figure import lens_score_figure, log_lens_scores
from .parts.lens_scores import Row, background, left_out, object_rows, score_picture, summarize_lens
from .parts.processes import gather, refuse_pieces
from .parts.run_description import describe_inspection, describe_weights
from .parts.steering_checks import try_on_longest_prompt, warn_of_other_weights
from .parts.trial_figures import show_figures
from .parts.trials import locate
from .steerer import Steerer

_RESULT = "lens.json"


class LensScorer(Callback):
    """Scores what the visual tokens of an `Inspection` decode to, at every layer, by the objects in their pictures.

    - The share of an object's patches (covered by it to at least half) whose most probable token says its class, in its
      own name (`strict`) or by a synonym (`lenient`), as a mean over objects. Beside it the share of objects with at
      least one such patch (`any`), the layer at which most patches do (`peak_layer`, counted from 0 for what enters the
      language model), and the share of patches without any object that say any class (`background`). (Towards
      Interpreting Visual Information Processing in Vision-Language Models, arXiv 2410.07149, §4.)
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
        out: Folder to write to.
        overwrite: Begin anew, whatever is there.
    """

    def __init__(self, out: str, overwrite: bool = False) -> None:
        self.out = Path(out)
        self.journal = Journal(self.out, overwrite)
        self._pictures: dict[str, dict[str, Sample]] = {}
        self._tokens: dict[str, ClassTokens] = {}
        self._skipped: dict[str, str] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check what is asked for, and leave out of the data what need not be run."""
        if not isinstance(pl_module, Inspection):
            raise TypeError(f"LensScorer scores what Inspection runs, got {type(pl_module).__name__}")
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, ObjectDataModule):
            raise TypeError("LensScorer needs pictures with masks of their objects: --data ObjectDataModule")
        callbacks: list[Callback] = cast(Any, trainer).callbacks
        if any(isinstance(other, Steerer) for other in callbacks):
            raise ValueError(
                "LensScorer: a Steerer beside it would steer the original, too; give its vectors to "
                "--model.init_args.steering instead"
            )
        refuse_pieces(trainer, "LensScorer")
        samples = data.samples("predict")
        self._pictures = _by_picture(samples)
        done: set[str] = set()
        if trainer.is_global_zero:
            description = describe_inspection(trainer, pl_module)
            done = self.journal.resume(description, set(self._pictures), trainer.world_size)
        # Other samples of the same picture would be read the same.
        done = trainer.strategy.broadcast(done) | {one.sample_id for one in samples} - self._pictures.keys()
        # What another callback has still to see is run again.
        first = next(other for other in callbacks if isinstance(getattr(other, "journal", None), Journal))
        data.exclude_ids = frozenset(done if first is self else done & data.exclude_ids)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the model and all objects, and prepare the folder.

        Raises:
            ValueError: The model has no visual tokens, or none that says a class; an object is smaller than a patch; or
                what steers the model does not fit.
        """
        assert isinstance(pl_module, Inspection)
        backbone, data = pl_module.backbone, _data(trainer)
        if reason := backbone.structure.without_visual_tokens:
            raise ValueError(f"{pl_module.model_id}: LensScorer has no visual tokens to decode: {reason}")
        if STEERED in pl_module.variants:
            warn_of_other_weights([step.file for step in pl_module.steering], backbone)
            try_on_longest_prompt(trainer, pl_module, [pl_module.steerings])
        for objects in self._pictures.values():
            for sample in objects.values():
                locate(sample, backbone)
        self._tokens = class_tokens(backbone, data.names)
        asked = sorted({token for tokens in self._tokens.values() for token in tokens.strict})
        if not asked:
            raise ValueError(
                f"{pl_module.model_id}: no token begins the name of a class ({', '.join(data.names.categories[:5])}, "
                "...), so that none can be decoded; take data with classes that the model has words for"
            )
        layers = tuple(site.name for site in backbone.sites(["lm.embed", "lm.block.*"]))
        pl_module.lens = LensQuery(layers, top_k=1, tokens=tuple(asked), positions="image")
        if trainer.is_global_zero:
            description = {**describe_inspection(trainer, pl_module), **describe_weights(pl_module)}
            if self.journal.begin(description):
                (self.out / _RESULT).unlink(missing_ok=True)
        trainer.strategy.barrier()
        self._skipped = {}

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
        self._skipped |= {item.sample_id: item.reason for item in batch.skipped}
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
                    reading.token_probabilities[:, here],
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

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the result."""
        assert isinstance(pl_module, Inspection)
        skipped = dict(gather(sorted(self._skipped.items())))
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            self._finish(trainer, pl_module, skipped)
        trainer.strategy.barrier()

    def _finish(self, trainer: L.Trainer, module: Inspection, skipped: dict[str, str]) -> None:
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
            best, objects = found["best"], found["objects"]
            rank_zero_info(
                f"{self.out / _RESULT}: {variant}: {best['share']:.1%} of an object's patches decode to it at "
                f"{best['layer']} ({objects} objects; {len(reasons)} left out)"
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
