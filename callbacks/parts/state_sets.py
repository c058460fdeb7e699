"""Sets of stored states that a steering vector leads to and from: what they are, reading them, pairing them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...concepts import load_dictionary, pair_rows
from ...datamodules.stored_features import FeatureStore
from ...datamodules.word_classes import has_word, word_class
from ...lightning_modules.steering import dictionary_file
from ...metrics import normalize_answer

_EXAMPLES = 5


@dataclass
class OfConcept:
    """States whose strongest concept is a certain one.

    Attributes:
        dictionary: Folder or file of the dictionary.
        index: Number of the concept, from 0.
    """

    dictionary: str
    index: int


@dataclass
class StateSet:
    """Some states of a feature store: those that pass every filter that is set.

    Attributes:
        selector: Selector of the states.
        features: The feature store; by default the one that a FeatureWriter listed before writes, or the one that is
            replayed.
        variant: `original`, `destination`, or the name of another checkpoint.
        answer: Only samples that the model answered with exactly this, after VQA normalisation.
        words: Only samples whose answer has a word of this class: its name, a `.txt` file, or the words.
        concept: Only states that are assigned to a concept.
        label: Only samples to which the data give this label.
    """

    selector: str
    features: str | None = None
    variant: str = "original"
    answer: str | None = None
    words: str | list[str] | None = None
    concept: OfConcept | None = None
    label: str | None = None

    def read(self, store: FeatureStore, site: str) -> SelectedStates:
        """Apply the filters; no states are read unless `concept` is set.

        Args:
            store: Where the states are.
            site: A site that it must have.

        Raises:
            ValueError: The store has no such states, or a filter leaves none.
        """
        ids, _ = store.shards(site, self.selector, self.variant)
        positions = store.positions(self.selector, self.variant)
        found = SelectedStates(self, store, ids, positions, list(range(len(ids))))
        samples = store.samples(self.variant)
        if self.answer is not None:
            answers = {sample_id: normalize_answer(row["text"]) for sample_id, row in samples.items()}
            wanted = normalize_answer(self.answer)
            found = found._where("answer", lambda row: answers[ids[row]] == wanted, most_frequent(answers.values()))
        if self.words is not None:
            words = word_class(self.words)
            found = found._where("words", lambda row: has_word(samples[ids[row]]["text"], words))
        if self.label is not None:
            labels = most_frequent(row["label"] for row in samples.values())
            found = found._where("label", lambda row: samples[ids[row]]["label"] == self.label, labels)
        if self.concept is not None:
            kept = found._of_concept(self.concept)
            found = found._where("concept", lambda row: row in kept)
        return found


@dataclass(frozen=True)
class SelectedStates:
    """States that a set has in a store, at any site.

    Attributes:
        of: The set.
        store: The store.
        ids: Sample id of each state that the selector chose.
        positions: Position of each in its sample's sequence.
        rows: Which of these are in the set [N].
    """

    of: StateSet
    store: FeatureStore
    ids: list[str]
    positions: list[int]
    rows: list[int]

    def at(self, site: str) -> Tensor:
        """The states at a site [N, D], float32.

        Raises:
            ValueError: The store has not read it.
        """
        return self.store.shards(site, self.of.selector, self.of.variant)[1].take(self.rows).load()

    def paired_with(self, other: SelectedStates) -> tuple[SelectedStates, SelectedStates]:
        """Both sets without the states that have no counterpart, in the same order.

        States are paired by sample id, and where a sample has several by position too.

        Raises:
            ValueError: There are fewer than 2 pairs.
        """
        single = all(len({side.ids[row] for row in side.rows}) == len(side.rows) for side in (self, other))
        keys: list[list[Hashable]] = [
            [side.ids[row] if single else (side.ids[row], side.positions[row]) for row in side.rows]
            for side in (self, other)
        ]
        pairs = len(set(keys[0]) & set(keys[1]))
        if pairs < 2:
            raise ValueError(
                f"the method principal needs pairs, two states of each sample, but {pairs} of {len(self.rows)} target "
                f"states in {self.store.folder} have a counterpart among {len(other.rows)} source states in "
                f"{other.store.folder}; take both of the same samples, or choose another method"
            )
        rows = pair_rows(*keys)
        one, two = (
            replace(side, rows=[side.rows[row] for row in chosen.tolist()])
            for side, chosen in zip((self, other), rows, strict=True)
        )
        return one, two

    def _where(self, option: str, keep: Callable[[int], bool], hint: str = "") -> SelectedStates:
        rows = [row for row in self.rows if keep(row)]
        if not rows:
            value = getattr(self.of, option)
            raise ValueError(
                f"{self.store.folder}: `{option}` = {value!r} leaves none of {len(self.rows)} {self.of.variant} states "
                f"of {self.of.selector!r}{hint and f'; most frequent are {hint}'}"
            )
        return replace(self, rows=rows)

    def _of_concept(self, concept: OfConcept) -> set[int]:
        """Those of the rows that are assigned to a concept, at the site of its dictionary."""
        dictionary = load_dictionary(dictionary_file(concept.dictionary))
        _, shards = self.store.shards(dictionary.metadata["site"], self.of.selector, self.of.variant)
        assigned = torch.cat([dictionary.assign(states) for states in shards.take(self.rows)])
        return {row for row, found in zip(self.rows, assigned.tolist(), strict=True) if found == concept.index}


def most_frequent(values: Iterable[Any]) -> str:
    """The most frequent values, for messages."""
    return ", ".join(repr(value) for value, _ in Counter(values).most_common(_EXAMPLES))
