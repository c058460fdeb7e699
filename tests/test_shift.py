"""Pairing of samples and shift of concepts, against numbers worked by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conceptshift.concepts import Average, concept_shift, load_shift, pair_rows
from scipy import stats
from torch import Tensor

FIELDS = ("vectors", "counts", "consistency", "pairwise_cosine", "magnitude", "mean_magnitude")


def states(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Paired states [60, 5] twice and an assignment [60] to four of five concepts."""
    generator = torch.Generator().manual_seed(seed)
    original = torch.randn(60, 5, generator=generator)
    destination = original + torch.randn(60, 5, generator=generator)
    return original, destination, torch.randint(4, (60,), generator=generator)


def test_hand_worked_shift() -> None:
    original = torch.tensor([[1.0, 1.0], [2.0, 0.0], [0.0, 5.0], [7.0, 7.0]])
    delta = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 2.0], [-6.0, 8.0]])
    shift = concept_shift(original, original + delta, torch.tensor([0, 0, 2, 3]), n_concepts=4)
    assert shift.vectors.tolist() == [[1.5, 2.0], [0.0, 0.0], [0.0, 2.0], [-6.0, 8.0]]
    assert shift.counts.tolist() == [2, 0, 1, 1]
    assert shift.empty.tolist() == [False, True, False, False]
    # cos((3, 0), (1.5, 2)) = 0.6 and cos((0, 4), (1.5, 2)) = 0.8.
    torch.testing.assert_close(shift.consistency, torch.tensor([0.7, 0.0, 1.0, 1.0]))
    torch.testing.assert_close(shift.pairwise_cosine, torch.zeros(4))
    torch.testing.assert_close(shift.magnitude, torch.tensor([2.5, 0.0, 2.0, 10.0]))
    torch.testing.assert_close(shift.mean_magnitude, torch.tensor([3.5, 0.0, 2.0, 10.0]))


def test_statistics_against_explicit_sums() -> None:
    original, destination, assignment = states()
    delta = destination - original
    delta[3] = 0  # a sample that did not move has cosine 0 with all others
    shift = concept_shift(original, original + delta, assignment, n_concepts=5)
    cosine = torch.nn.functional.cosine_similarity
    for k in range(4):
        own = ((original + delta) - original)[assignment == k]
        mean = own.mean(dim=0)
        pairs = cosine(own[:, None], own[None], dim=2)
        pairs.fill_diagonal_(0)
        n = len(own)
        assert int(shift.counts[k]) == n
        torch.testing.assert_close(shift.vectors[k], mean)
        torch.testing.assert_close(shift.consistency[k], cosine(own, mean[None]).mean())
        torch.testing.assert_close(shift.pairwise_cosine[k], pairs.sum() / (n * (n - 1)))
        torch.testing.assert_close(shift.magnitude[k], mean.norm())
        torch.testing.assert_close(shift.mean_magnitude[k], own.norm(dim=1).mean())
    assert shift.empty.tolist() == [False, False, False, False, True]


@pytest.mark.parametrize("rows", [1, 2, 9, 10, 30, 60])
@pytest.mark.parametrize("average", ["median", "trimmed_mean"])
def test_median_and_trimmed_mean_are_those_of_each_coordinate(average: Average, rows: int) -> None:
    original, destination, _ = (part[:rows] for part in states())
    destination[rows // 2] += 1000
    shift = concept_shift(original, destination, torch.zeros(rows).long(), 2, average)
    delta = (destination - original).double().numpy()
    middle: Any = np.median(delta, axis=0) if average == "median" else stats.trim_mean(delta, 0.1, axis=0)
    np.testing.assert_allclose(shift.vectors[0], middle, rtol=1e-5, atol=1e-6)
    cosines = delta @ middle / np.linalg.norm(delta, axis=1) / np.linalg.norm(middle)
    assert float(shift.consistency[0]) == pytest.approx(cosines.mean(), abs=1e-5)
    assert float(shift.magnitude[0]) == pytest.approx(np.linalg.norm(middle), rel=1e-5)
    # One sample in a class of its own moves the mean only.
    assert (float(shift.magnitude[0]) > 10) == (rows < 10 and (average == "trimmed_mean" or rows < 3))
    of_mean = concept_shift(original, destination, torch.zeros(rows).long(), 2)
    torch.testing.assert_close(shift.pairwise_cosine, of_mean.pairwise_cosine)
    torch.testing.assert_close(shift.mean_magnitude, of_mean.mean_magnitude)
    assert (shift.vectors[1] == 0).all()


@pytest.mark.parametrize("average", ["mean", "median", "trimmed_mean"])
def test_identical_states_do_not_shift_at_all(average: Average) -> None:
    original, _, assignment = states()
    shift = concept_shift(original, original.clone(), assignment, 5, average)
    for name in ("vectors", "consistency", "pairwise_cosine", "magnitude", "mean_magnitude"):
        assert (getattr(shift, name) == 0).all(), name
    U = torch.randn(5, 5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(shift.shifted(U), U)


def test_parallel_and_opposite_shifts() -> None:
    origin = torch.zeros(4, 2)
    moved = torch.tensor([[1.0, 0.0], [5.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
    shift = concept_shift(origin, moved, torch.tensor([0, 0, 1, 1]), n_concepts=2)
    torch.testing.assert_close(shift.pairwise_cosine, torch.tensor([1.0, -1.0]))
    torch.testing.assert_close(shift.consistency, torch.tensor([1.0, 0.0]))
    assert shift.magnitude[1] == 0
    assert shift.mean_magnitude[1] == 2


def test_order_of_the_samples_does_not_matter() -> None:
    original, destination, assignment = states()
    order = torch.randperm(60, generator=torch.Generator().manual_seed(2))
    shift = concept_shift(original, destination, assignment, n_concepts=5)
    permuted = concept_shift(original[order], destination[order], assignment[order], n_concepts=5)
    for name in FIELDS:
        torch.testing.assert_close(getattr(permuted, name), getattr(shift, name), rtol=1e-5, atol=1e-6)


def test_shifted_concepts_go_along_the_shift() -> None:
    original, destination, assignment = states()
    shift = concept_shift(original, destination, assignment, n_concepts=5)
    U = torch.randn(5, 5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(shift.shifted(U, alpha=0), U)
    torch.testing.assert_close(shift.shifted(U), U + shift.vectors)
    torch.testing.assert_close(shift.shifted(U, alpha=-2), U - 2 * shift.vectors)
    lengths = torch.tensor([1.0, 2.0, 0.5, 100.0, 7.0])
    torch.testing.assert_close(shift.shifted(U, 3, lengths), U + 3 * shift.vectors / lengths[:, None])
    # Of concepts as long as the states, it is the shift as it is.
    torch.testing.assert_close(lengths[:, None] * shift.shifted(U, 1, lengths), lengths[:, None] * U + shift.vectors)
    assert torch.equal(shift.shifted(U)[4], U[4])
    with pytest.raises(ValueError, match=r"shape of the shift vectors, \[5, 5\], got \[4, 5\]"):
        shift.shifted(U[:4])
    for bad in (lengths[:4], -lengths, lengths * float("inf")):
        with pytest.raises(ValueError, match=r"`lengths` must hold 5 positive numbers, one for each concept"):
            shift.shifted(U, lengths=bad)
    with pytest.raises(ValueError, match=r"`alpha` must be finite, got inf"):
        shift.shifted(U, float("inf"))


def test_round_trip_is_exact(tmp_path: Path) -> None:
    shift = concept_shift(*states(), n_concepts=5)
    shift.save(tmp_path / "shift.safetensors", {"destination": "adapter-3"})
    loaded, metadata = load_shift(tmp_path / "shift.safetensors")
    for name in FIELDS:
        assert torch.equal(getattr(loaded, name), getattr(shift, name)), name
        assert getattr(loaded, name).dtype == getattr(shift, name).dtype
    assert torch.equal(loaded.empty, shift.empty)
    assert metadata == {"destination": "adapter-3"}


def test_bad_states() -> None:
    a, b, assignment = states()
    with pytest.raises(ValueError, match=r"the same samples, at least one, got 60 and 59 rows"):
        concept_shift(a, b[:59], assignment, 4)
    with pytest.raises(ValueError, match=r"at least one, got 0 and 0 rows"):
        concept_shift(a[:0], b[:0], assignment[:0], 4)
    with pytest.raises(ValueError, match=r"the same width, got 5 and 4"):
        concept_shift(a, b[:, :4], assignment, 4)
    with pytest.raises(ValueError, match=r"`destination` must be finite, but 60 of 60"):
        concept_shift(a, b * float("inf"), assignment, 4)
    with pytest.raises(ValueError, match=r"`average` must be one of mean, median, trimmed_mean, got 'mode'"):
        concept_shift(a, b, assignment, 4, "mode")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"must lie in −1 … 2, got values from 0 to 3"):
        concept_shift(a, b, assignment, 3)
    with pytest.raises(ValueError, match=r"got values from -2 to 1"):
        concept_shift(a, b, assignment - 2, 4)
    with pytest.raises(ValueError, match=r"integer tensor \[60\], .* got torch.float32 \[60\]"):
        concept_shift(a, b, assignment.float(), 4)
    with pytest.raises(ValueError, match=r"integer tensor \[60\], .* got torch.int64 \[59\]"):
        concept_shift(a, b, assignment[:59], 4)


def test_rows_are_paired_by_id() -> None:
    rows_a, rows_b = pair_rows(["x", "only_a", "y", "z"], ["z", "y", "only_b", "x"])
    assert rows_a.tolist() == [0, 2, 3]
    assert rows_b.tolist() == [3, 1, 0]
    assert rows_a.dtype == rows_b.dtype == torch.int64


def test_bad_ids() -> None:
    with pytest.raises(ValueError, match=r"`ids_a` must hold each sample id once, but 7 is in rows 0 and 2"):
        pair_rows([7, 8, 7], [7, 8])
    with pytest.raises(ValueError, match=r"`ids_b` must hold each sample id once, but 'x' is in rows 1 and 2"):
        pair_rows(["x"], ["y", "x", "x"])
    with pytest.raises(ValueError, match=r"none of 2 and 1 is common"):
        pair_rows([1, 2], ["1"])
    with pytest.raises(ValueError, match=r"none of 0 and 0 is common"):
        pair_rows([], [])


def test_samples_of_no_concept_count_nowhere() -> None:
    original, destination, assignment = states()
    idle = torch.arange(len(assignment)) % 3 == 0
    shift = concept_shift(original, destination, torch.where(idle, -1, assignment), n_concepts=5)
    alone = concept_shift(original[~idle], destination[~idle], assignment[~idle], n_concepts=5)
    assert torch.equal(shift.counts, alone.counts)
    torch.testing.assert_close(shift.vectors, alone.vectors)
