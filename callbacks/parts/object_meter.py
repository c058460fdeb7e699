"""What the meters share that ask about objects again, with something done to the model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import lightning as L
import pyarrow as pa
import pyarrow.parquet as pq

from ...datamodules.object_names import ObjectNames
from ...datamodules.objects import ObjectDataModule
from ...datamodules.sample import Batch, Sample
from ...lightning_modules import Answers, Inspection
from ...records.files import write_json, write_whole
from ...records.provenance import KEY, made_now
from .inspector import Inspector
from .run_description import covered
from .trials import UNALTERED, Asked, Found, Place, Trial, check_objects, is_right, locate

_UNSEEN = "the model sees nothing of the object, which lies where its picture is cropped"


class ObjectMeter(Inspector):
    """Base of the meters that ask an `Inspection` again about what each of its variants gets right.

    An interrupted run, started again, goes on where it stopped.

    Args:
        out: Folder for the result, `samples.parquet` with every answer, and figures.
        overwrite: Begin anew, whatever is there.
    """

    result: ClassVar[str]
    """Name of the file with the result."""

    masks = True

    def __init__(self, out: str | None, overwrite: bool) -> None:
        super().__init__(out, overwrite)
        self._acting: dict[str, set[str]] = {}

    # --- what a meter does --------------------------------------------------------------------------------

    @abstractmethod
    def check(self, module: Inspection) -> None:
        """Check against the loaded model what is to be done to it.

        Raises:
            ValueError: It does not fit.
        """

    @abstractmethod
    def measure(self, asked: Asked, names: ObjectNames) -> Iterator[tuple[str, Sequence[int], Sequence[str]]]:
        """Ask again: what was done, to how many tokens of each sample, and what it answers then.

        Where it was done to no token of a sample, its answer does not count.

        Args:
            asked: Samples that the running variant gets right.
            names: How texts name objects.
        """

    @abstractmethod
    def summarize(self, module: Inspection, found: Found, names: ObjectNames) -> dict[str, Any]:
        """The result, as it is written."""

    @abstractmethod
    def show(self, trainer: L.Trainer, summary: dict[str, Any]) -> None:
        """Draw and print the result."""

    # --- the run ------------------------------------------------------------------------------------------

    def forget(self, ids: Iterable[str]) -> None:
        """Remove the result of an earlier run."""
        (self.out / self.result).unlink(missing_ok=True)

    def prepare(self, trainer: L.Trainer, module: Inspection) -> None:
        """Check what is to be done, and all objects.

        Raises:
            ValueError: What is to be done does not fit the model, or an object is smaller than a patch.
        """
        self.check(module)
        data = _data(trainer)
        samples = (sample for sample in data.samples("predict") if sample.sample_id not in data.exclude_ids)
        check_objects(samples, module.backbone)
        self._acting = {variant: set() for variant in module.variants}

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: list[Answers],
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Ask again, as each variant, about the samples of a batch that it gets right."""
        assert isinstance(pl_module, Inspection)
        self.skipped |= {item.sample_id: item.reason for item in batch.skipped}
        places = [locate(sample, pl_module.backbone) for sample in batch.samples]
        seen = [number for number, place in enumerate(places) if place.tokens.any()]
        trials: dict[str, list[Trial]] = {sample_id: [] for sample_id in batch.sample_ids}
        names = _data(trainer).names
        for answers in outputs:
            right = []
            for number in seen:
                sample, text = batch.samples[number], answers.texts[number]
                tokens = len(places[number].tokens)
                unaltered = Trial(answers.variant, UNALTERED, tokens, text, is_right(sample, text, names))
                trials[sample.sample_id].append(unaltered)
                right += [(sample, places[number])] if unaltered.right else []
            if right:
                with trainer.precision_plugin.predict_step_context():
                    self._ask(pl_module, answers.variant, right, names, trials)
        self.journal.write(
            trainer.global_rank,
            [
                {
                    "sample_id": sample_id,
                    "left_out": "" if number in seen else _UNSEEN,
                    "trials": [asdict(trial) for trial in trials[sample_id]],
                }
                for number, sample_id in enumerate(batch.sample_ids)
            ],
        )

    def _ask(
        self,
        module: Inspection,
        variant: str,
        right: list[tuple[Sample, Place]],
        names: ObjectNames,
        trials: dict[str, list[Trial]],
    ) -> None:
        """Add to the trials what a variant answers when something is done to it."""
        samples, places = zip(*right, strict=True)
        with module.running_as(variant):
            asked = Asked(module, samples, places, self._acting[variant])
            for name, tokens, texts in self.measure(asked, names):
                for sample, count, text in zip(samples, tokens, texts, strict=True):
                    if count:
                        trial = Trial(variant, name, count, text, is_right(sample, text, names))
                        trials[sample.sample_id].append(trial)

    def finish(self, trainer: L.Trainer, module: Inspection, skipped: dict[str, str]) -> None:
        """Write result, table and figures."""
        found = self._found(trainer, skipped)
        write_whole(
            self.out / "samples.parquet", lambda path: pq.write_table(pa.Table.from_pylist(found.table()), path)
        )
        summary = {
            "meter": type(self).__name__,
            "model_id": module.model_id,
            KEY: {**self.journal.description(), **made_now()},
            "coverage": covered(trainer, len(found.samples), len(found.skipped)),
            **self.summarize(module, found, _data(trainer).names),
            "left_out": dict(found.left_out),
            "skipped": dict(found.skipped),
        }
        write_json(self.out / self.result, summary)
        self.show(trainer, summary)

    def _found(self, trainer: L.Trainer, skipped: dict[str, str]) -> Found:
        samples = {sample.sample_id: sample for sample in _data(trainer).samples("predict")}
        rows = {i: row for i, row in self.journal.rows().items() if i in samples}
        left_out = {i: row["left_out"] for i, row in rows.items() if row["left_out"]}
        if not rows.keys() - left_out.keys():
            reasons = [*skipped.values(), *left_out.values()]
            raise ValueError(f"{self.out}: no sample could be asked about: {reasons[0] if reasons else 'none was run'}")
        if missing := sorted(samples.keys() - rows.keys() - skipped.keys()):
            raise ValueError(
                f"{self.out}: {len(missing)} samples were left out ({missing[0]}, ...); take fewer by "
                "--data.init_args.limit, not by the Trainer, and run the same command again to go on"
            )
        trials: dict[str, dict[str, dict[str, Trial]]] = {}
        for i, row in rows.items():
            for given in row["trials"]:
                trial = Trial(**given)
                trials.setdefault(trial.variant, {}).setdefault(trial.name, {})[i] = trial
        counted = {i: samples[i] for i in rows if i not in left_out}
        return Found(counted, trials, left_out, skipped)


def _data(trainer: L.Trainer) -> ObjectDataModule:
    data: ObjectDataModule = trainer.datamodule  # type: ignore[attr-defined]
    return data
