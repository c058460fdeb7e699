"""Which answers a steering vector leads to, from how often each was given without and with it."""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from ._validation import check_whole


@dataclass(frozen=True)
class DirectionSelection:
    """What a steering vector steers to.

    Attributes:
        targets: answers whose counts rose by far the most, largest rise first; ties by their text.
        gap: by how many answers their mean rise exceeds that of the other risen answers.
        clear: whether there is exactly one.
    """

    targets: tuple[str, ...]
    gap: float
    clear: bool


def select_direction(before: Mapping[str, int], after: Mapping[str, int], top: int = 10) -> DirectionSelection:
    """Find the answers whose counts rose most by 2-means on the rises (arXiv 2501.03012, section 4).

    The best split of the sorted rises is the exact solution in one dimension. Equal rises stay together; of equally
    good splits the one with more targets counts, so that none is clear by chance.

    Args:
        before: answer → how often it was given without the vector, normalised (`metrics.answer_counts`).
        after: answer → how often it was given with it.
        top: of how many answers, those that rose most.

    Returns:
        The answers of the upper cluster. Where one answer rose, it is the clear target, and the gap is its rise; where
        several rose alike, they are all targets with the gap 0; where none rose, there is no target.

    Raises:
        ValueError: if `top` is less than 1.
    """
    check_whole(top, 1, "top")
    rises = {answer: after[answer] - before.get(answer, 0) for answer in after}
    risen = sorted((answer for answer in rises if rises[answer] > 0), key=lambda answer: (-rises[answer], answer))[:top]
    values = [rises[answer] for answer in risen]
    upper = _upper(values)
    return DirectionSelection(tuple(risen[:upper]), _gap(values, upper), clear=upper == 1)


def _upper(values: list[int]) -> int:
    """Size of the upper cluster of values in descending order."""
    splits = [size for size in range(1, len(values)) if values[size - 1] > values[size]]
    return max(splits, key=lambda size: (_between(values, size), size), default=len(values))


def _between(values: list[int], size: int) -> Fraction:
    """The scatter between two clusters times the number of values; largest where that within them is least."""
    upper, lower, rest = sum(values[:size]), sum(values[size:]), len(values) - size
    return Fraction((upper * rest - lower * size) ** 2, size * rest)


def _gap(values: list[int], upper: int) -> float:
    if len(values) == upper:
        # One answer alone is compared with all that did not rise.
        return float(values[0]) if upper == 1 else 0.0
    return sum(values[:upper]) / upper - sum(values[upper:]) / (len(values) - upper)
