"""Whether shifted concepts are the concepts of the destination model.

Notation: U_a [K, D] concepts of the original model, U_s [K, D] the same after their shift, U_b [K_b, D]
concepts of the destination model; m(k) the counterpart of concept k in U_b; T the words of a concept, or its pictures.
Paper: Analyzing Fine-tuning Representation Shift (arXiv 2501.03012), section 3.
"""

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ._precision import full_precision
from ._validation import as_rows
from .intervals import mean_intervals
from .matching import match_concepts

_T = TypeVar("_T", covariant=True)


class Groundings(NamedTuple, Generic[_T]):
    """What concepts are grounded in: the words of each, or the pictures that activate it most.

    Attributes:
        original: of each original concept, K collections.
        shifted: of each shifted concept, K collections.
        destination: of each destination concept, K_b collections.
    """

    original: Sequence[_T]
    shifted: Sequence[_T]
    destination: Sequence[_T]


@dataclass(frozen=True, eq=False)
class Recovery:
    """How near the original and the shifted concepts are to their counterparts in the destination model.

    Attributes:
        matching: m(k), [K], int64; found with the original concepts and used for both.
        empty: concepts without a shift, [K], bool; they count in no mean.
        recovery_original: T-Overlap of the words of u_k^a with those of its counterpart, percent, [K].
        recovery_shifted: T-Overlap of the words of u_k^s with those of the same counterpart, percent, [K].
        cosine_original: cos(u_k^a, u_m(k)^b), [K].
        cosine_shifted: cos(u_k^s, u_m(k)^b), [K].
        l2_original: ‖u_k^a − u_m(k)^b‖, [K].
        l2_shifted: ‖u_k^s − u_m(k)^b‖, [K].
        image_recovery_original: as `recovery_original`, of pictures; None without pictures.
        image_recovery_shifted: as `recovery_shifted`, of pictures; None without pictures.
    """

    matching: Tensor
    empty: Tensor
    recovery_original: Tensor
    recovery_shifted: Tensor
    cosine_original: Tensor
    cosine_shifted: Tensor
    l2_original: Tensor
    l2_shifted: Tensor
    image_recovery_original: Tensor | None = None
    image_recovery_shifted: Tensor | None = None

    @property
    def recovery_gain(self) -> Tensor:
        """Gain of recovery by the shift, shifted − original, percentage points, [K]."""
        return self.recovery_shifted - self.recovery_original

    @property
    def image_recovery_gain(self) -> Tensor | None:
        """The same gain of pictures, [K]; None without pictures."""
        if self.image_recovery_original is None or self.image_recovery_shifted is None:
            return None
        return self.image_recovery_shifted - self.image_recovery_original

    @property
    def delta_cosine(self) -> Tensor:
        """Gain of cosine, shifted − original, [K]; positive is nearer."""
        return self.cosine_shifted - self.cosine_original

    @property
    def delta_l2(self) -> Tensor:
        """Fall of distance, original − shifted, [K]; positive is nearer."""
        return self.l2_original - self.l2_shifted

    @property
    def delta_cosine_normalised(self) -> Tensor:
        """`delta_cosine` over |original|, [K]; 0 where the original is 0."""
        return _ratio(self.delta_cosine, self.cosine_original.abs())

    @property
    def delta_l2_normalised(self) -> Tensor:
        """`delta_l2` over the original, [K]: 1 is a full recovery; 0 where the original is 0."""
        return _ratio(self.delta_l2, self.l2_original)

    def means(self) -> dict[str, float]:
        """Mean of every measure over the concepts that are not empty, by name."""
        return {name: float(values.double().mean()) for name, values in self._measures().items()}

    def intervals(self, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> dict[str, tuple[float, float]]:
        """Percentile bootstrap intervals of `means` over the concepts: how much hangs on which concepts there are.

        Args:
            level: coverage.
            resamples: how often the concepts are drawn with replacement.
            seed: seed of the draws.

        Returns:
            Lower and upper end by name; no width with a single concept.

        Raises:
            ValueError: if `level` does not lie between 0 and 1, or `resamples` is below 1.
        """
        measures = self._measures()
        ends = mean_intervals(torch.stack(list(measures.values()), dim=1), level, resamples, seed).tolist()
        return {name: (low, high) for name, (low, high) in zip(measures, ends, strict=True)}

    def _measures(self) -> dict[str, Tensor]:
        """Values of every measure for the concepts that are not empty."""
        names = (
            "recovery_original",
            "recovery_shifted",
            "recovery_gain",
            "image_recovery_original",
            "image_recovery_shifted",
            "image_recovery_gain",
            "cosine_original",
            "cosine_shifted",
            "delta_cosine",
            "delta_cosine_normalised",
            "l2_original",
            "l2_shifted",
            "delta_l2",
            "delta_l2_normalised",
        )
        found = {name: getattr(self, name) for name in names}
        return {name: values[~self.empty] for name, values in found.items() if values is not None}


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator > 0, numerator / denominator.where(denominator > 0, 1), 0)


def t_overlap(grounding: Collection[Hashable], target: Collection[Hashable]) -> float:
    """T-Overlap of two groundings, 100 · |T ∩ T'| / |T|; not symmetric.

    Defined for words; the overlap of pictures is the same share.

    Args:
        grounding: T, words or pictures of the concept that is judged; repeated ones count once.
        target: T', those of its counterpart.

    Returns:
        Share of T that the counterpart has too, percent; 0 if T is empty.
    """
    distinct = set(grounding)
    return 100 * len(distinct & set(target)) / len(distinct) if distinct else 0.0


@full_precision
def recovery(
    U_a: Tensor,
    U_shifted: Tensor,
    U_b: Tensor,
    empty: Tensor,
    words: Groundings[Collection[Hashable]],
    images: Groundings[Collection[Hashable]] | None = None,
    method: Literal["bijective", "nearest"] = "bijective",
) -> Recovery:
    """Compare shifted and original concepts with their counterparts in the destination model.

    Args:
        U_a: concepts of the original model, [K, D].
        U_shifted: the same concepts after their shift, [K, D].
        U_b: concepts of the destination model, [K_b, D]; K_b ≥ K for "bijective".
        empty: concepts without a shift, [K], bool (`ConceptShift.empty`).
        words: words of all concepts.
        images: pictures of all concepts.
        method: how counterparts are found, see `match_concepts`.

    Returns:
        The measures of each concept, and their means.

    Raises:
        ValueError: if shapes or numbers of groundings do not fit together, a matrix is not finite, every concept is
            empty, or the method is unknown.
    """
    matching = match_concepts(U_a, U_b, method)
    a, s, b = as_rows(U_a, "U_a"), as_rows(U_shifted, "U_shifted"), as_rows(U_b, "U_b")
    _check(a, s, empty)
    target, s = b.to(a.device)[matching], s.to(a.device)
    recovery_original, recovery_shifted = _overlaps(words, matching, len(b), "words")
    image_recovery = (None, None) if images is None else _overlaps(images, matching, len(b), "images")
    return Recovery(
        matching=matching,
        empty=empty.to(a.device),
        recovery_original=recovery_original,
        recovery_shifted=recovery_shifted,
        cosine_original=cosine_similarity(a, target),
        cosine_shifted=cosine_similarity(s, target),
        l2_original=(a - target).norm(dim=1),
        l2_shifted=(s - target).norm(dim=1),
        image_recovery_original=image_recovery[0],
        image_recovery_shifted=image_recovery[1],
    )


def _overlaps(
    found: Groundings[Collection[Hashable]], matching: Tensor, n_destination: int, name: str
) -> tuple[Tensor, Tensor]:
    """T-Overlap of the original and of the shifted concepts with their counterparts, [K] each."""
    for part, n in (("original", len(matching)), ("shifted", len(matching)), ("destination", n_destination)):
        if len(getattr(found, part)) != n:
            raise ValueError(
                f"`{name}.{part}` must have {n} entries, one for each concept, got {len(getattr(found, part))}"
            )
    target = [found.destination[m] for m in matching.tolist()]
    overlaps = (list(map(t_overlap, own, target)) for own in (found.original, found.shifted))
    original, shifted = (torch.tensor(values, device=matching.device) for values in overlaps)
    return original, shifted


def _check(a: Tensor, s: Tensor, empty: Tensor) -> None:
    if s.shape != a.shape:
        raise ValueError(f"`U_shifted` must have the shape of `U_a`, {list(a.shape)}, got {list(s.shape)}")
    if empty.dtype != torch.bool or empty.shape != (len(a),):
        raise ValueError(
            f"`empty` must be a bool tensor [{len(a)}], one value for each concept, "
            f"got {empty.dtype} {list(empty.shape)}: pass `ConceptShift.empty`"
        )
    if bool(empty.all()):
        raise ValueError(f"`empty` must leave a concept to compare, but all {len(a)} are empty: pair more samples")
