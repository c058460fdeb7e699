"""The overlap of concepts, worked by hand."""

import pytest
from conceptshift.metrics import concept_overlap


def test_overlap_by_hand() -> None:
    # Shares of the first concept: 1/2 and 0; of the second 1/4 and 2/4; of the third 0 and 2/2.
    words = [["dog", "puppy"], ["dog", "cat", "red", "blue"], ["red", "blue"]]
    assert concept_overlap(words) == pytest.approx((1 / 2 + 0 + 1 / 4 + 2 / 4 + 0 + 2 / 2) / 6)
    assert concept_overlap(words[::-1]) == pytest.approx(concept_overlap(words))


def test_overlap_is_not_symmetric_in_sizes() -> None:
    assert concept_overlap([["a"], ["a", "b", "c", "d"]]) == pytest.approx((1 + 1 / 4) / 2)


def test_overlap_extremes() -> None:
    assert concept_overlap([["a", "b"]] * 5) == 1.0
    assert concept_overlap([["a"], ["b"], ["c"]]) == 0.0
    assert concept_overlap([["a", "b"]]) == 0.0
    assert concept_overlap([]) == 0.0


def test_wordless_concept_contributes_nothing() -> None:
    assert concept_overlap([[], []]) == 0.0
    # Two of six ordered pairs share everything.
    assert concept_overlap([["a"], [], ["a"]]) == pytest.approx(2 / 6)


def test_repeated_word_counts_once() -> None:
    assert concept_overlap([["a", "a", "b"], ["a"]]) == pytest.approx((1 / 2 + 1) / 2)
