"""Intervals and tests of shifts against loops that do what the words say, and under chance and certainty."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, get_args

import numpy as np
import pytest
import torch
from conceptshift.concepts import (
    Average,
    KMeans,
    concept_shift,
    match_concepts,
    shift_draws,
    shift_significance,
)
from conceptshift.concepts import intervals as interval_module
from conceptshift.concepts import pairs as pairs_module
from conceptshift.concepts.causal import random_directions
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

TESTS = ("magnitude", "consistency", "recovery_pairing", "recovery_direction")
AVERAGES: dict[str, Callable[[Any], Any]] = {
    "mean": lambda rows: rows.mean(axis=0),
    "median": lambda rows: np.median(rows, axis=0),
    "trimmed_mean": lambda rows: stats.trim_mean(rows, 0.1, axis=0),
}
_Array = NDArray[np.float64]


class Case:
    """Paired states, an assignment to all but the last concept, concepts and targets."""

    def __init__(
        self, rows: int = 60, width: int = 7, K: int = 5, samples: int | None = None, shift: float = 0.3
    ) -> None:
        generator = torch.Generator().manual_seed(rows)
        self.centres = 3 * torch.randn(K, width, generator=generator)
        self.moves = shift * torch.randn(K, width, generator=generator)
        self.assignment = torch.arange(rows) % (K - 1)
        self.assignment[::11] = -1
        self.original = 10 + self.centres[self.assignment] + torch.randn(rows, width, generator=generator)
        noise = torch.randn(rows, width, generator=generator)
        self.destination = self.original + self.moves[self.assignment] + noise
        self.U = 10 + self.centres
        self.targets = self.U + self.moves
        self.samples = None if samples is None else torch.randint(samples, (rows,), generator=generator) * 7 - 3
        self.destination_assignment = self.assignment.roll(1)

    def significance(self, **options: Any) -> Any:
        return shift_significance(
            self.original, self.destination, self.assignment, self.U, self.targets,
            **{
                "destination_assignment": self.destination_assignment, "permutations": 60, "resamples": 60, "seed": 3,
                "samples": self.samples, **options,
            },
        )  # fmt: skip

    def draws(self, kind: Any, **options: Any) -> Tensor:
        return shift_draws(
            kind, self.original, self.destination, self.assignment, len(self.U),
            **{"count": 60, "seed": 3, "samples": self.samples, **options},
        )  # fmt: skip


class Naive:
    """Everything by loops over draws, concepts and samples, in float64, from the same random numbers."""

    def __init__(self, case: Case, average: str, alpha: float, lengths: Tensor, draws: int, seed: int) -> None:
        self.a, self.b = case.original.double().numpy(), case.destination.double().numpy()
        self.assignment = case.assignment.tolist()
        self.average = AVERAGES[average]
        self.U, self.T = case.U.double().numpy(), case.targets.double().numpy()
        self.steps = (alpha / lengths).double().numpy()
        ids = list(range(len(self.a))) if case.samples is None else case.samples.tolist()
        self.sample = [sorted(set(ids)).index(name) for name in ids]
        self.S, self.K = len(set(ids)), len(self.U)
        self.draws, self.seed, self.states = draws, seed, case.destination
        self.rows = [[m for m, k in enumerate(self.assignment) if k == concept] for concept in range(self.K)]
        self.used = [k for k in range(self.K) if self.rows[k]]
        both = list(zip(self.assignment, case.destination_assignment.tolist(), strict=True))
        self.touching = [[m for m, ks in enumerate(both) if concept in ks] for concept in range(self.K)]
        self.shift = {k: self.average(self.b[self.rows[k]] - self.a[self.rows[k]]) for k in self.used}

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def cosine(self, x: _Array, y: _Array) -> float:
        norms = float(np.linalg.norm(x) * np.linalg.norm(y))
        return float(x @ y) / norms if norms else 0.0

    def reached(self, k: int, shift: _Array) -> float:
        return self.cosine(self.U[k] + self.steps[k] * shift, self.T[k])

    def consistency(self, delta: _Array) -> float:
        return float(np.mean([self.cosine(d, delta.mean(axis=0)) for d in delta]))

    def others(self, rows: list[int], generator: torch.Generator) -> dict[int, int]:
        """Which row takes the place of each when their samples are permuted."""
        names = sorted({self.sample[m] for m in rows})
        order = torch.randperm(len(names), generator=generator).tolist()
        own = {name: [m for m in rows if self.sample[m] == name] for name in names}
        taken = {}
        for place, name in enumerate(names):
            guests = own[names[order[place]]]
            for number, m in enumerate(own[name]):
                taken[m] = guests[number % len(guests)]
        return taken

    def chance(self) -> dict[str, dict[int, list[float]]]:
        """Statistics under chance: test → concept → values."""
        found: dict[str, dict[int, list[float]]] = {test: {k: [] for k in self.used} for test in TESTS}
        generator = self.generator()
        for _ in range(self.draws):
            signs = (2 * torch.randint(2, (self.S,), generator=generator) - 1).tolist()
            for k in self.used:
                flipped = np.stack([signs[self.sample[m]] * (self.b[m] - self.a[m]) for m in self.touching[k]])
                found["magnitude"][k].append(float(np.linalg.norm(self.average(flipped))))
        generator = self.generator()
        for k in self.used:
            for _ in range(self.draws):
                other = self.others(self.rows[k], generator)
                found["consistency"][k].append(
                    self.consistency(np.stack([self.b[other[m]] - self.a[m] for m in self.rows[k]]))
                )
        for k, shift in self.paired_anew():
            found["recovery_pairing"][k].append(self.reached(k, shift))
        for direction in random_directions(self.states, self.draws, self.generator()).double().numpy():
            for k in self.used:
                shift = np.linalg.norm(self.shift[k]) * direction
                found["recovery_direction"][k].append(self.reached(k, shift))
        return found

    def paired_anew(self) -> Iterator[tuple[int, _Array]]:
        generator = self.generator()
        for _ in range(self.draws):
            other = self.others(list(range(len(self.a))), generator)
            for k in self.used:
                yield k, self.average(np.stack([self.b[other[m]] - self.a[m] for m in self.rows[k]]))

    def resampled(self) -> Iterator[tuple[int, list[tuple[int, int]]]]:
        """For each draw and concept, its rows, each with the number of the drawn sample that it comes with."""
        generator = self.generator()
        for _ in range(self.draws):
            drawn = torch.randint(self.S, (self.S,), generator=generator).tolist()
            for k in self.used:
                yield (
                    k,
                    [(m, place) for place, name in enumerate(drawn) for m in self.rows[k] if self.sample[m] == name],
                )

    def measures(self, k: int, drawn: list[tuple[int, int]]) -> dict[str, float]:
        """Measures of a concept with these rows; without those that are not there."""
        if not drawn:
            return {}
        delta = np.stack([self.b[m] - self.a[m] for m, _ in drawn])
        shift = self.average(delta)
        cosines = [
            self.cosine(delta[i], delta[j])
            for i, (row_i, place_i) in enumerate(drawn)
            for j, (row_j, place_j) in enumerate(drawn)
            if self.sample[row_i] != self.sample[row_j] or (place_i == place_j and i != j)
        ]
        shifted = self.U[k] + self.steps[k] * shift
        measures = {
            "magnitude": float(np.linalg.norm(shift)),
            "mean_magnitude": float(np.linalg.norm(delta, axis=1).mean()),
            "consistency": float(np.mean([self.cosine(d, shift) for d in delta])),
            "cosine_shifted": self.cosine(shifted, self.T[k]),
            "delta_cosine": self.cosine(shifted, self.T[k]) - self.cosine(self.U[k], self.T[k]),
            "l2_shifted": float(np.linalg.norm(shifted - self.T[k])),
            "delta_l2": float(np.linalg.norm(self.U[k] - self.T[k]) - np.linalg.norm(shifted - self.T[k])),
        }
        return {**measures, "pairwise_cosine": float(np.mean(cosines))} if cosines else measures

    def intervals(self, level: float) -> dict[str, dict[int, tuple[float, float]]]:
        values: dict[str, dict[int, list[float]]] = {}
        for k, drawn in self.resampled():
            for measure, value in self.measures(k, drawn).items():
                values.setdefault(measure, {}).setdefault(k, []).append(value)
        found: dict[str, dict[int, tuple[float, float]]] = {}
        for k in self.used:
            for measure, value in self.measures(k, [(m, self.sample[m]) for m in self.rows[k]]).items():
                low, high = np.quantile(values[measure][k], [(1 - level) / 2, (1 + level) / 2])
                bias = np.mean(values[measure][k]) - value
                # No length is below 0, and no cosine above 1.
                before, apart = self.cosine(self.U[k], self.T[k]), float(np.linalg.norm(self.U[k] - self.T[k]))
                most = {"cosine_shifted": 1.0, "delta_cosine": 1 - before, "delta_l2": apart}.get(measure, np.inf)
                least = 0 if measure in ("magnitude", "l2_shifted") else -np.inf
                found.setdefault(measure, {})[k] = (max(float(low - bias), least), min(float(high - bias), most))
        for k in self.used:
            of_original = abs(self.cosine(self.U[k], self.T[k])), float(np.linalg.norm(self.U[k] - self.T[k]))
            for measure, of in zip(("delta_cosine", "delta_l2"), of_original, strict=True):
                low, high = found[measure][k]
                found.setdefault(f"{measure}_normalised", {})[k] = (low / of, high / of)
        return found


@pytest.mark.parametrize("samples", [None, 13])
@pytest.mark.parametrize("average", get_args(Average))
def test_against_loops(average: Average, samples: int | None) -> None:
    case = Case(samples=samples)
    lengths = torch.tensor([0.5, 1.0, 2.0, 4.0, 1.0])
    found = case.significance(average=average, alpha=0.7, lengths=lengths, level=0.9)
    naive = Naive(case, average, 0.7, lengths, 60, 3)
    for test, chance in naive.chance().items():
        for k, values in chance.items():
            delta = naive.b - naive.a
            observed = {
                "magnitude": float(np.linalg.norm(naive.average(delta[naive.touching[k]]))),
                "consistency": naive.consistency(delta[naive.rows[k]]),
            }.get(test, naive.reached(k, naive.shift[k]))
            p = (1 + sum(value >= observed - 1e-6 for value in values)) / 61
            p = max(p, float(found.p["magnitude"][k]))
            if test.startswith("recovery") and observed <= naive.reached(k, 0 * naive.shift[k]):
                p = 1.0
            assert len({naive.sample[m] for m in naive.rows[k]}) >= 6
            assert float(found.p[test][k]) == pytest.approx(p), (test, k)
    expected = naive.intervals(0.9)
    assert expected.keys() == found.intervals.keys()
    for measure, of_concepts in expected.items():
        for k, ends in of_concepts.items():
            assert found.intervals[measure][k].tolist() == pytest.approx(ends, abs=2e-5), (measure, k)


@pytest.mark.parametrize("samples", [None, 13])
@pytest.mark.parametrize("average", get_args(Average))
def test_draws_against_loops(average: Average, samples: int | None) -> None:
    case = Case(samples=samples)
    naive = Naive(case, average, 1.0, torch.ones(5), 60, 3)
    paired, resampled = case.draws("pairing", average=average), case.draws("bootstrap", average=average)
    anew = iter(naive.paired_anew())
    again = iter(naive.resampled())
    for draw in range(60):
        for k in naive.used:
            np.testing.assert_allclose(paired[draw, k], next(anew)[1], atol=1e-5)
            rows = [m for m, _ in next(again)[1]]
            np.testing.assert_allclose(resampled[draw, k], naive.average(naive.b[rows] - naive.a[rows]), atol=1e-5)
    for draws in (paired, resampled):
        assert draws.shape == (60, 5, 7)
        assert (draws[:, 4] == 0).all()


def test_random_draws_have_the_norm_of_the_shift() -> None:
    case = Case()
    shift = concept_shift(case.original, case.destination, case.assignment, 5)
    draws = case.draws("directions")
    torch.testing.assert_close(draws.norm(dim=2), shift.magnitude.expand(60, 5))
    expected = random_directions(case.destination, 60, torch.Generator().manual_seed(3))
    torch.testing.assert_close(draws[:, 1], expected * shift.magnitude[1])


def test_a_draw_without_a_concept_takes_its_shift_from_another() -> None:
    case = Case()
    case.assignment = torch.zeros(60).long()
    case.assignment[5:7] = torch.tensor([1, 2])
    draws, delta = case.draws("bootstrap"), case.destination - case.original
    for k, row in ((1, 5), (2, 6)):
        torch.testing.assert_close(draws[:, k], delta[row].expand(60, 7))
    only = shift_draws(
        "bootstrap", case.original[:2], case.destination[:2], torch.tensor([0, 1]), 2, count=1, seed=_seed_without(1)
    )
    torch.testing.assert_close(only[0], delta[:2])


def _seed_without(sample: int) -> int:
    """Seed of which the first draw from two samples lacks one."""
    return next(
        seed
        for seed in range(99)
        if sample not in torch.randint(2, (2,), generator=torch.Generator().manual_seed(seed))
    )


@pytest.mark.parametrize("average", get_args(Average))
def test_identical_states_are_never_significant(average: Average) -> None:
    case = Case()
    case.destination, case.targets = case.original.clone(), case.U.clone()
    found = case.significance(average=average)
    for test in TESTS:
        assert (found.p[test] == 1).all(), test
        assert (found.adjusted()[test] == 1).all(), test
    for measure in ("magnitude", "mean_magnitude", "consistency", "pairwise_cosine", "delta_cosine", "delta_l2"):
        assert found.intervals[measure].abs().max() < 1e-6, measure
    torch.testing.assert_close(found.intervals["cosine_shifted"][:4], torch.ones(4, 2).double())


def test_identical_states_elsewhere_are_never_significant() -> None:
    """Also where the destination's dictionary is another one, and the way to the mean of all states leads to it."""
    case = Case()
    case.destination = case.original.clone()
    case.targets = case.original.mean(dim=0).expand(5, 7)
    assert all((p == 1).all() for p in case.significance().p.values())


def test_magnitude_and_consistency_hold_their_level() -> None:
    """With many concepts of noise in one call, a share p of the p-values is at most p."""
    K, each = 600, 9
    generator = torch.Generator().manual_seed(0)
    assignment = torch.arange(K * each) % K
    original = torch.randn(K * each, 4, generator=generator)
    U = torch.randn(K, 4, generator=generator)
    noise = torch.randn(K * each, 4, generator=generator)
    # Symmetric noise on top of each state; and destinations that have nothing to do with their originals.
    found = shift_significance(original, original + noise, assignment, U, U, permutations=199, resamples=1)
    for level in (0.05, 0.2):
        assert float((found.p["magnitude"] <= level).double().mean()) == pytest.approx(level, abs=0.03)
    found = shift_significance(original, 3 + noise, assignment, U, U, permutations=199, resamples=1)
    for level in (0.05, 0.2):
        assert float((found.p["consistency"] <= level).double().mean()) == pytest.approx(level, abs=0.03)
    assert (found.p["magnitude"] <= 0.05).all()


def test_concepts_found_in_noisy_states_do_not_shift_by_the_noise() -> None:
    """Nothing but noise differs, and both dictionaries are learned from the very states."""
    p: dict[str, list[float]] = {test: [] for test in (*TESTS, "magnitude, original only")}
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        states = torch.randn(200, 20, generator=generator)
        original, destination = (states + torch.randn(200, 20, generator=generator) for _ in range(2))
        ours, theirs = (KMeans(5, seed=0).fit(of) for of in (original, destination))
        targets = theirs.dictionary[match_concepts(ours.dictionary, theirs.dictionary)]
        assignments = [ours.assign(of) for of in (original, destination)]
        given = (original, destination, assignments[0], ours.dictionary, targets)
        found = shift_significance(*given, destination_assignment=assignments[1], permutations=99, resamples=1)
        for test in TESTS:
            p[test] += found.p[test].tolist()
        own = shift_significance(*given, permutations=99, resamples=1)
        p["magnitude, original only"] += own.p["magnitude"].tolist()
    share = {test: sum(value <= 0.05 for value in values) / len(values) for test, values in p.items()}
    assert share.pop("magnitude, original only") > 0.5
    assert max(share.values()) <= 0.1, share


@pytest.mark.parametrize("paired", [4096, 16])
def test_consistency_holds_its_level_where_samples_have_unequal_rows(
    paired: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs_module, "_PAIRED", paired)
    K, each = 300, 10
    generator = torch.Generator().manual_seed(0)
    rows = torch.arange(K * each).repeat_interleave(torch.randint(1, 5, (K * each,), generator=generator))
    original, destination = (torch.randn(len(rows), 4, generator=generator) for _ in range(2))
    U = torch.randn(K, 4, generator=generator)
    given: Any = {"samples": rows, "permutations": 99, "resamples": 1}
    p = shift_significance(original, 3 + destination, rows % K, U, U, **given).p["consistency"]
    # Rows that come twice are alike, which makes chance values larger: p is rather too large.
    for level in (0.05, 0.2):
        assert float((p <= level).double().mean()) < level + 0.02
    # Samples that all move alike, each from its own place.
    found = shift_significance(original, original + 1 + 0.1 * destination, rows % K, U, U, **given)
    assert (found.p["consistency"] <= 0.05).double().mean() > 0.95


def test_a_planted_shift_is_significant() -> None:
    case = Case(rows=120, width=30, shift=2.0)
    found = case.significance(permutations=199)
    for test, p in found.adjusted().items():
        assert (p[:4] <= 0.01).all(), test
        assert p[4] == 1, test


def test_a_shift_away_from_the_target_recovers_nothing() -> None:
    case = Case(shift=2.0)
    case.targets = case.U - case.moves
    found = case.significance()
    assert (found.p["recovery_pairing"] == 1).all()
    assert (found.p["recovery_direction"] == 1).all()
    assert (found.p["magnitude"][:4] < 0.05).all()


def test_empty_concepts_are_defined_and_left_out() -> None:
    case = Case()
    found = case.significance()
    assert found.untested.tolist() == [False] * 4 + [True]
    for measure, ends in found.intervals.items():
        assert ends.shape == (5, 2)
        assert ends.isfinite().all(), measure
        assert (ends[4] == 0).all(), measure
    # The rest is as if there were no fifth.
    U, T = case.U[:4], case.targets[:4]
    alone = shift_significance(
        case.original, case.destination, case.assignment, U, T,
        destination_assignment=case.destination_assignment, permutations=60, resamples=60, seed=3,
    )  # fmt: skip
    for test in TESTS:
        assert found.p[test][4] == found.adjusted()[test][4] == 1
        torch.testing.assert_close(found.p[test][:4], alone.p[test])
        torch.testing.assert_close(found.adjusted()[test][:4], alone.adjusted()[test])
    nothing = shift_significance(
        case.original, case.destination, torch.full((60,), -1), U, T, permutations=3, resamples=3
    )
    assert all((p == 1).all() for p in (*nothing.p.values(), *nothing.adjusted().values()))
    assert all((ends == 0).all() for ends in nothing.intervals.values())


def test_a_concept_of_one_sample_has_intervals_without_width() -> None:
    case = Case()
    case.assignment = torch.where(case.assignment == 3, 0, case.assignment)
    case.assignment[7] = 3
    found = case.significance()
    shift = concept_shift(case.original, case.destination, case.assignment, 5)
    for measure in ("magnitude", "mean_magnitude", "consistency", "pairwise_cosine"):
        torch.testing.assert_close(found.intervals[measure][3], getattr(shift, measure)[3].double().expand(2))
    for measure in ("cosine_shifted", "delta_cosine", "l2_shifted", "delta_l2"):
        low, high = found.intervals[measure][3].tolist()
        assert low == pytest.approx(high, abs=1e-5)
    # Which of its two states is the original's, and with which it is paired, cannot be told.
    assert found.p["magnitude"][3] == found.p["consistency"][3] == 1


def test_a_concept_of_one_picture_is_never_significant() -> None:
    """However many tokens: with its sign changed, their shift is as large."""
    generator = torch.Generator().manual_seed(0)
    original = 100 + torch.randn(256, 500, generator=generator)
    destination = original + 0.1 + 0.01 * torch.randn(256, 500, generator=generator)
    assignment, samples = torch.arange(256) // 128, torch.arange(256) // 128
    U = 100 + torch.randn(2, 500, generator=generator)
    found = shift_significance(original, destination, assignment, U, U + 0.1, samples=samples, permutations=99)
    assert (found.p["magnitude"] == 1).all()
    assert (found.p["consistency"] == 1).all()
    for measure in ("magnitude", "mean_magnitude", "consistency", "pairwise_cosine"):
        torch.testing.assert_close(found.intervals[measure].diff(dim=1), torch.zeros(2, 1).double(), atol=1e-5, rtol=0)


def test_rows_of_one_sample_count_as_one() -> None:
    case = Case(shift=0.25)
    once = case.significance(permutations=200, resamples=200)
    many = Case(shift=0.25)
    for name in ("original", "destination", "assignment", "destination_assignment"):
        setattr(many, name, getattr(case, name).repeat_interleave(8, dim=0))
    many.samples = torch.arange(60).repeat_interleave(8)
    grouped = many.significance(permutations=200, resamples=200)
    many.samples = None
    ungrouped = many.significance(permutations=200, resamples=200)
    for test in ("magnitude", "consistency", "recovery_pairing"):
        torch.testing.assert_close(grouped.p[test], once.p[test])
    torch.testing.assert_close(grouped.p["recovery_direction"], once.p["recovery_direction"], atol=0.1, rtol=0)
    # Taken for independent, they would make everything seem surer.
    assert (ungrouped.p["magnitude"] <= once.p["magnitude"]).all()
    assert ungrouped.p["magnitude"].mean() < once.p["magnitude"].mean() - 0.05
    for measure in ("magnitude", "mean_magnitude", "consistency", "cosine_shifted", "l2_shifted"):
        torch.testing.assert_close(grouped.intervals[measure], once.intervals[measure], atol=1e-5, rtol=1e-5)
        width, narrow = (found.intervals[measure].diff(dim=1)[:4] for found in (once, ungrouped))
        assert (narrow < 0.6 * width).all()
    # Equal rows of one sample are pairs as well.
    width, other = (found.intervals["pairwise_cosine"].diff(dim=1)[:4] for found in (once, grouped))
    torch.testing.assert_close(other, width, rtol=0.2, atol=0)


def test_order_of_the_rows_does_not_matter_where_samples_have_names() -> None:
    case = Case()
    case.samples = torch.arange(60)
    found = case.significance()
    order = torch.randperm(60, generator=torch.Generator().manual_seed(9))
    for name in ("original", "destination", "assignment", "destination_assignment", "samples"):
        setattr(case, name, getattr(case, name)[order])
    other = case.significance()
    for test in ("magnitude", "consistency", "recovery_pairing"):
        torch.testing.assert_close(other.p[test], found.p[test])
    for measure in found.intervals:
        torch.testing.assert_close(other.intervals[measure], found.intervals[measure], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("average", get_args(Average))
def test_results_do_not_depend_on_how_much_is_held_at_a_time(average: Average, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(rows=300, width=200, samples=200)
    found, draws = case.significance(average=average), case.draws("pairing", average=average)
    monkeypatch.setattr("conceptshift.concepts.pairs._VALUES", 3000)
    monkeypatch.setattr("conceptshift.concepts.pairs._COLUMNS", 33)
    other = case.significance(average=average)
    for test in TESTS:
        torch.testing.assert_close(other.p[test], found.p[test])
    for measure in found.intervals:
        torch.testing.assert_close(other.intervals[measure], found.intervals[measure], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(case.draws("pairing", average=average), draws, atol=1e-5, rtol=1e-5)


def test_lengths_bring_a_shift_to_the_scale_of_the_concept() -> None:
    """Concepts a hundred times shorter, with lengths, are the same concepts."""
    case = Case()
    found = case.significance(alpha=1.5)
    case.U, case.targets = case.U / 100, case.targets / 100
    scaled = case.significance(alpha=1.5, lengths=torch.full((5,), 100.0))
    for test in TESTS:
        torch.testing.assert_close(scaled.p[test], found.p[test])
    for measure, factor in (("cosine_shifted", 1), ("l2_shifted", 100), ("delta_l2", 100)):
        torch.testing.assert_close(factor * scaled.intervals[measure], found.intervals[measure], atol=1e-4, rtol=1e-4)


def test_half_precision_and_a_large_common_part_cost_nothing() -> None:
    """Hidden states have a few huge coordinates that all share."""
    case = Case(rows=120, width=30)
    case.original, case.destination = case.original.bfloat16(), case.destination.bfloat16()
    found = case.significance()
    huge = torch.zeros(30).bfloat16()
    huge[3] = 1024
    case.original, case.destination = (states.float() + huge.float() for states in (case.original, case.destination))
    other = case.significance()
    for test in ("magnitude", "consistency"):
        torch.testing.assert_close(other.p[test], found.p[test])
    for measure in ("magnitude", "consistency", "pairwise_cosine"):
        torch.testing.assert_close(other.intervals[measure], found.intervals[measure], atol=2e-3, rtol=2e-3)


def test_intervals_of_lengths_hold_their_estimate_in_many_dimensions() -> None:
    generator = torch.Generator().manual_seed(0)
    original = torch.zeros(40, 2000)
    destination = 0.05 + torch.randn(40, 2000, generator=generator)
    zeros = torch.ones(1, 2000)
    found = shift_significance(original, destination, torch.zeros(40).long(), zeros, zeros, permutations=1)
    shift = concept_shift(original, destination, torch.zeros(40).long(), 1)
    low, high = found.intervals["magnitude"][0].tolist()
    assert low < float(shift.magnitude) < high
    # Percentiles of the bare draws would not: they lie higher by their own noise.
    draws = shift_draws("bootstrap", original, destination, torch.zeros(40).long(), 1, count=1000)
    assert float(draws.norm(dim=2).quantile(0.025)) > float(shift.magnitude)
    # One that is a plain mean is that of the textbook.
    norms = destination.norm(dim=1)
    ends = float(norms.mean()) + 1.96 * float(norms.std()) / 40**0.5 * torch.tensor([-1.0, 1.0])
    torch.testing.assert_close(found.intervals["mean_magnitude"][0].float(), ends, atol=0.03, rtol=0)


def test_adjusted_p_values_are_those_of_benjamini_and_hochberg() -> None:
    found = Case(shift=0.35).significance()
    p = found.p["magnitude"][:4].tolist()
    order = sorted(range(4), key=lambda k: p[k])
    expected, least = [0.0] * 4, 1.0
    for rank in range(4, 0, -1):
        least = min(least, p[order[rank - 1]] * 4 / rank)
        expected[order[rank - 1]] = least
    assert len(set(p)) > 2
    assert found.adjusted()["magnitude"].tolist() == pytest.approx([*expected, 1.0])


def test_seeds() -> None:
    case = Case(shift=0.2)
    first, again, other = (case.significance(seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(first.p[test], again.p[test]) for test in TESTS)
    assert torch.equal(first.intervals["magnitude"], again.intervals["magnitude"])
    assert not torch.equal(first.p["magnitude"], other.p["magnitude"])
    assert not torch.equal(first.intervals["magnitude"], other.intervals["magnitude"])


def test_bad_input() -> None:
    case = Case()
    with pytest.raises(ValueError, match=r"`permutations` must be at least 1 .* got 0"):
        case.significance(permutations=0)
    with pytest.raises(ValueError, match=r"`resamples` must be at least 1 .* got 0"):
        case.significance(resamples=0)
    with pytest.raises(ValueError, match=r"`level` must lie between 0 and 1, got 95"):
        case.significance(level=95)
    with pytest.raises(ValueError, match=r"`alpha` must be finite, got nan"):
        case.significance(alpha=float("nan"))
    with pytest.raises(ValueError, match=r"`average` must be one of mean, median, trimmed_mean, got 'mode'"):
        case.significance(average="mode")
    with pytest.raises(ValueError, match=r"`lengths` must hold 5 positive numbers"):
        case.significance(lengths=torch.zeros(5))
    with pytest.raises(ValueError, match=r"`samples` must be an integer tensor \[60\], .* got torch.int64 \[59\]"):
        case.significance(samples=torch.arange(59))
    with pytest.raises(ValueError, match=r"`destination_assignment` must lie in −1 … 4, got values from 0 to 5"):
        case.significance(destination_assignment=torch.arange(60) % 6)
    with pytest.raises(ValueError, match=r"`count` must be at least 1"):
        case.draws("pairing", count=0)
    with pytest.raises(ValueError, match=r"`kind` must be one of bootstrap, pairing, directions, got 'swap'"):
        case.draws("swap")
    case.targets = case.targets[:4]
    with pytest.raises(ValueError, match=r"`targets` must have the shape of `U_a`, \[5, 7\], got \[4, 7\]"):
        case.significance()
    case.U, case.targets = case.U[:, :3], case.U[:, :3]
    with pytest.raises(ValueError, match=r"`U_a` and `original` must have the same width, got 3 and 7"):
        case.significance()


def test_intervals_hold_what_was_observed() -> None:
    draws = torch.tensor([[5.0, 1.0], [7.0, torch.nan], [9.0, torch.nan]])
    ends = interval_module.around(draws, torch.tensor([3.0, 2.0]), 0.5)
    assert ends.tolist() == [[2.0, 4.0], [2.0, 2.0]]
    lost = interval_module.around(torch.full((3, 1), torch.nan), torch.tensor([0.5]), 0.5)
    assert lost.tolist() == [[0.5, 0.5]]
