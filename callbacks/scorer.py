"""What the scoring callbacks share: collect answers, score the whole set at once, log and write."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from ..datamodules.base import PictureDataModule, input_hashes
from ..datamodules.sample import Batch
from ..lightning_modules import BackboneModule, Extraction, FeatureExtraction
from ..lightning_modules.backbone.destinations import ORIGINAL
from ..metrics import Measure, RowMetric, bootstrap, difference
from ..records.files import write_whole
from ..records.paths import user_path
from ..records.provenance import KEY, Provenance, mismatch
from .parts.numbers import log_numbers
from .parts.processes import gather
from .parts.run_description import covered, provenance
from .parts.run_writer import RunWriter

Rows = Mapping[str, dict[str, Any]]
# What must be the same in a baseline.
_ASKED_ALIKE = (
    "weights_hash", "settings_hash", "dtype", "quantization", "attention", "precision", "max_new_tokens",
)  # fmt: skip
# Answers whose count has changed most that are told.
_TOLD = 3


class Scorer(RunWriter, ABC):
    """Base of the scoring callbacks; works in `validate`, `test`, the validation of `fit`, and `predict`.

    Args:
        metric: Scores a whole set; its rows become the file's predictions.
        tag: First part of the names in TensorBoard.
        text: Column of the rows with what the model said.
        out: JSON file to write: scores with their intervals, predictions with their own values, skipped samples; by
            default in the run's folder, if it has one, and not while a model is trained.
        baseline: Such a file of another run, to compare with on the samples of both.
        variant: Whose answers to score in `predict`: `original`, or the name of a destination.
    """

    def __init__(
        self, metric: RowMetric, tag: str, text: str, out: str | None, baseline: str | None, variant: str
    ) -> None:
        super().__init__(out)
        self.metric = metric
        self.tag = tag
        self.text = text
        self.baseline = None if baseline is None else user_path(baseline)
        self.variant = variant
        self._before: Rows = {}
        self._before_made: Provenance = {}
        self._inputs: dict[str, str] = {}
        # Whose samples are scored, where the trainer does something else besides.
        self._stage: str | None = None
        self._skipped: list[dict[str, str]] = []
        self._losses: list[tuple[str, tuple[float, int]]] = []

    @abstractmethod
    def add(self, batch: Batch, texts: list[str]) -> None:
        """Give one batch to the metric."""

    @abstractmethod
    def values(self, measures: dict[str, Measure]) -> dict[str, Measure]:
        """The measures whose value of each sample is written, by their names in the rows."""

    @abstractmethod
    def summary(self, rows: Rows) -> dict[str, Any]:
        """More for the file, from id → row of the whole set."""

    def measures(self, rows: Rows) -> dict[str, Measure]:
        """What a set is scored by."""
        return self.metric.measures(rows)

    def said(self, row: Mapping[str, Any]) -> str:
        """What the model said, as far as it counts."""
        return str(row[self.text])

    def more_changes(self, before: Rows, after: Rows) -> dict[str, Any]:
        """More for the changes from the baseline, from the rows of the samples of both."""
        return {}

    def prepare(self) -> None:
        """Read and check what is needed at the end; called on the first process."""
        if self.baseline is not None:
            kind, option = type(self).__name__, f"{type(self).__name__}.baseline"
            content = read_object(self.baseline, option, "scorer", "predictions")
            if content["scorer"] != kind:
                raise ValueError(f"{option}: {self.baseline} was written by {content['scorer']}; give a file of {kind}")
            if KEY not in content:
                raise ValueError(
                    f"{option}: {self.baseline} does not tell what made it, as files of older versions; run it again"
                )
            self._before, self._before_made = content["predictions"], content[KEY]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what could not be done at the end."""
        name = type(self).__name__
        if stage != "predict":
            if self.variant != ORIGINAL:
                raise ValueError(f"{name}.variant: there is {self.variant!r} in `predict` only; leave it out")
        elif not isinstance(pl_module, FeatureExtraction):
            raise TypeError(f"{name} scores what FeatureExtraction predicts, got {type(pl_module).__name__}")
        elif self.variant not in pl_module.variants:
            raise ValueError(f"{name}.variant: no {self.variant!r}; this run has {', '.join(pl_module.variants)}")
        elif pl_module.answers == "target":
            raise ValueError(f"{name} scores what the model says; use it with --model.init_args.answers generated")
        self._stage = "validate" if stage == "fit" else None
        self.locate_result(trainer, stage)
        if trainer.is_global_zero:
            self.prepare()
            self.check_baseline(trainer, pl_module)

    def locate_result(self, trainer: L.Trainer, stage: str) -> None:
        """Find where the file goes; a model that is trained is only scored, unless a file is told."""
        if stage != "fit" or self.told is not None:
            self.locate(trainer, required=False)
        if self.baseline is not None and (not self.writes_at_all or self.out.absolute() == self.baseline.absolute()):
            raise ValueError(f"{type(self).__name__}.baseline: set `out` too, to another file, for what has changed")

    def check_baseline(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Refuse a baseline from which more differs than what is to be compared.

        It must be the same model, asked in the same way; and where it was fine-tuned or steered, so must be this one.

        Raises:
            ValueError: It is a stranger; names both values.
        """
        if self.baseline is None:
            return
        own, before = self.provenance(trainer, module), self._before_made
        fine_tuned_from = own.get("base_weights_hash")
        keys = [key for key in _ASKED_ALIKE if key in own]
        if fine_tuned_from is not None and fine_tuned_from == before.get("weights_hash"):
            keys = [key for key in keys if key not in ("weights_hash", "settings_hash")]
        odd = mismatch(before, own, keys)
        for key, nothing in (("destination_hash", None), ("steering", [])):
            if odd is None and before.get(key) != nothing:
                odd = mismatch(*({key: _applied(side.get(key))} for side in (before, own)))
        if odd is not None:
            raise ValueError(
                f"{type(self).__name__}.baseline: {self.baseline} was made by another run ({odd}; its command: "
                f"{before.get('command')}); give a file of the unsteered original, or run it again with an --out of "
                "its own"
            )

    def provenance(self, trainer: L.Trainer, module: L.LightningModule) -> Provenance:
        """What made the texts that are scored, and who says them."""
        assert isinstance(module, BackboneModule)
        made = provenance(trainer, module, self._stage)
        hashes = made.get("checkpoint_hashes", {})
        speaker = made.get("adapter_hash") if self.variant == ORIGINAL else hashes.get(self.variant)
        return {**made, "variant": self.variant, "destination_hash": speaker}

    # --- a run --------------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start with an empty set."""
        self.metric.reset()
        self.metric.to(pl_module.device)
        self._skipped = []
        self._losses = []
        self._inputs = {}

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect one batch."""
        self._collect(batch, outputs["texts"])
        self._losses += zip(batch.sample_ids, outputs["losses"], strict=True)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Score, write, and log on all processes."""
        if trainer.sanity_checking:
            return
        scores = self._score(trainer, pl_module)
        # Per sample and by id, the loss does not depend on batches, processes or the samplers' repetitions.
        sums, tokens = zip(*dict(sorted(gather(self._losses))).values(), strict=True)
        stage = "test" if trainer.testing else "val"
        pl_module.log(f"loss/{stage}", sum(sums) / sum(tokens))
        pl_module.log_dict({f"{self.tag}/{name}": value for name, value in scores.items()})

    # `test` is scored as `validate` is.
    on_test_start = on_validation_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start with an empty set, unless there is only the rest of one."""
        data = getattr(trainer, "datamodule", None)
        if isinstance(data, PictureDataModule) and data.exclude_ids:
            raise ValueError(
                f"{type(self).__name__}: an interrupted extraction is resumed, and {len(data.exclude_ids)} answers are "
                "not in this run; leave the scorer out, or set FeatureWriter.overwrite to begin anew"
            )
        self.on_validation_start(trainer, pl_module)

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: list[Extraction],
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect the answers of one variant."""
        self._collect(batch, [text for one in outputs if one.variant == self.variant for text in one.texts])

    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Score and write; `self.log` is not to be had here."""
        scores = self._score(trainer, pl_module)
        tag = self.tag if self.variant == ORIGINAL else f"{self.tag}/{self.variant}"
        log_numbers(trainer, {f"{tag}/{name}": value for name, value in scores.items()})

    def _collect(self, batch: Batch, texts: list[str]) -> None:
        self._skipped += [{"sample_id": item.sample_id, "reason": item.reason} for item in batch.skipped]
        if batch.samples:
            self.add(batch, texts)
        if self.writes_at_all:
            self._inputs |= zip(batch.sample_ids, input_hashes(batch.samples), strict=True)

    # --- the result ---------------------------------------------------------------------------------------

    def _score(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, float]:
        """The scores, on all processes; the first one finds and writes them."""
        if not any(gather([self.metric.update_called])):
            reasons = [item["reason"] for item in gather(self._skipped)]
            raise ValueError(f"no readable picture among the samples: {'; '.join(reasons[:1])}")
        rows = self.metric.gathered()
        skipped = dict(sorted((item["sample_id"], item["reason"]) for item in gather(self._skipped)))
        self._inputs = dict(gather(sorted(self._inputs.items())))
        scores: dict[str, float] = {}
        if trainer.is_global_zero:
            measures = self._defined(rows)
            scores = {name: measure.value for name, measure in measures.items()}
            if self.writes_at_all:
                # Asked again: of a model on the hub, only now is it known what it is.
                self.check_baseline(trainer, module)
                made: dict[str, Any] = {
                    KEY: self.provenance(trainer, module),
                    "coverage": covered(trainer, len(rows), len(skipped), self._stage),
                }
                self._tell_of_replaced(made[KEY])
                content = self._content(rows, measures)
                write_scores(self.out, {**made, **content, "scores": scores, "skipped": skipped})
                changes = f"; {_told(content['changes'])}" if "changes" in content else ""
                rank_zero_info(f"{self.out}: {made['coverage']} samples{changes}")
        return dict(trainer.strategy.broadcast(scores))

    def _tell_of_replaced(self, made: Provenance) -> None:
        """Tell that a file of another run is replaced."""
        if self.out.is_file():
            before = read_object(self.out, f"{type(self).__name__}.out").get(KEY, {})
            if odd := mismatch(before, made, [key for key in made if key != "versions"]):
                rank_zero_warn(f"{self.out}: replaces what another run wrote ({odd}); --out would have kept both")

    def _content(self, rows: Rows, measures: dict[str, Measure]) -> dict[str, Any]:
        values = self.values(measures)
        changes = {} if self.baseline is None else {"changes": self._changes(rows)}
        return {
            "scorer": type(self).__name__,
            **self.summary(rows),
            **changes,
            "intervals": {name: list(scored.interval()) for name, scored in bootstrap(measures).items()},
            "samples": len(rows),
            "predictions": {
                sample_id: {
                    **row,
                    **{name: _value(measure, at) for name, measure in values.items()},
                    "input": self._inputs[sample_id],
                }
                for at, (sample_id, row) in enumerate(rows.items())
            },
        }

    def _changes(self, rows: Rows) -> dict[str, Any]:
        """What is different from the baseline, on the samples of both."""
        both = sorted(rows.keys() & self._before.keys())
        if not both:
            raise ValueError(
                f"{self.baseline}: has none of the {len(rows)} samples of this run; give a baseline on the same data"
            )
        for sample_id in both:
            if self._before[sample_id].get("input") != self._inputs[sample_id]:
                raise ValueError(
                    f"{self.baseline}: sample {sample_id!r} had another prompt or picture than in this run; give a "
                    "baseline on the same data"
                )
            for column, value in rows[sample_id].items():
                if column != self.text and self._before[sample_id].get(column) != value:
                    raise ValueError(
                        f"{self.baseline}: sample {sample_id!r} has other `{column}` than in this run; give a baseline "
                        "on the same data"
                    )
        after = {sample_id: rows[sample_id] for sample_id in both}
        before = {sample_id: {**row, self.text: self._before[sample_id][self.text]} for sample_id, row in after.items()}
        ours, theirs = (bootstrap(self._defined(side)) for side in (after, before))
        differences = {name: difference(ours[name], theirs[name]) for name in ours if name in theirs}
        return {
            "baseline": str(self.baseline),
            "samples": len(both),
            "scores": {
                name: {"difference": change, "interval": list(interval)}
                for name, (change, interval) in differences.items()
            },
            "changed": sum(self.said(before[i]) != self.said(after[i]) for i in both) / len(both),
            **self.more_changes(before, after),
        }

    def _defined(self, rows: Rows) -> dict[str, Measure]:
        """Without those that no sample has a value of."""
        return {name: measure for name, measure in self.measures(rows).items() if not math.isnan(measure.value)}


def _applied(value: Any) -> Any:
    """What was applied, whatever file it is from."""
    if not isinstance(value, list):
        return value
    return [{name: part for name, part in step.items() if name not in ("file", "dictionary")} for step in value]


def _told(changes: dict[str, Any]) -> str:
    """What has changed, in a line."""
    share = f"{changes['changed']:.1%} of {changes['samples']} texts differ from {changes['baseline']}"
    answers = list(changes.get("answers", {}).items())[:_TOLD]
    return "; ".join([share, *(f"{answer!r} {before} → {after}" for answer, (before, after) in answers)])


def read_object(path: Path, option: str, *keys: str) -> dict[str, Any]:
    """Read a JSON object that has `keys` at its top level.

    Raises:
        ValueError: It cannot be read, is no JSON, or lacks a key; names the file and the option.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"{option}: {path} cannot be read ({error.strerror}); give the file, or leave it out"
        ) from error
    except ValueError as error:
        raise ValueError(f"{option}: {path} holds no JSON ({error}); write or download it again") from error
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing:
        raise ValueError(f"{option}: {path} has no {missing[0]!r} at its top level; is it the right file?")
    return dict(content)


def write_scores(path: Path, content: dict[str, Any]) -> None:
    """Write the file; not sorted by key, since answers come in the order of their counts."""
    text = json.dumps(content, indent=1, allow_nan=False)
    write_whole(path, lambda working: working.write_text(text, encoding="utf-8"))


def _value(measure: Measure, at: int) -> float | None:
    """What one sample contributes to a mean."""
    value, counts = measure.statistics[at]
    return float(value) if counts else None
