"""Steering vectors: what each method finds, their sign and length, their controls, their artifact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conceptshift.concepts import (
    SteeringVectors,
    cluster_vectors,
    coarse_vector,
    fine_vector,
    load_steering_vectors,
    principal_vector,
    probe_accuracy,
    probe_vector,
    random_vector_like,
    save_artifact,
    shuffled_vectors,
    vector_length,
    with_length,
)
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cosine(one: Tensor, other: Tensor) -> float:
    return float(cosine_similarity(one, other, dim=-1))


# --- coarse and fine ------------------------------------------------------------------------------------


def test_coarse_vector_goes_from_source_to_target() -> None:
    target = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    source = torch.tensor([[0.0, 1.0], [0.0, 1.0], [3.0, 1.0]])
    assert coarse_vector(target, source).tolist() == [1.0, 3.0]
    torch.testing.assert_close(source.mean(dim=0) + coarse_vector(target, source), target.mean(dim=0))
    assert (coarse_vector(target, target) == 0).all()
    assert coarse_vector(target.bfloat16(), source.bfloat16()).dtype == torch.float32


def test_fine_vector_goes_from_i_to_j() -> None:
    U = torch.tensor([[1.0, 0.0], [0.0, 2.0], [5.0, 5.0]])
    assert fine_vector(U, 0, 1).tolist() == [-1.0, 2.0]
    torch.testing.assert_close(U[2] + fine_vector(U, 2, 0), U[0])
    assert torch.equal(fine_vector(U, 1, 2), -fine_vector(U, 2, 1))


# --- principal ------------------------------------------------------------------------------------------


def test_principal_vector_is_the_first_singular_vector_of_the_differences() -> None:
    target, source = noise(40, 12) @ torch.diag(torch.arange(1.0, 13)) + 1, noise(40, 12, seed=1)
    vector = principal_vector(target, source)
    direction = torch.linalg.svd((target - source).double()).Vh[0].float()
    component = (target - source).mean(dim=0) @ direction
    torch.testing.assert_close(vector, component * direction, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("pairs", "width"), [(2, 50), (300, 2), (300, 50)])
def test_principal_vector_finds_a_planted_direction_that_the_pairs_share(pairs: int, width: int) -> None:
    planted = normalize(noise(width, seed=3), dim=0)
    source = 5 * noise(pairs, width)
    # All differ by the same: centred differences would be zero in the planted direction.
    target = source + 4 * planted + 0.1 * noise(pairs, width, seed=1)
    vector = principal_vector(target, source)
    assert cosine(vector, planted) > 0.98
    assert vector_length(vector) == pytest.approx(4, rel=0.1)
    torch.testing.assert_close(principal_vector(source, target), -vector, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(principal_vector(10 * target, 10 * source), 10 * vector, rtol=1e-4, atol=1e-4)
    # What is common to the two states of a pair does not count.
    common = 100 * noise(pairs, width, seed=2)
    torch.testing.assert_close(principal_vector(target + common, source + common), vector, rtol=1e-2, atol=1e-2)


def test_which_is_which_within_a_pair_decides_only_the_sign() -> None:
    """So that swapping within pairs would be no control: it makes the same direction."""
    target, source = noise(40, 12) + 2, noise(40, 12, seed=1)
    swap = torch.arange(40)[:, None] % 4 == 0
    swapped = principal_vector(torch.where(swap, source, target), torch.where(swap, target, source))
    assert abs(cosine(swapped, principal_vector(target, source))) > 0.9999
    assert vector_length(swapped) < vector_length(principal_vector(target, source))


def test_principal_vector_needs_pairs_that_differ_alike() -> None:
    states = noise(6, 4)
    with pytest.raises(ValueError, match="at least 2 pairs, got 6 and 5 states"):
        principal_vector(states, states[:5])
    with pytest.raises(ValueError, match="at least 2 pairs, got 1 and 1"):
        principal_vector(states[:1], states[1:2])
    for target in (states, torch.cat([states[:3] + 1, states[3:] - 1])):
        with pytest.raises(ValueError, match="differ in no common direction"):
            principal_vector(target, states)


# --- probe ----------------------------------------------------------------------------------------------


def test_probe_is_nearly_the_difference_of_means_where_states_vary_equally() -> None:
    planted = normalize(noise(8, seed=3), dim=0)
    target, source = 3 + noise(2000, 8) + 2 * planted, 3 + noise(1000, 8, seed=1)
    vector = probe_vector(target, source)
    assert cosine(vector, planted) > 0.99
    assert cosine(vector, coarse_vector(target, source)) > 0.99
    torch.testing.assert_close(probe_vector(source, target), -vector, rtol=1e-2, atol=1e-2)
    # The length is how far the means lie apart along it.
    direction = normalize(vector, dim=0)
    assert vector_length(vector) == pytest.approx(float(direction @ coarse_vector(target, source)), rel=1e-5)
    # The unit of the states and where they lie make no difference.
    torch.testing.assert_close(probe_vector(50 * target + 7, 50 * source + 7), 50 * vector, rtol=1e-2, atol=1e-1)


def accuracy(target: Tensor, source: Tensor) -> float:
    """Of states that are of a sample each."""
    return probe_accuracy(target, source, [f"t{i}" for i in range(len(target))], [f"s{i}" for i in range(len(source))])


def test_states_of_one_sample_do_not_tell_of_each_other() -> None:
    """Labels that have nothing to do with the states, eight states a sample: chance, though they are alike."""
    centres = noise(60, 50)
    states = (centres[:, None] + 0.1 * noise(480, 50, seed=1).view(60, 8, 50)).flatten(0, 1)
    ids = [f"{sample}" for sample in range(60) for _ in range(8)]
    assert accuracy(states[:240], states[240:]) > 0.9
    assert abs(probe_accuracy(states[:240], states[240:], ids[:240], ids[240:]) - 0.5) < 0.2


def test_probe_avoids_a_direction_in_which_both_sides_vary_much() -> None:
    scales = torch.tensor([20.0, 1.0, 1.0, 1.0])
    target, source = noise(500, 4) * scales, noise(500, 4, seed=1) * scales
    target[:, 0] += 6  # hardly tells anything
    target[:, 1] += 3
    assert cosine(coarse_vector(target, source), torch.eye(4)[0]) > 0.7
    assert cosine(probe_vector(target, source), torch.eye(4)[1]) > 0.98
    assert accuracy(target, source) == pytest.approx(0.93, abs=0.03)  # Φ(3 / 2)


def test_probe_accuracy_is_of_states_that_the_probe_has_not_seen() -> None:
    # More coordinates than states: any labels can be told apart on the states that were fitted.
    states = noise(80, 200)
    assert abs(accuracy(states[:40], states[40:]) - 0.5) < 0.2
    assert accuracy(states[:40] + 1, states[40:]) > 0.95
    # Balanced: to call everything the larger side is chance.
    assert abs(accuracy(noise(300, 3), noise(20, 3, seed=1)) - 0.5) < 0.15
    # The smaller side has as many states as there are folds.
    assert accuracy(noise(2, 3) + 9, noise(30, 3, seed=1)) == 1
    with pytest.raises(ValueError, match="at least 2 samples of each side, got 1 and 40"):
        accuracy(states[:1], states[40:])
    with pytest.raises(ValueError, match="all of target and source are equal"):
        probe_vector(torch.ones(3, 4), torch.ones(2, 4))


@pytest.mark.parametrize(("n", "m"), [(50, 50), (51, 51), (5, 60), (201, 200)])
@pytest.mark.parametrize("make", [coarse_vector, principal_vector])
def test_shuffled_controls_do_not_know_the_direction(make: Callable[..., Tensor], n: int, m: int) -> None:
    """Nor its opposite, far apart as the sides may lie, and odd as their numbers may be."""
    if make is principal_vector:
        m = n
    apart = torch.zeros(64)
    apart[0] = 30
    target, source = noise(n, 64) + apart, noise(m, 64, seed=1)
    controls, _ = shuffled_vectors(make, target, source, 1.0, 8, seed=0)
    assert float((controls @ (apart / 30)).abs().max()) < 0.6
    assert cosine(make(target, source), apart) > 0.9


# --- between concepts -----------------------------------------------------------------------------------

U = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [9.0, 9.0], [50.0, 50.0]])


def test_every_concept_of_the_source_goes_to_the_nearest_of_the_target() -> None:
    # Shares of the target: 0, ½, ½, 0, 0. Shares of the source: ¾, ¼ (also the target's), 0, 0; nothing has concept 4.
    target, source = torch.tensor([1, 1, 2, 2]), torch.tensor([0, 0, 3, 1])
    vectors, pairs = cluster_vectors(U, target, source)
    assert pairs == [(0, 1), (3, 1)]
    assert vectors.tolist() == [[10, 0], [0, 0], [0, 0], [1, -9], [0, 0]]
    for i, j in pairs:
        assert torch.equal(U[i] + vectors[i], U[j])
    # Shares count, not numbers of states.
    again, _ = cluster_vectors(U, target, source.repeat(9))
    assert torch.equal(again, vectors)


def test_equal_shares_are_of_the_source_and_unassigned_states_count() -> None:
    vectors, pairs = cluster_vectors(U, torch.tensor([0, 1]), torch.tensor([0, 0, 2, 2]))
    assert pairs == [(0, 1), (2, 1)]
    # The shares of concept 0 are equal, ⅓ of 6 and of 3: rounded quotients would not be.
    _, pairs = cluster_vectors(U, torch.tensor([0, 0, 1, 1, 1, -1]), torch.tensor([0, 2, -1]))
    assert pairs == [(0, 1), (2, 1)]
    assert vectors.dtype == torch.float32


def test_both_sides_need_concepts() -> None:
    concepts = torch.tensor([0, 1, 1])
    with pytest.raises(ValueError, match="no concept has a larger share of the target's states"):
        cluster_vectors(U, concepts, concepts)
    with pytest.raises(ValueError, match="no concept has a larger share of the source's states"):
        cluster_vectors(U, concepts, torch.tensor([-1, -1]))
    with pytest.raises(ValueError, match="at least one state each"):
        cluster_vectors(U, concepts, concepts[:0])


# --- controls and lengths -------------------------------------------------------------------------------


def test_random_vector_has_the_norm_and_another_direction() -> None:
    vector = torch.linspace(-3, 5, 2000)
    state = torch.get_rng_state()
    first, again, other = (random_vector_like(vector, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    torch.testing.assert_close(first.norm(), vector.norm())
    # Random directions of 2,000 dimensions are orthogonal within a few times 1/√2000 ≈ 0.02.
    assert abs(cosine(first, vector)) < 0.1
    assert abs(cosine(first, other)) < 0.1
    assert (random_vector_like(torch.zeros(4), 0) == 0).all()


def test_random_vectors_of_concepts_have_a_norm_and_a_direction_each() -> None:
    vectors = noise(4, 2000) * torch.tensor([[1.0], [0.0], [5.0], [5.0]])
    drawn = random_vector_like(vectors, 0)
    torch.testing.assert_close(drawn.norm(dim=1), vectors.norm(dim=1))
    assert (drawn[1] == 0).all()
    assert abs(cosine(drawn[2], drawn[3])) < 0.1


def test_lengths() -> None:
    assert vector_length(torch.tensor([3.0, 4.0])) == 5
    by_concept = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 1.0]])
    assert vector_length(by_concept) == 5
    torch.testing.assert_close(with_length(by_concept, 1), by_concept / 5)
    torch.testing.assert_close(with_length(by_concept[0], 10), by_concept[0] * 2)
    with pytest.raises(ValueError, match="must not be zero"):
        with_length(torch.zeros(3), 1)


@pytest.mark.parametrize("make", [coarse_vector, principal_vector, probe_vector])
def test_shuffled_controls_differ_by_their_direction_alone(make: type) -> None:
    planted = normalize(noise(30, seed=3), dim=0)
    source = 3 * noise(100, 30)
    # So far apart that one state more on one side would decide the direction of a difference of means.
    target = source + 300 * planted + noise(100, 30, seed=1)
    real = make(target, source)
    assert cosine(real, planted) > 0.95
    length = vector_length(real)
    controls, lengths = shuffled_vectors(make, target, source, length, 4, seed=0)
    assert controls.shape == (4, 30)
    torch.testing.assert_close(controls.norm(dim=1), torch.full((4,), length))
    assert all(abs(cosine(control, real)) < 0.6 for control in controls)
    assert max(lengths) < length
    again, _ = shuffled_vectors(make, target, source, length, 2, seed=0)
    assert torch.equal(again, controls[:2])
    assert not torch.equal(shuffled_vectors(make, target, source, length, 1, seed=1)[0], controls[:1])


def test_a_shuffled_difference_of_means_is_one() -> None:
    """Of two states on either side there are two ways to deal them out in halves, and their opposites; all come."""
    target, source = torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.tensor([[0.0, 1.0], [5.0, 5.0]])
    controls, _ = shuffled_vectors(coarse_vector, target, source, 1.0, 40, seed=0)
    ways = set()
    for i in (0, 1):
        for j in (0, 1):
            difference = target[i] + source[j] - target[1 - i] - source[1 - j]
            ways.add(tuple(normalize(difference, dim=0).mul(1e4).round().int().tolist()))
    assert {tuple(control.mul(1e4).round().int().tolist()) for control in controls} == ways


def test_shuffled_concepts() -> None:
    target, source = torch.tensor([1, 1, 1, 2]), torch.tensor([0, 0, 3, 0])
    real = cluster_vectors(U, target, source)[0]
    controls, _ = shuffled_vectors(
        lambda one, other: cluster_vectors(U, one, other)[0], target, source, vector_length(real), 3, seed=0
    )
    assert controls.shape == (3, 5, 2)
    torch.testing.assert_close(controls.norm(dim=2).amax(dim=1), torch.full((3,), vector_length(real)))
    assert not torch.equal(controls[0], controls[1])


def test_shuffled_labels_that_make_no_vector() -> None:
    equal = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"shuffled labels: .*must not be zero.*; use more states, or `shuffled: 0`"):
        shuffled_vectors(coarse_vector, equal, equal, 1.0, 1, seed=0)


# --- artifact -------------------------------------------------------------------------------------------


def test_round_trip_is_exact(tmp_path: Path) -> None:
    path = tmp_path / "steer.safetensors"
    vectors = SteeringVectors(
        {"lm.block.1": noise(17), "lm.block.2": noise(5, 17)},
        {"lm.block.1": noise(2, 17), "lm.block.2": noise(3, 5, 17)},
        {"from": "yes", "to": "no"},
    )
    vectors.save(path)
    loaded = load_steering_vectors(path)
    torch.testing.assert_close((loaded.vectors, loaded.shuffled), (vectors.vectors, vectors.shuffled), rtol=0, atol=0)
    assert loaded.metadata == {"from": "yes", "to": "no"}
    SteeringVectors({"s": noise(3).bfloat16()}, {}, {}).save(path)
    assert load_steering_vectors(path).vectors["s"].dtype == torch.float32
    assert load_steering_vectors(path).shuffled == {}


def test_what_is_no_steering_vector(tmp_path: Path) -> None:
    good = {"s": torch.ones(4)}
    for vectors, shuffled, message in (
        ({}, {}, "at least one site, got none"),
        ({"s": torch.ones(0)}, {}, r"'s' must have the shape \[D\] or \[K, D\] and not be empty, got \[0\]"),
        ({"s": torch.ones(2, 0)}, {}, r"got \[2, 0\]"),
        ({"s": torch.ones(2, 3, 4)}, {}, r"got \[2, 3, 4\]"),
        ({"s": torch.tensor([1, torch.nan])}, {}, "the steering vector of s` must be finite"),
        (good, {"s": torch.full((1, 4), torch.inf)}, "the shuffled controls of s` must be finite"),
        (good, {"s": torch.ones(4)}, r"controls of 's' must be \[S, …\] of its vector, got \[4\] for \[4\]"),
        (good, {"s": torch.ones(0, 4)}, r"got \[0, 4\]"),
        (good, {"s": torch.ones(1, 2, 4)}, r"got \[1, 2, 4\]"),
        (good, {"t": torch.ones(1, 4)}, "for no vector"),
    ):
        with pytest.raises(ValueError, match=message):
            SteeringVectors(vectors, shuffled, {})
    path = tmp_path / "steer.safetensors"
    with pytest.raises(ValueError, match=r"nowhere\.safetensors must be an artifact file, but there is no such file"):
        load_steering_vectors(tmp_path / "nowhere.safetensors")
    save_artifact(path, "shift", good, {})
    with pytest.raises(ValueError, match="must hold the artifact 'steering_vectors', but it holds 'shift'"):
        load_steering_vectors(path)
    save_artifact(path, "steering_vectors", good, {})
    with pytest.raises(ValueError, match=r"steer\.safetensors is damaged: .*at least one site"):
        load_steering_vectors(path)
    SteeringVectors(good, {}, {}).save(path)
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"steer\.safetensors is damaged"):
        load_steering_vectors(path)
    with pytest.raises(ValueError, match="must be JSON"):
        SteeringVectors(good, {}, {"x": float("nan")}).save(path)


def test_bad_input() -> None:
    states = torch.ones(3, 4)
    for make in (coarse_vector, principal_vector, probe_vector):
        with pytest.raises(ValueError, match=r"`source` must hold at least one state"):
            make(states, states[:0])
        with pytest.raises(ValueError, match=r"`target` must hold at least one state"):
            make(states[:0], states)
        with pytest.raises(ValueError, match=r"the same width, got 4 and 3"):
            make(states, states[:, :3])
        with pytest.raises(ValueError, match=r"`source` must be finite, but 3 of 3 rows"):
            make(states, states / 0)
    for i, j in ((0, 3), (-1, 1), (1, 1)):
        with pytest.raises(ValueError, match=rf"two different concepts of 0 … 2, got {i} and {j}"):
            fine_vector(states, i, j)
    with pytest.raises(ValueError, match=r"`U` must be finite"):
        fine_vector(states / 0, 0, 1)
    with pytest.raises(ValueError, match=r"`vector` must be finite"):
        random_vector_like(states[0] / 0, 0)
    with pytest.raises(ValueError, match=r"shape \[D\] or \[K, D\], got \[1, 3, 4\]"):
        random_vector_like(states[None], 0)
