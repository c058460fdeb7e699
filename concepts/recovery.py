"""Whether shifted concepts are the concepts of the destination model.

Notation: U_a [K, D] concepts of the original model, U_s [K, D] the same after their shift, U_b [K_b, D]
concepts of the destination model; m(k) the counterpart of concept k in U_b; T the words of a concept.
Paper: Analyzing Fine-tuning Representation Shift (arXiv 2501.03012), section 3.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ._precision import full_precision
from ._validation import as_rows
from .matching import match_concepts


@dataclass(frozen=True, eq=False)
class Recovery:
    """How near the original and the shifted concepts are to their counterparts in the destination model.

    Attributes:
        matching: m(k), [K], int64; found with the original concepts and used for both.
        empty: concepts without a shift, [K], bool; they count in no mean.
        recovery_original: T-Overlap of u_k^a with its counterpart, percent, [K].
        recovery_shifted: T-Overlap of u_k^s with the same counterpart, percent, [K].
        cosine_original: cos(u_k^a, u_m(k)^b), [K].
        cosine_shifted: cos(u_k^s, u_m(k)^b), [K].
        l2_original: ‖u_k^a − u_m(k)^b‖, [K].
        l2_shifted: ‖u_k^s − u_m(k)^b‖, [K].
    """

    matching: Tensor
    empty: Tensor
    recovery_original: Tensor
    recovery_shifted: Tensor
    cosine_original: Tensor
    cosine_shifted: Tensor
    l2_original: Tensor
    l2_shifted: Tensor

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

    @property
    def matched_cosine_gain(self) -> float:
        """Mean of `delta_cosine` over the concepts that are not empty."""
        return float(self.delta_cosine[~self.empty].mean())

    def means(self) -> dict[str, float]:
        """Mean of every measure over the concepts that are not empty, by name."""
        names = (
            "recovery_original",
            "recovery_shifted",
            "cosine_original",
            "cosine_shifted",
            "l2_original",
            "l2_shifted",
            "delta_cosine",
            "delta_cosine_normalised",
            "delta_l2",
            "delta_l2_normalised",
        )
        return {name: float(getattr(self, name)[~self.empty].mean()) for name in names}


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator > 0, numerator / denominator.where(denominator > 0, 1), 0)


def t_overlap(words: Collection[str], target: Collection[str]) -> float:
    """T-Overlap of two groundings, 100 · |T ∩ T'| / |T|; not symmetric.

    Args:
        words: T, the words of the concept that is judged; repeated words count once.
        target: T', the words of its counterpart.

    Returns:
        Share of the words that the counterpart has too, percent; 0 if there are no words.
    """
    distinct = set(words)
    return 100 * len(distinct & set(target)) / len(distinct) if distinct else 0.0


@full_precision
def recovery(
    U_a: Tensor,
    U_shifted: Tensor,
    U_b: Tensor,
    words_a: Sequence[Collection[str]],
    words_shifted: Sequence[Collection[str]],
    words_b: Sequence[Collection[str]],
    empty: Tensor,
) -> Recovery:
    """Compare shifted and original concepts with their bijective counterparts in the destination model.

    Args:
        U_a: concepts of the original model, [K, D].
        U_shifted: the same concepts after their shift, [K, D].
        U_b: concepts of the destination model, [K_b, D], K_b ≥ K.
        words_a: words of each original concept, K collections.
        words_shifted: words of each shifted concept, K collections.
        words_b: words of each destination concept, K_b collections.
        empty: concepts without a shift, [K], bool (`ConceptShift.empty`).

    Returns:
        The measures of each concept, and their means.

    Raises:
        ValueError: if shapes or numbers of words do not fit together, a matrix is not finite, or every concept is
            empty.
    """
    matching = match_concepts(U_a, U_b)
    a, s, b = as_rows(U_a, "U_a"), as_rows(U_shifted, "U_shifted"), as_rows(U_b, "U_b")
    _check(a, s, empty)
    for name, words, U in (("a", words_a, a), ("shifted", words_shifted, s), ("b", words_b, b)):
        if len(words) != len(U):
            raise ValueError(f"`words_{name}` must have {len(U)} entries, one for each concept, got {len(words)}")
    target = b.to(a.device)[matching]
    s = s.to(a.device)
    target_words = [words_b[m] for m in matching.tolist()]
    return Recovery(
        matching=matching,
        empty=empty.to(a.device),
        recovery_original=torch.tensor(list(map(t_overlap, words_a, target_words)), device=a.device),
        recovery_shifted=torch.tensor(list(map(t_overlap, words_shifted, target_words)), device=a.device),
        cosine_original=cosine_similarity(a, target),
        cosine_shifted=cosine_similarity(s, target),
        l2_original=(a - target).norm(dim=1),
        l2_shifted=(s - target).norm(dim=1),
    )


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
