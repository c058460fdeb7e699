"""Scores a sweep of steerings: target against quality, with controls and intervals."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, cast

import lightning as L
import pyarrow as pa
import pyarrow.parquet as pq
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from ..datamodules.base import PictureDataModule
from ..datamodules.sample import Batch, Sample
from ..datamodules.word_classes import word_class
from ..lightning_modules import SteeringSweep
from ..metrics import normalize_answer
from ..records.files import write_json, write_whole
from ..records.provenance import KEY, made_now
from .parts.journal import Journal
from .parts.numbers import log_numbers
from .parts.processes import gather
from .parts.questions import check_questions
from .parts.run_description import covered, describe
from .parts.run_writer import RunWriter
from .parts.steering_checks import check_weights, try_on_longest_prompt
from .parts.sweep_figures import show_sweep, sweep_numbers
from .parts.sweep_scores import Target, clear_directions, score_sweep
from .steerer import Steerer


@dataclass
class SweepTarget:
    """What some of a sweep's vectors are to bring about, scored and written together.

    Attributes:
        name: Of the folder for its scores.
        answer: This answer, counted whole after VQA normalisation.
        words: Captions with a word of this class: `colors`, `places`, `sentiments`, a list of words, or a `.txt` file
            with one word a line. Either this or `answer`.
        avoid: It is to become rarer: the share of samples without it is what counts.
        vectors: Names of the sweep's vectors, one for all that a pattern stands for; all by default.
    """

    name: str
    answer: str | None = None
    words: str | list[str] | None = None
    avoid: bool = False
    vectors: list[str] | None = None

    def __post_init__(self) -> None:
        """Refuse what is no target."""
        if (self.answer is None) == (self.words is None):
            raise ValueError(f"target {self.name!r} needs either `answer` (for questions) or `words` (for captions)")
        if self.answer is not None and not normalize_answer(self.answer):
            raise ValueError(f"target {self.name!r}: nothing is left of {self.answer!r} after VQA normalisation")
        if not re.fullmatch(r"[\w.-]*\w[\w.-]*", self.name):
            raise ValueError(f"target {self.name!r}: the name of a folder, of letters, digits, dots and dashes")

    def goal(self) -> Target:
        """As it is scored."""
        if self.answer is not None:
            return Target(answer=normalize_answer(self.answer), avoid=self.avoid)
        return Target(words=word_class(self.words or ()), avoid=self.avoid)


class SweepScorer(RunWriter):
    """Writes what a `SteeringSweep` answers, and scores its runs when all samples have been answered.

    An interrupted sweep, started again, goes on where it stopped.

    Args:
        targets: What is to be brought about.
        out: Folder; by default the run's. Each target has a folder in it: `sweep.json` (scores of its runs),
            `samples.parquet` (every text with its values) and figures. What was asked of which picture is in
            `samples.json`.
        overwrite: Begin anew, whatever is there.
    """

    place = ""

    def __init__(self, targets: list[SweepTarget], out: str | None = None, overwrite: bool = False) -> None:
        if not targets or len({target.name for target in targets}) < len(targets):
            raise ValueError("SweepScorer.targets: expected at least one, with names of their own")
        super().__init__(out)
        self.targets = targets
        self.goals = {target.name: target.goal() for target in targets}
        self.overwrite = overwrite
        self._skipped: dict[str, str] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check what is asked for, and leave out of the data what an interrupted sweep has done."""
        if not isinstance(pl_module, SteeringSweep):
            raise TypeError(f"SweepScorer scores what SteeringSweep answers, got {type(pl_module).__name__}")
        callbacks: list[Callback] = cast(Any, trainer).callbacks
        for other in callbacks:
            if other is not self and isinstance(other, Steerer | SweepScorer):
                raise ValueError(
                    f"SweepScorer: a {type(other).__name__} beside it would change what this one scores; leave it out "
                    "(one SweepScorer has many targets)"
                )
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, PictureDataModule):
            raise TypeError("SweepScorer needs a data module of pictures: --data CaptionDataModule or VQADataModule")
        self.locate(trainer)
        self.journal = Journal(self.out, self.overwrite)
        samples = data.samples("predict")
        for target in self.targets:
            _check_goal(target.name, self.goals[target.name], samples)
            if unknown := sorted(set(target.vectors or ()) - set(pl_module.vectors)):
                known = ", ".join(pl_module.vectors)
                raise ValueError(f"target {target.name!r}: the sweep has no vector {unknown[0]!r}, only {known}")
        done: set[str] = set()
        if trainer.is_global_zero:
            description = describe(trainer, pl_module)
            done = self.journal.resume(description, {sample.sample_id for sample in samples}, trainer.world_size)
        pl_module.is_kept = True
        data.exclude_ids = frozenset(trainer.strategy.broadcast(done))

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Try every steering on the first sample, then prepare the folder."""
        assert isinstance(pl_module, SteeringSweep)
        steered = [steering for run, steering in pl_module.steerings.items() if steering and run.kind == "steered"]
        check_weights(pl_module.files.values(), pl_module.backbone)
        try_on_longest_prompt(trainer, pl_module, [[steering] for steering in steered])
        if trainer.is_global_zero and self.journal.begin({**describe(trainer, pl_module), **made_now()}):
            for path in self.out.glob("*/sweep.json"):
                path.unlink()
        trainer.strategy.barrier()
        self._skipped = {}

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the answers of one batch, all runs of its samples at once."""
        self._skipped |= {item.sample_id: item.reason for item in batch.skipped}
        self.journal.write(
            trainer.global_rank,
            [
                {"sample_id": sample_id, "texts": {run: texts[row] for run, texts in outputs.items()}}
                for row, sample_id in enumerate(batch.sample_ids)
            ],
        )

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Score all runs and write the result."""
        assert isinstance(pl_module, SteeringSweep)
        skipped = dict(gather(sorted(self._skipped.items())))
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            self._score(trainer, pl_module, skipped)
        trainer.strategy.barrier()

    def _score(self, trainer: L.Trainer, module: SteeringSweep, skipped: dict[str, str]) -> None:
        samples = {sample.sample_id: sample for sample in trainer.datamodule.samples("predict")}  # type: ignore[attr-defined]
        answered = {i: row["texts"] for i, row in self.journal.rows().items() if i in samples}
        if not answered:
            raise ValueError(f"no readable picture among the samples: {'; '.join(list(skipped.values())[:1])}")
        missing = sorted(set(samples) - set(answered) - set(skipped))
        if missing:
            raise ValueError(
                f"{self.out}: {len(missing)} samples were left out ({missing[0]}, ...); take fewer by "
                "--data.init_args.limit, not by the Trainer, and run the same command again to go on"
            )
        shown = {
            f"{'question' if sample.answers else 'caption'}/{i}": {"image": str(sample.image), "prompt": sample.prompt}
            for i, sample in samples.items()
        }
        write_json(self.out / "samples.json", shown)
        for target in self.targets:
            runs = [
                run
                for run in module.steerings
                if run.kind == "unsteered" or not target.vectors or run.vector.split("/")[0] in target.vectors
            ]
            texts = {run.name: {i: of_sample[run.name] for i, of_sample in answered.items()} for run in runs}
            of_these = {i: samples[i] for i in answered}
            quality, rows, values = score_sweep(runs, texts, of_these, self.goals[target.name])
            facts = {
                "quality": quality,
                "samples": len(answered),
                "skipped": skipped,
                "coverage": covered(trainer, len(answered), len(skipped)),
                KEY: {**self.journal.description(), **made_now()},
            }
            self._write(target.name, rows, values, facts, trainer)

    def _write(
        self,
        name: str,
        rows: list[dict[str, Any]],
        values: list[dict[str, Any]],
        facts: dict[str, Any],
        trainer: L.Trainer,
    ) -> None:
        goal, folder = self.goals[name], self.out / name
        sweep = {
            "name": name,
            "task": goal.task,
            "target": goal.answer or sorted(goal.words),
            "avoid": goal.avoid,
            **facts,
            "runs": rows,
            "selected": clear_directions(rows),
        }
        write_whole(folder / "samples.parquet", lambda path: pq.write_table(pa.Table.from_pylist(values), path))
        write_json(folder / "sweep.json", sweep)
        show_sweep(sweep, folder, trainer.loggers)
        log_numbers(trainer, sweep_numbers(sweep))
        best = [row for row in rows if row["pareto"] and row["kind"] == "steered"]
        rank_zero_info(f"{folder}: {len(rows)} runs of {facts['samples']} samples, {len(best)} on the Pareto front")


def _check_goal(name: str, goal: Target, samples: list[Sample]) -> None:
    """Refuse a target that these data cannot have."""
    if bare := [sample.sample_id for sample in samples if not (sample.answers or sample.references)]:
        raise ValueError(f"target {name!r}: nobody has answered or described sample {bare[0]}; choose another split")
    task = "vqa" if any(sample.answers for sample in samples) else "caption"
    if task != goal.task:
        wanted = {"vqa": "`answer`: the data are questions", "caption": "`words`: the data are captions"}[task]
        raise ValueError(f"target {name!r} needs {wanted}")
    if task == "vqa":
        check_questions(samples)
    known = Counter(normalize_answer(answer) for sample in samples for answer in sample.answers)
    if goal.answer and goal.answer not in known:
        frequent = ", ".join(answer for answer, _ in known.most_common(5))
        raise ValueError(
            f"target {name!r}: nobody answers {goal.answer!r} in these questions; frequent are {frequent}; take "
            "another, or more questions (--data.init_args.limit)"
        )
