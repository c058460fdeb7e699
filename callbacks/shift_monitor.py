"""Watches how concepts shift while a model is fine-tuned."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info

from ..concepts import ConceptDictionary, load_dictionary
from ..datamodules.base import PictureDataModule
from ..datamodules.stored_features import (
    FeatureShardWriter,
    FeatureStore,
    Row,
    begin_store,
    extend_store,
    is_finished,
    merge_store,
)
from ..lightning_modules import FineTuning
from ..lightning_modules.backbone.destinations import ORIGINAL, step_name, step_of
from ..lightning_modules.backbone.readout import Readout
from ..records.files import beside, put_in_place
from ..records.paths import user_path
from ..records.provenance import made_now, mismatch
from .parts.concept_states import ConceptStates
from .parts.figures import picture_grid, tensorboard
from .parts.grounding import GroundingOptions
from .parts.numbers import log_numbers
from .parts.paired_states import PairedStates
from .parts.probe import Probe, Probed
from .parts.processes import gather
from .parts.run_description import describe_probe
from .parts.run_writer import RunWriter
from .parts.shift_measure import Moved, ShiftMeasure, ShiftOptions, learned_again
from .parts.shift_report import show_point, write_shift
from .parts.sources import other_model
from .parts.store_rows import store_rows
from .parts.trajectory import point
from .shift_meter import GROUNDING, OPTIONS

_SHARD_ROWS = 4096
# What is written when training ends.
_RESULTS = ("shift.json", "shift.safetensors", "trajectory.json", "figures", "destination/dictionary.safetensors")
# What grows, and what says nothing of what was probed.
_NOT_COMPARED = {"variants", "versions", "sites", "checkpoints", "checkpoint_hashes"}


class ShiftMonitor(RunWriter):
    """During `fit`, measures again and again how the original's concepts have shifted, and shows it in TensorBoard.

    A frozen probe set is read by the original before training, and by the model every so many steps: its own answers,
    at one site and selector, in one pass each. The original's dictionary is learned from the first. Each time, the
    shift of every concept, its consistency, and how well it recovers the concepts that the model has by then go to
    TensorBoard (`shift/<name>/live/…`), with words and pictures. When training ends, all of it is measured and tested
    as `ShiftMeter` does, towards the last model: `shift.json`, `trajectory.json` and figures in `out`, which
    `conceptshift report` shows. The states stay in `out/features`, an ordinary feature store. The live `cosine_shifted`
    and `recovery_shifted` compare with a dictionary that is learned from that very step's states, the ones afterwards
    with the last step's: a jump in the live curves may be another dictionary, and not a move of the concept.

    A probe of n samples costs about as much as n / (3 · batch size) steps of full training, or n / (2 · batch size)
    of LoRA: by default 256 samples every 100 steps, so 3 to 8 % with batches of 32 to 16. What it did cost of the
    time since the start, reading the original included, is in `shift/<name>/live/cost`; the tests when training ends
    come on top.

    Args:
        data: Data whose predict split is probed; what its samples should be answered with is read.
        site: Site of the states.
        selector: Selector of the states, in these answers.
        dictionary: The method, e.g. `conceptshift.concepts.KMeans`; or the folder in which a DictionaryFitter wrote the
            original's dictionary of this site and selector.
        out: Folder to write, by default `shift/<name>` in the run's folder; its name is that in TensorBoard. What an
            earlier training has left there stays until this one has ended.
        every_n_steps: Optimizer steps between two probes.
        samples: Samples to probe, at most: the first ones.
        grounding: What the concepts are grounded in.
        options: How the shift is measured and, when training ends, tested.
    """

    place = "shift/{name}"

    def __init__(
        self,
        data: PictureDataModule,
        site: str,
        selector: str,
        dictionary: ConceptDictionary | str,
        out: str | None = None,
        every_n_steps: int = 100,
        samples: int = 256,
        grounding: GroundingOptions = GROUNDING,
        options: ShiftOptions = OPTIONS,
    ) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("samples", samples)):
            if value < 1:
                raise ValueError(f"{name} of ShiftMonitor must be at least 1, got {value}")
        self.data = data
        self.site = site
        self.selector = selector
        self.dictionary = dictionary
        super().__init__(out)
        # Where it works: beside the results of an earlier training, until this one has ended.
        self._working = Path()
        # Tells one training from another; a resumed one goes on with it.
        self._run = ""
        self.every_n_steps = every_n_steps
        self.samples = samples
        self.grounding = grounding
        self.options = options
        self._probe: Probe | None = None
        self._measure: ShiftMeasure | None = None
        self._skipped: list[dict[str, str]] = []
        self._last = 0
        self._started = self._seconds = 0.0

    @property
    def default_name(self) -> str:
        """The word that is watched, or the selector."""
        return re.sub(r"[^\w.-]+", "_", self.selector.rpartition(":")[2])

    def state_dict(self) -> dict[str, Any]:
        """Which training this is."""
        return {"run": self._run}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with a training."""
        self._run = state_dict["run"]

    @property
    def folder(self) -> Path:
        """The feature store, while training goes on."""
        return self._working / "features"

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what could not be done later."""
        if stage != "fit":
            return
        if not isinstance(pl_module, FineTuning):
            raise TypeError(f"ShiftMonitor watches FineTuning, got {type(pl_module).__name__}")
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise ValueError(
                f"ShiftMonitor runs the model outside of its training step, which {type(trainer.strategy).__name__} "
                "does not allow; use --trainer.strategy ddp, or leave ShiftMonitor out"
            )
        self.locate(trainer)
        self.grounding.check()
        self.options.check()

    # --- the original -------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let the original read the probe set and learn its dictionary, or take up an interrupted run."""
        assert isinstance(pl_module, FineTuning)
        self._started, self._seconds = time.perf_counter(), 0.0
        self._probe = Probe.load(
            self.data, self.samples, pl_module.backbone, self.site, self.selector,
            rank=trainer.global_rank, processes=trainer.world_size,
        )  # fmt: skip
        self._skipped = gather(self._probe.skipped)
        step = trainer.global_step
        self._run = trainer.strategy.broadcast(self._run if self._run and step > 0 else uuid4().hex)
        metadata = {
            **describe_probe(trainer, pl_module, self.data, self.samples, self.site, self.selector),
            "run": self._run,
            "dictionary_hash": self._load_dictionary().content_hash if isinstance(self.dictionary, str) else None,
        }
        source, self._working = trainer.strategy.broadcast(
            self._choose_place(step) if trainer.is_global_zero else (None, Path())
        )
        resumed = source is not None
        if source is not None:
            # Refused on all processes, or the others would wait for this one.
            if odd := trainer.strategy.broadcast(_odd(source, metadata, pl_module) if trainer.is_global_zero else None):
                raise ValueError(
                    f"{source / 'features'}: holds the probes of another run ({odd}), so that they cannot be gone on "
                    "with; give this one another --out, or start anew without --ckpt_path"
                )
            if trainer.is_global_zero and source != self._working:
                shutil.copytree(source, self._working)
            self._last = trainer.strategy.broadcast(self._take_up(step) if trainer.is_global_zero else 0)
        else:
            self._begin(trainer, pl_module, {**metadata, **made_now()})
        if trainer.is_global_zero:
            self._measure = self._prepared(resumed)
        self._seconds += time.perf_counter() - self._started

    def _choose_place(self, step: int) -> tuple[Path | None, Path]:
        """Where probes of this training are to go on with, if they are; and where it works."""
        new = beside(self.out)
        finished = (self.out / "shift.json").is_file()
        for place in (new, self.out):
            if step > 0 and is_finished(place / "features"):
                if FeatureStore(place / "features").metadata.get("run") != self._run:
                    continue
                if place == self.out and finished:
                    # It has been longer: what was measured stays until there is something in its place.
                    shutil.rmtree(new, ignore_errors=True)
                    return place, new
                return place, place
        shutil.rmtree(new, ignore_errors=True)
        return None, new if finished else self.out

    def _begin(self, trainer: L.Trainer, pl_module: FineTuning, metadata: Row) -> None:
        if trainer.global_step > 0 and pl_module.lora is None:
            raise ValueError(
                f"{self.folder}: has no states of the original, and the resumed model is no longer it; resume beside "
                "the folder of the run, or leave ShiftMonitor out"
            )
        with pl_module.backbone.running_as(ORIGINAL):
            probed = self._read(trainer, pl_module, ORIGINAL)
        if trainer.is_global_zero:
            begin_store(self.folder, metadata, resumed=False, overwrite=True)
            self._remove_results()
            pl_module.readout.save(self.folder)
            self._add(probed, [ORIGINAL])
        self._last = trainer.global_step

    def _remove_results(self) -> None:
        """Let no results stand beside states that they are not of."""
        found = [path for path in (self._working / name for name in _RESULTS) if path.exists()]
        for path in found:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _take_up(self, step: int) -> int:
        """Drop what an interrupted run probed behind the checkpoint that it is resumed from."""
        self._remove_results()
        kept = [name for name in FeatureStore(self.folder).metadata["variants"] if (step_of(name) or 0) <= step]
        extend_store(self.folder, kept)
        merge_store(self.folder, self._skipped)
        return max(step_of(name) or 0 for name in kept)

    def _prepared(self, resumed: bool) -> ShiftMeasure:
        store = FeatureStore(self.folder)
        states = ConceptStates.read(store, self.site, self.selector, ORIGINAL)
        if isinstance(self.dictionary, str):
            original = self._load_dictionary()
            self._check(original, store)
        else:
            metadata = {"site": self.site, "selector": self.selector, "variant": ORIGINAL, "held_out": 0.0}
            original = self.dictionary.fit(states.states)
            path = self._working / "original" / "dictionary.safetensors"
            original.save(path, {**metadata, "features": store.metadata})
            original = load_dictionary(path)
        # From the store: the unembedding of a model that is trained fully changes.
        return ShiftMeasure(original, Readout.load(self.folder), self.grounding, self.options)

    def _load_dictionary(self) -> ConceptDictionary:
        """The one that was fitted before."""
        return load_dictionary(user_path(str(self.dictionary)) / "dictionary.safetensors")

    def _check(self, original: ConceptDictionary, store: FeatureStore) -> None:
        found = tuple(original.metadata.get(name) for name in ("site", "selector", "variant"))
        if found != (self.site, self.selector, ORIGINAL):
            raise ValueError(
                f"{self.dictionary}: its dictionary is of {found}, not of {(self.site, self.selector, ORIGINAL)}; give "
                "the original's of the same site and selector, or a method"
            )
        if odd := other_model(original.metadata["features"], store.metadata, ORIGINAL):
            raise ValueError(
                f"{self.dictionary}: its dictionary is of another model than --model.init_args.model_id ({odd}); give "
                "one of this model, or a method"
            )

    # --- while it trains ----------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Probe every so many steps; with accumulated gradients several batches end at one."""
        step = trainer.global_step
        if step % self.every_n_steps == 0 and step > self._last:
            self._probe_now(trainer, pl_module, step)

    def _probe_now(self, trainer: L.Trainer, pl_module: L.LightningModule, step: int) -> None:
        assert isinstance(pl_module, FineTuning)
        begun = time.perf_counter()
        name = step_name(step)
        probed = self._read(trainer, pl_module, name)
        self._last = step
        if trainer.is_global_zero:
            self._add(probed, [*FeatureStore(self.folder).metadata["variants"], name])
            self._show(trainer, name, step)
        self._seconds += time.perf_counter() - begun
        if trainer.is_global_zero:
            log_numbers(trainer, {f"shift/{self.out.name}/live/cost": self._cost()}, step)

    def _cost(self) -> float:
        """Share of the time since the start that went into it."""
        return self._seconds / max(time.perf_counter() - self._started, 1e-9)

    def _read(self, trainer: L.Trainer, pl_module: FineTuning, variant: str) -> Probed:
        assert self._probe is not None
        return gather(self._probe.read(trainer, pl_module.backbone, variant))

    def _add(self, probed: Probed, variants: list[str]) -> None:
        """Add the newest variant to the store."""
        writer = FeatureShardWriter(self.folder, 0, _SHARD_ROWS)
        for batch, extraction in probed:
            writer.add(*store_rows([extraction], batch))
        writer.flush()
        extend_store(self.folder, variants)
        merge_store(self.folder, self._skipped)

    def _show(self, trainer: L.Trainer, name: str, step: int) -> None:
        if not trainer.loggers:
            return
        states = self._states([name])[name]
        assert self._measure is not None
        # The dictionary of the model as it is now: the latest that shifted concepts can be compared with.
        moved = self._moved({name: states}, learned_again(self._measure.original, states))[name]
        seen = point(name, step, moved, moved)
        del seen["means"]["aligned"]
        show_point(trainer, f"{self.out.name}/live", seen)
        writer = tensorboard(trainer)
        if writer is None:
            return
        labels = [
            f"{row['concept']}: {' '.join(row['words_shifted'][:3]) if row['samples'] else 'no sample'}"
            for row in seen["concepts"]
        ]
        paths = [[picture["image"] for picture in pictures] for pictures in moved.pictures.shifted]
        writer.add_figure(f"shift/{self.out.name}/live/pictures", picture_grid(labels, paths), step)

    def _states(self, names: list[str]) -> dict[str, ConceptStates]:
        store = FeatureStore(self.folder)
        return {name: ConceptStates.read(store, self.site, self.selector, name, quiet=True) for name in names}

    def _moved(self, states: dict[str, ConceptStates], destination: ConceptDictionary) -> dict[str, Moved]:
        assert self._measure is not None
        a = self._states([ORIGINAL])[ORIGINAL]
        device = torch.device("cpu")
        return {name: self._measure.move(destination, PairedStates.of(a, b, device)) for name, b in states.items()}

    # --- afterwards ---------------------------------------------------------------------------------------

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Probe the last model, and measure all that were probed towards it."""
        if trainer.global_step > self._last:
            self._probe_now(trainer, pl_module, trainer.global_step)
        if not trainer.is_global_zero:
            return
        begun, while_training = time.perf_counter(), self._cost()
        store = FeatureStore(self.folder)
        names = [name for name in store.metadata["variants"] if name != ORIGINAL]
        if not names:
            rank_zero_info(f"{self.out}: no shift, because no step was taken")
            return
        assert self._measure is not None
        states = self._states(names)
        destination = learned_again(self._measure.original, states[names[-1]])
        metadata = {**self._measure.original.metadata, "variant": names[-1], "features": store.metadata}
        destination.save(self._working / "destination" / "dictionary.safetensors", metadata)
        moved = self._moved(states, destination)
        write_shift(self._working, self._measure, destination, moved, store, trainer, self.out.name)
        if self._working != self.out:
            put_in_place(self._working, self.out)
        self._seconds += time.perf_counter() - begun
        rank_zero_info(
            f"{self.out}: probed the original and {len(names)} steps, in {100 * while_training:.1f} % of the training "
            f"time; with the tests at the end {100 * self._cost():.1f} % of all"
        )


def _odd(place: Path, metadata: Row, module: FineTuning) -> str | None:
    """The first thing in which the probes at a place are not this run's."""
    found = FeatureStore(place / "features").metadata
    # Weights that came from no file are others as soon as they are trained.
    ignored = _NOT_COMPARED | ({"weights_hash"} if module.random_weights else set())
    return mismatch(found, metadata, [key for key in metadata if key not in ignored])
