"""Scores of what concepts are grounded in."""

from collections.abc import Sequence


def concept_overlap(words: Sequence[Sequence[str]]) -> float:
    """Return how far concepts share their words: 0 when none is shared, 1 when all concepts have the same.

    Overlap = 1/(K(K-1)) Σ_k Σ_{l≠k} |T_k ∩ T_l| / |T_k|, the overlap of CoX-LMM (arXiv 2406.08074,
    section 4). Lower is better. A word counts once per concept, as it is spelled.

    Args:
        words: T_1..T_K, the words of each concept. A concept without words contributes 0 as T_k, and
            shares nothing as T_l. Without a pair (K < 2) nothing can be shared.

    Returns:
        The overlap, in 0..1.
    """
    T = [set(concept) for concept in words]
    K = len(T)
    if K < 2:
        return 0.0
    shared = sum(len(T[k] & T[other]) / len(T[k]) for k in range(K) if T[k] for other in range(K) if other != k)
    return shared / (K * (K - 1))
