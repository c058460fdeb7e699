"""How the concepts of an original shift towards a destination's: measured, and tested for significance."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ...concepts import (
    Average,
    ConceptDictionary,
    ConceptShift,
    Groundings,
    Recovery,
    ShiftSignificance,
    concept_shift,
    recovery,
    shift_draws,
    shift_significance,
    strongest,
    t_overlap,
)
from ...concepts.intervals import around, mean_intervals
from ...datamodules.stored_features import held_out_ids
from ...lightning_modules.backbone.readout import Readout
from .concept_states import ConceptStates
from .grounding import GroundingOptions, pictures_of, words_of
from .paired_states import PairedStates

Pictures = list[list[dict[str, Any]]]
Matching = Literal["bijective", "nearest"]
LEVEL = 0.95
"""Of all intervals; and 1 − this of all tests."""
# Top pictures of a concept by which recovery is judged (arXiv 2501.03012); at most this share of the samples, because
# what is among the top of half of them says little.
_TOP_PICTURES, _TOP_SHARE = 50, 0.2


@dataclass(frozen=True)
class ShiftOptions:
    """How a shift is measured and tested.

    Attributes:
        alpha: How far the original's concepts are shifted: u + α Δ.
        average: What Δ is of the shifts of a concept's samples: `mean`, `median` or `trimmed_mean`.
        matching: Counterparts in the destination: `bijective` (one each) or `nearest`.
        permutations: Random draws of each null of the vectors.
        resamples: Bootstrap samples of the intervals.
        word_draws: Draws of each null and of the bootstrap for which words are read, which costs more. Of K concepts,
            a single one can be found significant with 20 K draws.
        seeds: Further seeds to learn both dictionaries with, to tell the shift from what another seed changes.
        seed: Seed of all draws.
    """

    alpha: float = 1.0
    average: Average = "mean"
    matching: Matching = "bijective"
    permutations: int = 1000
    resamples: int = 1000
    word_draws: int = 400
    seeds: int = 1
    seed: int = 0

    def check(self) -> None:
        """Check what can be checked before hours of extraction.

        Raises:
            ValueError: A number is too small, or α not finite, or there is no such average or matching.
        """
        # With fewer draws, no p-value could reach 0.05.
        for name, least in (("permutations", 19), ("resamples", 1), ("word_draws", 19), ("seeds", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"options.{name} must be at least {least}, got {getattr(self, name)}")
        if not abs(self.alpha) < float("inf"):
            raise ValueError(f"options.alpha must be finite, got {self.alpha}")
        for name, known in (("average", get_args(Average)), ("matching", get_args(Matching))):
            if getattr(self, name) not in known:
                raise ValueError(f"options.{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class Moved:
    """Concepts of an original, shifted, beside those of a destination.

    Attributes:
        pairs: The states.
        assignment: Concept of each pair in the original [M].
        arrived: Concept that the original's dictionary gives the destination's states [M].
        lengths: How long each concept is among the states [K].
        shift: The shift vectors.
        U: Concepts of the original, shifted, and of the destination [K, D].
        words: Their words.
        pictures: Their top pictures.
        found: What the shift recovers.
    """

    pairs: PairedStates
    assignment: Tensor
    arrived: Tensor
    lengths: Tensor
    shift: ConceptShift
    U: tuple[Tensor, Tensor, Tensor]
    words: Groundings[list[str]]
    pictures: Groundings[list[dict[str, Any]]]
    found: Recovery


@dataclass(frozen=True)
class ShiftMeasure:
    """Measures shifts of the concepts of one dictionary.

    Attributes:
        original: Dictionary of the original, with the metadata that DictionaryFitter writes.
        readout: How concepts become words: one for all models, so that only concepts differ.
        grounding: What concepts are grounded in.
        options: How to measure and test.
    """

    original: ConceptDictionary
    readout: Readout
    grounding: GroundingOptions
    options: ShiftOptions

    @property
    def site(self) -> str:
        """Site of the states."""
        return str(self.original.metadata["site"])

    @property
    def selector(self) -> str:
        """Selector of the states."""
        return str(self.original.metadata["selector"])

    def words(self, U: Tensor) -> list[list[str]]:
        """Words of concepts [K, D]."""
        return words_of(self.readout, U, self.site, self.grounding)

    def move(self, destination: ConceptDictionary, pairs: PairedStates) -> Moved:
        """Shift the original's concepts and compare them with a destination's.

        Args:
            destination: Dictionary of the destination.
            pairs: States of the same samples in both.
        """
        A, B = pairs.original, pairs.destination
        V = self.original.transform(A)
        assignment = strongest(V)
        shift = concept_shift(A, B, assignment, self.original.n_concepts, self.options.average)
        lengths = self.original.lengths(V, assignment)
        U_a, U_b = (dictionary.dictionary.to(A.device) for dictionary in (self.original, destination))
        U_s = shift.shifted(U_a, self.options.alpha, lengths)
        # In one go: preparing the list of words takes longer than reading a few concepts.
        each = self.words(torch.cat([U_a, U_s, U_b]))
        words = Groundings(each[: len(U_a)], each[len(U_a) : 2 * len(U_a)], each[2 * len(U_a) :])
        shown = (
            self._pictures(self.original, pairs.a),
            self._pictures(self.original.with_concepts(U_s), pairs.b),
            self._pictures(destination, pairs.b),
        )
        top = min(_TOP_PICTURES, max(1, int(_TOP_SHARE * pairs.n_samples)))
        ids = Groundings(*([[row["sample_id"] for row in rows[:top]] for rows in found] for found in shown))
        return Moved(
            pairs,
            assignment,
            self.original.assign(B),
            lengths,
            shift,
            (U_a, U_s, U_b),
            words,
            Groundings(*([rows[: self.grounding.images] for rows in found] for found in shown)),
            recovery(U_a, U_s, U_b, shift.empty, words, ids, self.options.matching),
        )

    def _pictures(self, dictionary: ConceptDictionary, states: ConceptStates) -> Pictures:
        images = max(_TOP_PICTURES, self.grounding.images)
        return pictures_of(dictionary.transform(states.states), states.ids, states.samples, images)

    def tested(self, moved: Moved, words: bool = True) -> ShiftSignificance:
        """Intervals and p-values of what was measured.

        Args:
            moved: What was measured.
            words: Also of the recovery of words, which are read anew in every draw.
        """
        options = self.options
        found = shift_significance(
            moved.pairs.original,
            moved.pairs.destination,
            moved.assignment,
            moved.U[0],
            moved.U[2][moved.found.matching],
            destination_assignment=moved.arrived,
            alpha=options.alpha,
            lengths=moved.lengths,
            average=options.average,
            samples=moved.pairs.samples,
            permutations=options.permutations,
            resamples=options.resamples,
            level=LEVEL,
            seed=options.seed,
        )
        if words:
            self._test_words(moved, found)
        return found

    def recovered_interval(self, moved: Moved) -> Tensor:
        """Bootstrap interval of the recovery of words [K, 2], percent."""
        shifted = moved.found.recovery_shifted.cpu()
        return around(self._recovered(moved, "bootstrap"), shifted, LEVEL).clamp(0, 100)

    def _test_words(self, moved: Moved, into: ShiftSignificance) -> None:
        """Recovery of words: a gain counts only where it is one, and by a shift that is one, as in the other tests."""
        before = moved.found.recovery_original.cpu()
        gain = moved.found.recovery_gain.cpu().clamp_min(0)
        interval = self.recovered_interval(moved)
        into.intervals.update(recovery_shifted=interval, recovery_gain=interval - before[:, None])
        nulls: tuple[tuple[str, Literal["pairing", "directions"]], ...] = (
            ("words_pairing", "pairing"),
            ("words_direction", "directions"),
        )
        for test, kind in nulls:
            as_large = (self._recovered(moved, kind) - before).clamp_min(0) >= gain
            p = (1 + as_large.sum(dim=0)).double() / (1 + len(as_large))
            into.p[test] = p.maximum(into.p["magnitude"])

    def _recovered(self, moved: Moved, kind: Literal["bootstrap", "pairing", "directions"]) -> Tensor:
        """T-Overlap of concepts that are shifted by drawn vectors [draws, K]."""
        options, targets = self.options, [moved.words.destination[m] for m in moved.found.matching.tolist()]
        draws = shift_draws(
            kind, moved.pairs.original, moved.pairs.destination, moved.assignment, len(targets),
            count=options.word_draws, average=options.average, samples=moved.pairs.samples, seed=options.seed,
        )  # fmt: skip
        words = self.words((moved.U[0] + (options.alpha / moved.lengths)[:, None] * draws).flatten(0, 1))
        overlaps = [t_overlap(of, targets[row % len(targets)]) for row, of in enumerate(words)]
        return torch.tensor(overlaps).reshape(len(draws), len(targets))

    def other_seeds(self, destination: ConceptDictionary, moved: Moved) -> dict[str, Any]:
        """What further seeds change: between two dictionaries of the original, and in what the shift recovers.

        A shift is one only beyond the first: two dictionaries of one model differ too.

        Returns:
            `seeds`: their number, and the mean over the concepts for each of them; `seed_intervals`: of the mean over
            all of them. Nothing without further seeds.
        """
        options = self.options
        if not options.seeds:
            return {}
        U_a, U_s, _ = moved.U
        values: dict[str, list[Tensor]] = {}
        for further in range(1, options.seeds + 1):
            for name, dictionary, states, shifted in (
                ("original", self.original, moved.pairs.a, U_a),
                ("shifted", destination, moved.pairs.b, U_s),
            ):
                again = learned_again(dictionary, states, dictionary.seed + further).dictionary.to(U_a)
                words = Groundings(moved.words.original, getattr(moved.words, name), self.words(again))
                found = recovery(U_a, shifted, again, moved.shift.empty, words, method=options.matching)
                for measure, of in (("cosine", found.cosine_shifted), ("recovery", found.recovery_shifted)):
                    values.setdefault(f"{measure}_{name}", []).append(of[~found.empty].cpu())
        means = torch.stack([torch.stack(of).mean(dim=0) for of in values.values()], dim=1)
        intervals = mean_intervals(means, LEVEL, options.resamples, options.seed).tolist()
        return {
            "seeds": {"seeds": options.seeds, **{name: [float(v.mean()) for v in of] for name, of in values.items()}},
            "seed_intervals": dict(zip(values, intervals, strict=True)),
        }


def mean_interval(values: Tensor, options: ShiftOptions) -> list[float]:
    """Bootstrap interval of a mean over concepts [K]: lower and upper end."""
    low, high = mean_intervals(values[:, None], LEVEL, options.resamples, options.seed)[0].tolist()
    return [low, high]


def learned_again(dictionary: ConceptDictionary, states: ConceptStates, seed: int | None = None) -> ConceptDictionary:
    """Fit a dictionary's method to states, without those that it holds out.

    Args:
        dictionary: A dictionary as DictionaryFitter wrote it.
        states: The states.
        seed: Another seed than its own.
    """
    kept_out = held_out_ids(states.ids, dictionary.metadata.get("held_out", 0.0))
    kept = states.of(set(states.ids) - kept_out) if kept_out else states
    other = deepcopy(dictionary)
    other.seed = dictionary.seed if seed is None else seed
    return other.fit(kept.states)
