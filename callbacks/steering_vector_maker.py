"""Makes steering vectors from extracted states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from torch import Tensor

from ..concepts import (
    SteeringVectors,
    cluster_vectors,
    coarse_vector,
    load_dictionary,
    principal_vector,
    probe_accuracy,
    probe_vector,
    shuffled_vectors,
    vector_length,
    with_length,
)
from ..datamodules.stored_features import FeatureStore
from ..records.provenance import made_now
from .parts.run_writer import RunWriter
from .parts.sources import store_folder
from .parts.state_set_checks import check_dictionary, check_sites, check_states, dictionary_file, located
from .parts.state_sets import SelectedStates, StateSet

# Sides of fewer states are told of.
_FEW = 10
# A vector shorter than this share of the typical state is what rounding leaves of nothing.
_ROUNDING = 1e-6
Method = Literal["coarse", "principal", "probe", "fine"]
_OF_STATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "coarse": coarse_vector,
    "principal": principal_vector,
    "probe": probe_vector,
}


class SteeringVectorMaker(RunWriter):
    """After `predict`, writes steering vectors from one set of states to another (arXiv 2501.03012, section 3.3).

    Args:
        site: Site, or several, at which the states were read and at which the vectors will be applied.
        target: States of what the model shall do.
        source: States of what it does.
        out: File to write, with a vector for each site; by default `vectors/<name>.safetensors` in the run's folder.
        method: `coarse`: mean(target) − mean(source); `principal`: the direction in which most pairs of target and
            source states of one sample differ; `probe`: the direction of a logistic regression that tells them apart;
            `fine`: for each concept of the source the way to the nearest one of the target.
        dictionary: The dictionary whose concepts `fine` goes between, of the one site: name of a DictionaryFitter of
            this run, or a folder or file.
        norm: `natural`: as far as target and source lie apart; `unit`: 1.
        shuffled: Number of controls of the same length, made from states whose labels are shuffled.
        seed: Seed of the shuffling, and of the folds in which a probe is tested.
    """

    place = "vectors/{name}.safetensors"

    def __init__(
        self,
        site: str | list[str],
        target: StateSet,
        source: StateSet,
        out: str | None = None,
        method: Method = "coarse",
        dictionary: str | None = None,
        norm: Literal["natural", "unit"] = "natural",
        shuffled: int = 1,
        seed: int = 0,
    ) -> None:
        self.sites = [site] if isinstance(site, str) else list(dict.fromkeys(site))
        if not self.sites:
            raise ValueError("SteeringVectorMaker.site: expected at least one site, got an empty list")
        if (method == "fine") != (dictionary is not None):
            raise ValueError("SteeringVectorMaker: the method fine needs a `dictionary`, and no other method takes one")
        if dictionary is not None and len(self.sites) > 1:
            raise ValueError(f"SteeringVectorMaker.site: a dictionary is of one site, got {', '.join(self.sites)}")
        if shuffled < 0:
            raise ValueError(f"SteeringVectorMaker.shuffled must be at least 0, got {shuffled}")
        super().__init__(out)
        self.target = target
        self.source = source
        self.method = method
        self.dictionary = dictionary
        self._file: Path | None = None
        self.norm = norm
        self.shuffled = shuffled
        self.seed = seed

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what could not be done at the end."""
        self.locate(trainer)
        if self.dictionary is not None:
            check_dictionary(trainer, self, self.dictionary, self.sites[0])
        for side in (self.target, self.source):
            for site in self.sites:
                check_states(trainer, self, pl_module, side, site)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse sites that will not be read: which these are, only the loaded model tells."""
        for side in (self.target, self.source):
            check_sites(trainer, self, pl_module, side, self.sites)

    @rank_zero_only
    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make the vectors, and write."""
        if self.dictionary is not None:
            self._file = dictionary_file(trainer, self, self.dictionary)
        target, source = (
            located(trainer, self, side).read(FeatureStore(store_folder(trainer, self, side.features)), self.sites[0])
            for side in (self.target, self.source)
        )
        metadata: dict[str, Any] = {
            "sites": self.sites,
            "method": self.method,
            "norm": self.norm,
            "seed": self.seed,
            "target": _describe(target),
            "source": _describe(source),
        }
        if self.method == "principal":
            target, source = target.paired_with(source)
            metadata["state_pairs"] = len(target.rows)
        vectors: dict[str, Tensor] = {}
        shuffled: dict[str, Tensor] = {}
        for site in self.sites:
            vectors[site], controls, facts = self._make(target.at(site), source.at(site))
            if self.method == "probe":
                of_target, of_source = ([side.ids[row] for row in side.rows] for side in (target, source))
                facts["probe_accuracy"] = probe_accuracy(
                    target.at(site), source.at(site), of_target, of_source, self.seed
                )
            shuffled |= {} if controls is None else {site: controls}
            for name, value in facts.items():
                metadata.setdefault(name, {})[site] = value
            if (fewest := min(len(source.rows), len(target.rows))) < _FEW:
                rank_zero_warn(
                    f"{self.out}: one side has {fewest} states only; some 50 make a vector that can be relied on"
                )
            told = ", ".join(f"{name} {facts[name]:.3g}" for name in ("length", "probe_accuracy") if name in facts)
            rank_zero_info(
                f"{self.out}: {self.method} vector at {site} from {len(source.rows)} source to {len(target.rows)} "
                f"target states, {told}"
            )
        if self._file is not None:
            metadata |= {"dictionary": str(self._file), "dictionary_hash": load_dictionary(self._file).content_hash}
        SteeringVectors(vectors, shuffled, {**metadata, **made_now()}).save(self.out)

    def _make(self, target: Tensor, source: Tensor) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
        """The vector of one site, its controls, and what is to be known of it.

        Args:
            target: States [N, D].
            source: States [M, D].
        """
        facts: dict[str, Any] = {}
        if self.dictionary is None:
            make, labelled = _OF_STATES[self.method], (target, source)
        else:
            assert self._file is not None
            dictionary = load_dictionary(self._file)
            labelled = (dictionary.assign(target), dictionary.assign(source))
            facts["concept_pairs"] = cluster_vectors(dictionary.dictionary, *labelled)[1]

            def make(one: Tensor, other: Tensor) -> Tensor:
                return cluster_vectors(dictionary.dictionary, one, other)[0]

        vector = make(*labelled)
        facts["length"] = vector_length(vector)
        if facts["length"] <= _ROUNDING * float(torch.cat([target, source]).square().mean(dim=0).sum().sqrt()):
            raise ValueError(f"{self.out}: target and source states do not differ by more than rounding")
        vector = with_length(vector, 1.0 if self.norm == "unit" else facts["length"])
        if not self.shuffled:
            return vector, None, facts
        controls, facts["shuffled_lengths"] = shuffled_vectors(
            make, *labelled, vector_length(vector), self.shuffled, self.seed
        )
        return vector, controls, facts


def _describe(states: SelectedStates) -> dict[str, Any]:
    """What one side is, where its states come from, and how many there are."""
    return {
        **asdict(states.of),
        "features": str(states.store.folder),
        "states": len(states.rows),
        "samples": len({states.ids[row] for row in states.rows}),
        "store": states.store.metadata,
    }
