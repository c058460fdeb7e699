"""Matching of dictionaries against brute force."""

from itertools import permutations
from typing import Literal

import pytest
import torch
from conceptshift.concepts import match_concepts
from torch.nn.functional import normalize


@pytest.mark.parametrize(("seed", "K_b"), [(0, 4), (1, 4), (2, 5), (3, 6)])
def test_bijective_matching_is_the_cheapest(seed: int, K_b: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    U_a = torch.randn(4, 3, generator=generator) * 5
    U_b = torch.randn(K_b, 3, generator=generator)
    cost = (1 - normalize(U_a.double()) @ normalize(U_b.double()).T).tolist()
    best = min(permutations(range(K_b), 4), key=lambda columns: sum(cost[k][columns[k]] for k in range(4)))
    matching = match_concepts(U_a, U_b)
    assert matching.dtype == torch.int64
    assert tuple(matching.tolist()) == best


def test_permuted_and_scaled_dictionary_is_matched_back() -> None:
    U = torch.randn(12, 30, generator=torch.Generator().manual_seed(4))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(5))
    scale = torch.linspace(0.1, 50, 12)[:, None]
    for method in ("bijective", "nearest"):
        matching = match_concepts(U, (U * scale)[order], "bijective" if method == "bijective" else "nearest")
        assert torch.equal(order[matching], torch.arange(12))


def test_nearest_may_repeat_where_bijective_may_not() -> None:
    U_a = torch.tensor([[1.0, 0.0], [1.0, 0.1]])
    U_b = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    assert match_concepts(U_a, U_b, "nearest").tolist() == [1, 1]
    assert match_concepts(U_a, U_b, "bijective").tolist() == [1, 0]


def test_zero_concept_is_indifferent() -> None:
    U_a = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    assert match_concepts(U_a, torch.eye(2)).tolist() == [0, 1]


def test_numbers_of_concepts() -> None:
    small, large = torch.eye(3)[:2], torch.eye(3)
    assert match_concepts(small, large).tolist() == [0, 1]
    assert match_concepts(large[:2], small, "nearest").tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"bijective matching of the 3 concepts of `U_a` .* the 2 of `U_b`"):
        match_concepts(large, small)
    with pytest.raises(ValueError, match=r"nearest matching"):
        match_concepts(large, large[:0], "nearest")


@pytest.mark.parametrize("method", ["bijective", "nearest"])
def test_bad_dictionaries(method: Literal["bijective", "nearest"]) -> None:
    with pytest.raises(ValueError, match=r"`U_a` and `U_b` must have the same width, got 3 and 2"):
        match_concepts(torch.eye(3), torch.eye(3)[:, :2], method)
    with pytest.raises(ValueError, match=r"`U_b` must be finite, but 1 of 3 rows"):
        match_concepts(torch.eye(3), torch.tensor([[1.0], [torch.nan], [0.0]]).expand(3, 3), method)


def test_bad_method() -> None:
    with pytest.raises(ValueError, match=r"'bijective' or 'nearest', got 'hungarian'"):
        match_concepts(torch.eye(2), torch.eye(2), "hungarian")  # type: ignore[arg-type]
