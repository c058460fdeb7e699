"""Matching of dictionaries against brute force."""

from itertools import permutations
from typing import Literal

import pytest
import torch
from conceptshift.concepts import match_concepts, stability
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


def _dictionaries(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    base = torch.randn(6, 20, generator=generator)
    return [base + 0.3 * number * torch.randn(6, 20, generator=generator) for number in range(count)]


def test_stability_is_the_mean_cosine_with_the_matches() -> None:
    first, *others = _dictionaries(4)
    cosine = torch.nn.functional.cosine_similarity
    expected = torch.stack([cosine(first, other[match_concepts(first, other)]) for other in others]).mean(dim=0)
    torch.testing.assert_close(stability([first, *others]), expected)
    assert (expected < 0.99).all()
    assert (expected > 0.5).all()
    torch.testing.assert_close(stability([first, first * 3]), torch.ones(6))


def test_stability_does_not_depend_on_the_order_of_concepts() -> None:
    first, *others = _dictionaries(4)
    found = stability([first, *others])
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(stability([first, *(other[order] for other in others)]), found)
    torch.testing.assert_close(stability([first, *others[::-1]]), found)
    torch.testing.assert_close(stability([first[order], *others]), found[order])


def test_a_concept_that_no_other_has_is_not_stable() -> None:
    first, second = torch.eye(3), torch.eye(3)[[1, 0, 2]].clone()
    second[2] = -second[2]
    assert stability([first, second]).tolist() == [1, 1, -1]
    assert stability([torch.eye(3), torch.zeros(3, 3)]).tolist() == [0, 0, 0]


def test_stability_of_unlike_dictionaries() -> None:
    for dictionaries in ([], [torch.eye(3)], [torch.eye(3), torch.eye(3)[:2]], [torch.eye(3), torch.eye(3)[:, :2]]):
        with pytest.raises(ValueError, match="two or more of one shape"):
            stability(dictionaries)
