"""Which answers a steering vector leads to."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from conceptshift.concepts import DirectionSelection, select_direction


def select(*rises: int, top: int = 10) -> DirectionSelection:
    """Answers a, b, … rise by these numbers from 100."""
    names = "abcdefghijklmnop"[: len(rises)]
    after = {name: 100 + rise for name, rise in zip(names, rises, strict=True)}
    return select_direction(dict.fromkeys(names, 100), after, top)


def test_one_clear_target() -> None:
    found = select_direction({"yes": 500, "no": 300, "2": 50}, {"yes": 90, "no": 698, "2": 55, "red": 7, "cat": 0})
    # Rises 398, 7 and 5.
    assert found == DirectionSelection(("no",), 392.0, clear=True)


def test_several_targets() -> None:
    assert select(3, 90, 100, 1, -200) == DirectionSelection(("c", "b"), 93.0, clear=False)


def test_few_rises_and_none() -> None:
    nothing = DirectionSelection((), 0.0, clear=False)
    assert select_direction({}, {}) == select(0, -4, 0) == select() == nothing
    assert select_direction({"a": 3}, {}) == nothing
    assert select(-5, 12, 0) == DirectionSelection(("b",), 12.0, clear=True)
    assert select(4, 4, 0) == DirectionSelection(("a", "b"), 0.0, clear=False)
    assert select(9, 1) == DirectionSelection(("a",), 8.0, clear=True)


def test_ties() -> None:
    # By text, whatever the order in which they come.
    for order in itertools.permutations({"x": 5, "b": 5, "a": 1, "c": 5}.items()):
        assert select_direction({}, dict(order)) == DirectionSelection(("b", "c", "x"), 4.0, clear=False)
        assert select_direction({}, dict(order), top=2).targets == ("b", "c")
    # {3}, {2, 1} and {3, 2}, {1} are equally good: not clear.
    assert select(3, 2, 1) == DirectionSelection(("a", "b"), 1.5, clear=False)


def test_only_the_top_answers_count() -> None:
    many = [50, 40, *[1] * 8]
    assert not select(*many).clear
    assert select(*many, top=2) == DirectionSelection(("a",), 10.0, clear=True)
    assert select(*many, top=1) == DirectionSelection(("a",), 50.0, clear=True)
    with pytest.raises(ValueError, match="`top` must be at least 1"):
        select(1, top=0)


@pytest.mark.parametrize("seed", range(30))
def test_no_partition_is_better(seed: int) -> None:
    """All partitions in two, not only those of neighbours."""
    rng = np.random.default_rng(seed)
    rises = [int(rise) for rise in rng.integers(1, 60, size=7)]
    found = select(*rises)
    upper = {"abcdefg".index(name) for name in found.targets}

    def inertia(members: set[int]) -> float:
        parts = ([rises[i] for i in members], [rises[i] for i in range(7) if i not in members])
        return sum(float(np.var(part) * len(part)) for part in parts if part)

    best = min(inertia(set(part)) for size in range(1, 7) for part in itertools.combinations(range(7), size))
    assert inertia(upper) == pytest.approx(best)
    lower = [rises[i] for i in range(7) if i not in upper]
    assert found.gap == pytest.approx(np.mean([rises[i] for i in upper]) - np.mean(lower))
    assert min(rises[i] for i in upper) > max(lower)
