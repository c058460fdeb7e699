"""Directions that concepts have of their own, random ones to compare with, and the p-value."""

from __future__ import annotations

import pytest
import torch
from conceptshift.concepts.causal import empirical_p, own_directions, random_directions
from torch import Tensor
from torch.nn.functional import normalize


@pytest.fixture
def Z() -> Tensor:
    """Far from the origin, and spread over 3 of 12 dimensions."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(400, 3, generator=generator) * torch.tensor([4.0, 2.0, 1.0])
    return 20 * torch.eye(12)[0] + spread @ torch.eye(12)[3:6]


def without(states: Tensor, direction: Tensor) -> Tensor:
    return states - (states @ direction)[..., None] * direction


def test_removing_an_own_direction_leaves_the_mean_state(Z: Tensor) -> None:
    U = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    directions = own_directions(U, Z)
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(5))
    for direction in directions:
        mean = Z.mean(dim=0)
        torch.testing.assert_close(without(mean, direction), mean)
        # So it takes from a state only what makes it differ.
        torch.testing.assert_close(without(Z, direction) - mean, without(Z - mean, direction), rtol=1e-4, atol=1e-4)


def test_concepts_around_the_mean_have_the_direction_in_which_they_differ_from_it(Z: Tensor) -> None:
    """Centres share the mean; their direction is what they add to it, however long the mean is."""
    mean = Z.mean(dim=0)
    added = torch.randn(4, 12, generator=torch.Generator().manual_seed(2))
    added = without(added, normalize(mean, dim=0))
    for share in (0.0, 1.0, -3.0, 100.0):
        torch.testing.assert_close(own_directions(added + share * mean, Z), normalize(added), rtol=1e-4, atol=1e-4)


def test_a_concept_that_is_the_mean_has_none(Z: Tensor) -> None:
    mean = Z.mean(dim=0)
    U = torch.stack([mean, -0.3 * mean, torch.zeros(12), mean + torch.eye(12)[7]])
    directions = own_directions(U, Z)
    assert (directions[:3] == 0).all()
    assert float(directions[3].norm()) == pytest.approx(1)


def test_random_directions_vary_as_the_states_do(Z: Tensor) -> None:
    directions = random_directions(Z, 2000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(2000))
    # They stay where the states are, and leave the mean alone.
    assert float(directions[:, [*range(3), *range(6, 12)]].abs().max()) < 0.02
    assert float((directions @ Z.mean(dim=0)).abs().max()) < 1e-4
    energy = directions.square().mean(dim=0)[3:6]
    assert energy[0] > 2 * energy[1] > 4 * energy[2] > 0
    # An isotropic direction takes 1/12 of the variance, these take most of what one direction can.
    centred = Z - Z.mean(dim=0)
    taken = (centred @ directions.T).square().sum(dim=0).mean() / centred.square().sum()
    assert 0.5 < float(taken) < 16 / 21


def test_random_directions_follow_the_seed(Z: Tensor) -> None:
    first, again, other = (random_directions(Z, 5, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("U", "Z", "message"),
    [
        (torch.ones(2, 3), torch.ones(4, 5), "same width"),
        (torch.full((2, 3), torch.nan), torch.ones(4, 3), "`U` must be finite"),
    ],
)
def test_what_has_no_directions(U: Tensor, Z: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        own_directions(U, Z)


def test_no_random_direction() -> None:
    with pytest.raises(ValueError, match="`count` must be at least 1"):
        random_directions(torch.ones(4, 3), 0, torch.Generator())


def test_p_is_the_rank_among_chance() -> None:
    assert empirical_p(3.0, [1.0, 2.0, 2.5]) == pytest.approx(1 / 4)
    assert empirical_p(2.0, [1.0, 2.0, 2.5]) == pytest.approx(3 / 4)
    # Whichever of n + 1 alike values is the observed one, p is uniform.
    values = torch.randn(20, generator=torch.Generator().manual_seed(0)).tolist()
    ps = sorted(empirical_p(value, values[:at] + values[at + 1 :]) for at, value in enumerate(values))
    assert ps == pytest.approx([rank / 20 for rank in range(1, 21)])
