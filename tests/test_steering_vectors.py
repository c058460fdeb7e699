"""Steering vectors: their sign, their controls, their artifact."""

from pathlib import Path

import pytest
import torch
from conceptshift.concepts import (
    coarse_vector,
    fine_vector,
    load_steering_vector,
    random_vector_like,
    save_steering_vector,
)


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


def test_random_vector_has_the_norm_and_another_direction() -> None:
    vector = torch.linspace(-3, 5, 2000)
    state = torch.get_rng_state()
    first, again, other = (random_vector_like(vector, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    torch.testing.assert_close(first.norm(), vector.norm())
    cosine = torch.nn.functional.cosine_similarity
    # Random directions of 2,000 dimensions are orthogonal within a few times 1/√2000 ≈ 0.02.
    assert abs(float(cosine(first, vector, dim=0))) < 0.1
    assert abs(float(cosine(first, other, dim=0))) < 0.1
    assert (random_vector_like(torch.zeros(4), 0) == 0).all()


def test_round_trip_is_exact(tmp_path: Path) -> None:
    vector = torch.randn(17, generator=torch.Generator().manual_seed(0))
    save_steering_vector(tmp_path / "steer.safetensors", vector, {"from": "yes", "to": "no"})
    loaded, metadata = load_steering_vector(tmp_path / "steer.safetensors")
    assert torch.equal(loaded, vector)
    assert metadata == {"from": "yes", "to": "no"}


def test_bad_input(tmp_path: Path) -> None:
    states = torch.ones(3, 4)
    with pytest.raises(ValueError, match=r"`source` must hold at least one state"):
        coarse_vector(states, states[:0])
    with pytest.raises(ValueError, match=r"`target` must hold at least one state"):
        coarse_vector(states[:0], states)
    with pytest.raises(ValueError, match=r"the same width, got 4 and 3"):
        coarse_vector(states, states[:, :3])
    with pytest.raises(ValueError, match=r"`source` must be finite, but 3 of 3 rows"):
        coarse_vector(states, states / 0)
    for i, j in ((0, 3), (-1, 1), (1, 1)):
        with pytest.raises(ValueError, match=rf"two different concepts of 0 … 2, got {i} and {j}"):
            fine_vector(states, i, j)
    with pytest.raises(ValueError, match=r"`U` must be finite"):
        fine_vector(states / 0, 0, 1)
    with pytest.raises(ValueError, match=r"`vector` must be finite"):
        random_vector_like(states[0] / 0, 0)
    with pytest.raises(ValueError, match=r"one dimension, got the shape \[3, 4\]"):
        save_steering_vector(tmp_path / "steer.safetensors", states, {})
    assert not list(tmp_path.iterdir())
