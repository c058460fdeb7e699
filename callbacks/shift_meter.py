"""Measures how concepts shift from the original to a destination, or over a series of checkpoints, and tests it."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from tqdm import tqdm

from ..concepts import ConceptDictionary, load_dictionary
from ..datamodules.stored_features import FeatureStore
from .parts.concept_states import ConceptStates
from .parts.grounding import GroundingOptions
from .parts.paired_states import PairedStates
from .parts.run_writer import RunWriter
from .parts.shift_measure import Moved, ShiftMeasure, ShiftOptions, learned_again
from .parts.shift_report import write_shift
from .parts.sources import dictionary_place, other_model, readout_of, store_folder
from .parts.trajectory import checkpoints_of

# The authors look further for the words of shifted concepts.
GROUNDING = GroundingOptions(candidates=200)
OPTIONS = ShiftOptions()


class ShiftMeter(RunWriter):
    """After `predict`, computes concept shift vectors and tests them (Representation Shift, arXiv 2501.03012).

    Writes `shift.safetensors`, `shift.json` and figures to `out`, of a series of checkpoints `trajectory.json` too, and
    the same to TensorBoard. Every figure has its interval, and every concept its p-values: against original and
    destination swapped within samples, states paired at random, and random directions of equal norm.

    Args:
        original: The original's dictionary: name of a DictionaryFitter of this run, or the folder that one wrote.
        out: Folder to write; by default `shift/<name>` in the run's folder.
        destination: The same for the destination's; by default its states are learned by the original's method. Of a
            series it is the last checkpoint's.
        features: Feature store with the states of both; by default the one that a FeatureWriter listed before this
            writes, or the one that is replayed.
        destination_features: Another store with the destination's states, of a model that was extracted on its own.
        grounding: What the concepts are grounded in.
        options: How the shift is measured and tested.
    """

    place = "shift/{name}"

    def __init__(
        self,
        original: str,
        out: str | None = None,
        destination: str | None = None,
        features: str | None = None,
        destination_features: str | None = None,
        grounding: GroundingOptions = GROUNDING,
        options: ShiftOptions = OPTIONS,
    ) -> None:
        if destination_features is not None and destination is None:
            raise ValueError("ShiftMeter: `destination_features` needs `destination`, the dictionary of its states")
        super().__init__(out)
        self.original = original
        self.destination = destination
        self.features = features
        self.destination_features = destination_features
        self.grounding = grounding
        self.options = options

    @property
    def default_name(self) -> str:
        """That of the original's dictionary."""
        return Path(self.original).name

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what could not be done at the end."""
        self.locate(trainer)
        store_folder(trainer, self, self.features)
        self.grounding.check()
        self.options.check()

    @rank_zero_only
    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Pair the states, measure, test, and write."""
        store = FeatureStore(store_folder(trainer, self, self.features))
        original = _dictionary(dictionary_place(trainer, self, self.original), store)
        site, selector = original.metadata["site"], original.metadata["selector"]
        device = torch.device("cpu") if pl_module.device.type == "mps" else pl_module.device
        a = ConceptStates.read(store, site, selector, original.metadata["variant"])
        checkpoints, destination = self._destinations(trainer, store, original)
        measure = ShiftMeasure(original, readout_of(pl_module, store), self.grounding, self.options)
        moved: dict[str, Moved] = {}
        for name, states in tqdm(checkpoints.items(), f"{self.out}: shift", disable=len(checkpoints) < 2, leave=False):
            moved[name] = measure.move(destination, PairedStates.of(a, states, device))
        write_shift(self.out, measure, destination, moved, store, trainer)

    def _destinations(
        self, trainer: L.Trainer, store: FeatureStore, original: ConceptDictionary
    ) -> tuple[dict[str, ConceptStates], ConceptDictionary]:
        """States of each checkpoint, and the dictionary of the last."""
        site, selector = original.metadata["site"], original.metadata["selector"]
        if self.destination is None:
            names = checkpoints_of(store)
            if not names:
                raise ValueError(f"{store.folder}: has no destination; extract with --model.init_args.destination")
            states = {name: ConceptStates.read(store, site, selector, name) for name in names}
            return states, learned_again(original, states[names[-1]])
        other = store if self.destination_features is None else FeatureStore(self.destination_features)
        destination = _dictionary(dictionary_place(trainer, self, self.destination), other)
        found = (destination.metadata["site"], destination.metadata["selector"])
        if found != (site, selector):
            raise ValueError(
                f"{self.destination}: its dictionary is of {found[0]!r} and {found[1]!r}, the original's of {site!r} "
                f"and {selector!r}; fit both alike"
            )
        self._check_fits(original, destination, other.folder == store.folder)
        last = destination.metadata["variant"]
        names = checkpoints_of(store) if other is store else []
        series = names[: names.index(last)] if last in names else []
        return {name: ConceptStates.read(other, site, selector, name) for name in [*series, last]}, destination

    def _check_fits(self, original: ConceptDictionary, destination: ConceptDictionary, one_store: bool) -> None:
        """Refuse a pair that is none."""
        if one_store and destination.metadata["variant"] == original.metadata["variant"]:
            raise ValueError(
                f"{self.destination}: its dictionary is of {original.metadata['variant']!r} like that of "
                f"{self.original}, so that nothing could shift; give a dictionary of the destination"
            )
        if self.options.matching == "bijective" and destination.n_concepts < original.n_concepts:
            raise ValueError(
                f"{self.destination}: has {destination.n_concepts} concepts, fewer than the {original.n_concepts} of "
                f"{self.original}; fit as many, or set options.matching: nearest"
            )
        if type(destination) is not type(original):
            rank_zero_warn(
                f"{self.destination} was learned by {type(destination).__name__}, {self.original} by "
                f"{type(original).__name__}: what differs is not the shift alone"
            )


def _dictionary(folder: Path, store: FeatureStore) -> ConceptDictionary:
    """A dictionary of the states of a store.

    Raises:
        ValueError: It is missing, or of another model.
    """
    path = folder / "dictionary.safetensors"
    if not path.is_file():
        raise ValueError(f"{folder}: has no dictionary.safetensors; give the `out` of a DictionaryFitter that has run")
    found = load_dictionary(path)
    if odd := other_model(found.metadata["features"], store.metadata, found.metadata["variant"]):
        raise ValueError(
            f"{folder}: its dictionary is of another model than the states in {store.folder} ({odd}); give the "
            "dictionary that was fitted on them"
        )
    return found
