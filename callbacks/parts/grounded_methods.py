"""A dictionary and its baselines, fitted and grounded alike, and what each says of the test samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...concepts import ConceptDictionary, load_dictionary
from ...datamodules.stored_features import FeatureStore, held_out_ids
from ...lightning_modules.backbone.readout import Readout
from ...metrics import GroundedConcepts
from ...records.provenance import mismatch
from .concept_states import ConceptStates
from .grounding import GroundingOptions, words_of
from .sources import other_model, read_concepts


@dataclass(frozen=True)
class WrittenDictionary:
    """What a DictionaryFitter wrote.

    Attributes:
        folder: Where.
        dictionary: The dictionary.
        words: Words of each concept.
        grounding: How they were found.
    """

    folder: Path
    dictionary: ConceptDictionary
    words: list[list[str]]
    grounding: GroundingOptions

    @classmethod
    def read(cls, folder: Path) -> WrittenDictionary:
        """Read it.

        Raises:
            ValueError: The folder holds no dictionary, its concepts have no words, or words are now found elsewhere.
        """
        dictionary = load_dictionary(folder / "dictionary.safetensors")
        path = folder / "concepts.json"
        content = read_concepts(path, dictionary)
        if not any(content["words"]):
            raise ValueError(f"{path}: no concept has a word that could be scored; choose a later site of the model")
        grounding = GroundingOptions(**content["grounding"])
        # Its baselines get their words from the same lists.
        lists = [{"grounding_hashes": hashes} for hashes in (content.get("grounding_hashes", {}), grounding.hashes())]
        if odd := mismatch(*lists):
            raise ValueError(f"{path}: a list of words has changed since ({odd}); fit the dictionary again")
        return cls(folder, dictionary, content["words"], grounding)

    @property
    def metadata(self) -> dict[str, Any]:
        """Where the dictionary comes from: `site`, `selector`, `variant`, `held_out`, `features`."""
        return self.dictionary.metadata

    def states(self, store: FeatureStore, fitted_on: FeatureStore | None) -> tuple[ConceptStates, ConceptStates]:
        """Read the states that the dictionary was fitted on, and those of the test samples.

        Args:
            store: Where the test samples are: those that were held out if the dictionary was fitted on this store, else
                all.
            fitted_on: The store that it was fitted on, where that is another.

        Raises:
            ValueError: No sample was held out, or a store is not what it should be.
        """
        read = (self.metadata["site"], self.metadata["selector"], self.metadata["variant"])
        is_own = mismatch(store.metadata, self.metadata["features"]) is None
        own = store if is_own else self._own(store, fitted_on)
        found = ConceptStates.read(own, *read)
        kept_out = held_out_ids(found.ids, self.metadata["held_out"])
        fitted = found.of(set(found.ids) - kept_out)
        if not is_own:
            return fitted, ConceptStates.read(store, *read)
        if not kept_out:
            raise ValueError(
                f"{self.folder}: none of its {found.confirmed} samples was held out from the fit, so there is none to "
                "score it on; set `held_out` of DictionaryFitter, e.g. 0.2, or give another store as `features`"
            )
        return fitted, found.of(kept_out)

    def _own(self, store: FeatureStore, fitted_on: FeatureStore | None) -> FeatureStore:
        source: Mapping[str, Any] = self.metadata["features"]
        if odd := other_model(store.metadata, source, self.metadata["variant"]):
            raise ValueError(
                f"{store.folder}: its states are of another model than the dictionary in {self.folder} ({odd}); score "
                "it on states of its own model"
            )
        if fitted_on is None or mismatch(fitted_on.metadata, source) is not None:
            raise ValueError(
                f"{store.folder if fitted_on is None else fitted_on.folder}: not the store that {self.folder} was "
                "fitted on; give that one as `fitted_on`, because its baselines are fitted on the same states"
            )
        return fitted_on


def grounded(
    dictionaries: Mapping[str, ConceptDictionary], source: WrittenDictionary, readout: Readout, test: ConceptStates
) -> dict[str, GroundedConcepts]:
    """Ground dictionaries as another one was, and apply them to test samples.

    Args:
        dictionaries: Name → fitted dictionary.
        source: Whose way of grounding it is; `dictionaries` may hold it too.
        readout: How states become words.
        test: States of the test samples.
    """
    return {
        name: GroundedConcepts(
            source.words
            if each is source.dictionary
            else words_of(readout, each.dictionary, source.metadata["site"], source.grounding),
            activations_of_samples(test.ids, each.transform(test.states)),
        )
        for name, each in dictionaries.items()
    }


def random_words(source: WrittenDictionary, readout: Readout, seed: int) -> list[list[str]]:
    """Words of as many random directions as a dictionary has concepts, and of each as many as the concept has.

    Args:
        source: The dictionary, whose way of grounding it is.
        readout: How states become words.
        seed: Seed of the directions.
    """
    counts = [len(words) for words in source.words]
    width = readout.unembedding.shape[1]
    U = torch.randn(len(counts), width, generator=torch.Generator().manual_seed(seed))
    U = torch.nn.functional.normalize(U, dim=1)
    options = replace(source.grounding, words=max(counts))
    while True:
        found = words_of(readout, U, source.metadata["site"], options)
        enough = all(len(words) >= count for words, count in zip(found, counts, strict=True))
        if enough or options.candidates >= len(readout.vocabulary):
            return [words[:count] for words, count in zip(found, counts, strict=True)]
        # Random directions decode to fewer words than learned ones.
        options = replace(options, candidates=2 * options.candidates)


def activations_of_samples(ids: Sequence[str], V: Tensor) -> Tensor:
    """Mean |v_k| over the states of each sample.

    Args:
        ids: Sample id of each state [N].
        V: Activations of the states [N, K].

    Returns:
        One row a sample, in the order in which the ids first occur.
    """
    row = {sample_id: index for index, sample_id in enumerate(dict.fromkeys(ids))}
    rows = torch.tensor([row[sample_id] for sample_id in ids])
    sums = torch.zeros(len(row), V.shape[1]).index_add_(0, rows, V.abs())
    return sums / rows.bincount()[:, None]
