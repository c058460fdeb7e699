"""How sure the shift of a concept is: intervals over samples, and tests against chance.

Notation: as in `pairs`; u_k concept of the original, t_k its counterpart in the destination, s_k length of the concept
among states; u_k + α Δ_k / s_k shifted concept.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from scipy.stats import false_discovery_control
from torch import Tensor
from torch.nn.functional import normalize

from ._averages import Average, rows_of
from ._precision import full_precision
from ._validation import as_rows, check_same_width, check_whole
from .intervals import around, check_bootstrap
from .pairs import Pairs
from .shift import inverse, steps

# A chance value this near below the observed one is as large: the rest is rounding. Relative, and of cosines to 1.
_ROUNDING = 1e-6
# Of n samples, a share 2^(1−n) of the draws swaps all or none: with fewer samples no p could be 0.05.
LEAST_SAMPLES = 6
# Others are lengths.
_LIMITS = dict.fromkeys(("consistency", "pairwise_cosine", "cosine_shifted"), (-1.0, 1.0))


@dataclass(frozen=True, eq=False)
class ShiftSignificance:
    """Intervals and p-values of K concepts, float64, on the CPU.

    Attributes:
        intervals: lower and upper end, [K, 2], of `magnitude`, `mean_magnitude`, `consistency`, `pairwise_cosine` (see
            `ConceptShift`), `cosine_shifted`, `delta_cosine`, `l2_shifted`, `delta_l2` and the normalised differences
            (see `Recovery`); 0 for an empty concept, as the measures are.
        p: p-values, [K], of `magnitude`, `consistency`, `recovery_pairing` and `recovery_direction`; 1 for an untested
            concept.
        untested: concepts with fewer than 6 samples, the empty ones among them, [K], bool.
    """

    intervals: dict[str, Tensor]
    p: dict[str, Tensor]
    untested: Tensor

    def adjusted(self) -> dict[str, Tensor]:
        """p-values after Benjamini and Hochberg, [K]: below q, a share q of the rejections is false at most.

        Each test is a family of its own, of the concepts that are tested; 1 for the others.
        """
        return {test: self._adjusted(p) for test, p in self.p.items()}

    def _adjusted(self, p: Tensor) -> Tensor:
        adjusted = torch.ones_like(p)
        if not bool(self.untested.all()):
            family = false_discovery_control(p[~self.untested].numpy())
            adjusted[~self.untested] = torch.from_numpy(family).to(p)
        return adjusted


@full_precision
def shift_significance(
    original: Tensor,
    destination: Tensor,
    assignment: Tensor,
    U_a: Tensor,
    targets: Tensor,
    *,
    destination_assignment: Tensor | None = None,
    alpha: float = 1.0,
    lengths: Tensor | None = None,
    average: Average = "mean",
    samples: Tensor | None = None,
    permutations: int = 1000,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> ShiftSignificance:
    """Intervals of the shift of each concept, and tests of what chance would give.

    Intervals are percentile bootstraps: all samples are drawn with replacement, each with both its states, and Δ_k is
    found anew; u_k, t_k and the assignment stay. They are for what as many samples give on average, not infinitely
    many: noise lengthens a mean of few samples in all of its many dimensions (and each resample once more, which is why
    the percentiles are moved to lie around what was measured). A draw that leaves a concept no sample (of
    `pairwise_cosine`: no two) is left out for it, and in `pairwise_cosine` a sample drawn twice makes no pairs with
    itself.

    The tests are one-sided permutation tests, p = (1 + chance values at least as large) / (1 + permutations):

    - `magnitude`, is there a shift: which state of a sample is the original's is arbitrary, so that δ of whole samples
      change their signs. The statistic is the length of the average δ over the pairs that have the concept in either
      model. Over those that have it in the original (A_k), noise alone would give a shift: states that are chosen
      because they lie near a concept lie further from it the next time.
    - `consistency`, does every sample move alike: destination states are permuted over the samples of the concept, and
      the statistic is the mean cosine of b − a with their mean.
    - `recovery_pairing`, do a concept's own samples lead to t_k: destination states are permuted over all samples. The
      statistic is cos(u_k + α Δ_k / s_k, t_k). Chance leads to the mean of all states here, so that states which hardly
      move pass as well, if only towards t_k.
    - `recovery_direction`, is it the direction that leads there: random directions, as the destination's states vary
      (`causal.random_directions`), take its place with the same norm. The statistic is the same.

    A shift that is none is not consistent and leads nowhere, though states that belong together differ less than others
    and t_k, learned from the same samples, follows their noise: in the last three, p is that of `magnitude` at least.
    Of recovery, it is 1 for a shift that brings its concept no nearer to t_k.

    With the samples in another order, p differs by the noise of the draws, up to about √(p / permutations).

    Args:
        original: states a_m of the original model, [M, D].
        destination: states b_m of the destination model for the same samples, [M, D].
        assignment: concept of each sample in the original model, [M], integer; −1 for one that activates none.
        U_a: concepts of the original, [K, D].
        targets: t_k, [K, D], row `Recovery.matching[k]` of the destination's concepts.
        destination_assignment: concept that the original's dictionary gives each destination state, [M], integer; −1
            for one that activates none. By default that of the original's state, which is right only where concepts
            are not found in the states themselves.
        alpha: how far concepts are shifted.
        lengths: s_k, [K] (`ConceptDictionary.lengths`); 1 by default.
        average: as in `concept_shift`; medians and trimmed means take minutes where means take seconds.
        samples: sample that each row belongs to, [M], integer; by default each row is one. Its rows are drawn, swapped
            and permuted together.
        permutations: draws of each test.
        resamples: draws of the bootstrap.
        level: coverage of the intervals.
        seed: seed of all draws.

    Returns:
        Intervals and p-values; all p are 1 where the states are identical.

    Raises:
        ValueError: as `concept_shift` and `ConceptShift.shifted`, or if `U_a`, `targets` or `samples` do not fit, a
            number of draws is below 1, or `level` not between 0 and 1.
    """
    check_whole(permutations, 1, "permutations")
    check_bootstrap(level, resamples)
    path = _path(U_a, targets, alpha, lengths)
    pairs = Pairs(original, destination, assignment, len(path.start), average, samples)
    check_same_width(path.start, pairs.a, ("U_a", "original"))
    path = _Path(*(tensor.to(pairs.a) for tensor in path))
    empty = pairs.shift.empty.cpu()
    untested = torch.tensor([len(torch.unique(of)) < LEAST_SAMPLES for of in pairs.samples])
    touching = _touching(pairs.rows, assignment if destination_assignment is None else destination_assignment, pairs)
    intervals = _intervals(pairs, path, resamples, level, seed)
    p = _p_values(pairs, touching, path, permutations, seed)
    return ShiftSignificance(
        intervals={measure: ends.cpu().masked_fill(empty[:, None], 0) for measure, ends in intervals.items()},
        p={test: values.cpu().masked_fill(untested, 1) for test, values in p.items()},
        untested=untested,
    )


def _touching(rows: list[Tensor], destination_assignment: Tensor, pairs: Pairs) -> list[Tensor]:
    """Rows of the pairs that have a concept in either model, K tensors, on the CPU."""
    there = rows_of(destination_assignment, len(rows), len(pairs.a), "destination_assignment")
    return [torch.unique(torch.cat(both)) for both in zip(rows, there, strict=True)]


class _Path(NamedTuple):
    """From where concepts are shifted (u) to where they should come (t), [K, D] each, and α / s, [K]."""

    start: Tensor
    end: Tensor
    step: Tensor

    def shifted(self, shifts: Tensor, k: int | slice = slice(None)) -> Tensor:
        """Where shifts take concepts, u + α Δ / s, of shifts [R, D] of a concept, or [R, K, D] of all."""
        return self.start[k] + self.step[k, None] * shifts

    def cosine(self, shifted: Tensor, k: int | slice = slice(None)) -> Tensor:
        """Their cosines with t, [R] or [R, K], float64."""
        end = normalize(self.end[k], dim=-1)
        return torch.einsum("...d,...d->...", shifted, end).double() * inverse(shifted.norm(dim=-1).double())


def _path(U_a: Tensor, targets: Tensor, alpha: float, lengths: Tensor | None) -> _Path:
    U_a, targets = as_rows(U_a, "U_a"), as_rows(targets, "targets")
    if targets.shape != U_a.shape:
        raise ValueError(
            f"`targets` must have the shape of `U_a`, {list(U_a.shape)}, got {list(targets.shape)}: take the matched "
            "row for each concept"
        )
    return _Path(U_a, targets, steps(alpha, lengths, len(U_a)))


class _Block:
    """The samples of one concept, measured in many draws.

    Args:
        pairs: the states.
        path: of the concepts.
        k: the concept.
    """

    def __init__(self, pairs: Pairs, path: _Path, k: int) -> None:
        self._pairs, self._path, self._k = pairs, path, k
        norms = pairs.deltas[k].norm(dim=1)
        self._norms, self._inverse = norms.double(), inverse(norms)
        # Each row's part in ‖Σ δ_m / ‖δ_m‖‖² of its own sample, and how many rows that has.
        _, sample, sizes = torch.unique(pairs.samples[k], return_inverse=True, return_counts=True)
        sample, sizes = sample.to(norms.device), sizes.to(norms.device)
        resultants = norms.new_zeros(len(sizes), path.start.shape[1])
        resultants.index_add_(0, sample, self._inverse[:, None] * pairs.deltas[k])
        self._sizes = sizes[sample].double()
        self._within = resultants.square().sum(dim=1)[sample].double() / self._sizes

    def measures(self, counts: Tensor) -> dict[str, Tensor]:
        """What is measured in each draw, [R], float64; NaN where it has too few samples.

        Args:
            counts: how often each sample was drawn, [R, S], int64.
        """
        delta, shifts = self._pairs.deltas[self._k], self._pairs.weighted(self._k, counts)
        weights = counts[:, self._pairs.samples[self._k]].to(delta)
        resultant = (weights * self._inverse) @ delta  # Σ w_m δ_m / ‖δ_m‖ [R, D]
        magnitude = shifts.norm(dim=1).double()
        along = torch.einsum("rd,rd->r", resultant, shifts).double() * inverse(magnitude)
        weights = weights.double()
        n, squares = weights.sum(dim=1), weights.square()
        # Pairs of different samples, and those within a sample as often as it was drawn.
        n_pairs = n.square() - squares @ self._sizes + weights @ (self._sizes - 1)
        moved = (self._norms > 0).double()
        pair_sum = resultant.square().sum(dim=1).double() - squares @ self._within + weights @ (self._within - moved)
        shifted = self._path.shifted(shifts, self._k)
        found = {
            "magnitude": magnitude,
            "mean_magnitude": weights @ self._norms / n,
            "consistency": along / n,
            "pairwise_cosine": torch.where(n_pairs > 0, pair_sum / n_pairs, torch.nan),
            "cosine_shifted": self._path.cosine(shifted, self._k),
            "l2_shifted": (shifted - self._path.end[self._k]).norm(dim=1).double(),
        }
        return {measure: values.masked_fill(n == 0, torch.nan) for measure, values in found.items()}


def _intervals(pairs: Pairs, path: _Path, resamples: int, level: float, seed: int) -> dict[str, Tensor]:
    blocks = [_Block(pairs, path, k) for k in range(len(pairs.rows))]
    drawn: dict[str, list[Tensor]] = {}
    for counts in pairs.counts(resamples, seed):
        concepts = [block.measures(counts) for block in blocks]
        for measure in concepts[0]:
            drawn.setdefault(measure, []).append(torch.stack([values[measure] for values in concepts], dim=1))
    shifted, l2_original = path.shifted(pairs.shift.vectors), (path.start - path.end).norm(dim=1)
    observed = {measure: getattr(pairs.shift, measure) for measure in drawn if hasattr(pairs.shift, measure)}
    observed |= {"cosine_shifted": path.cosine(shifted), "l2_shifted": (shifted - path.end).norm(dim=1)}
    intervals = {
        measure: around(torch.cat(chunks), observed[measure], level).clamp(*_LIMITS.get(measure, (0, torch.inf)))
        for measure, chunks in drawn.items()
    }
    cosine_original = path.cosine(path.start)
    intervals["delta_cosine"] = intervals["cosine_shifted"] - cosine_original[:, None]
    intervals["delta_l2"] = l2_original[:, None] - intervals["l2_shifted"].flip(1)
    for measure, original in (("delta_cosine", cosine_original.abs()), ("delta_l2", l2_original.double())):
        # As the measures themselves: 0 where the original is none to compare with.
        intervals[f"{measure}_normalised"] = intervals[measure] * inverse(original)[:, None]
    return intervals


def _p_values(pairs: Pairs, touching: list[Tensor], path: _Path, permutations: int, seed: int) -> dict[str, Tensor]:
    magnitude = _p_value(*pairs.swapped(touching, permutations, seed), least=0)
    observed = path.cosine(path.shifted(pairs.shift.vectors))
    no_nearer = observed <= path.cosine(path.start) + _ROUNDING

    def of_recovery(chance: Iterable[Tensor]) -> Tensor:
        cosines = torch.cat([path.cosine(path.shifted(shifts)) for shifts in chance])
        return _p_value(observed, cosines, least=1).masked_fill(no_nearer, 1)

    p = {
        "consistency": _p_value(*pairs.consistencies(permutations, seed), least=1),
        "recovery_pairing": of_recovery(pairs.paired_anew(permutations, seed)),
        "recovery_direction": of_recovery(pairs.random(permutations, seed)),
    }
    return {"magnitude": magnitude, **{test: values.maximum(magnitude) for test, values in p.items()}}


def _p_value(observed: Tensor, chance: Tensor, least: float) -> Tensor:
    """Share of the chance values [P, K] that are as large as the observed ones [K], which count themselves, [K]."""
    bound = observed.double() - _ROUNDING * observed.abs().clamp_min(least)
    as_large = (chance.double() >= bound).sum(dim=0)
    return (1 + as_large).double() / (1 + len(chance))
