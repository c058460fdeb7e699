"""Matching of the concepts of two dictionaries, and how far several of them agree.

Notation: U_a [K_a, D] and U_b [K_b, D] dictionaries.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import normalize

from ._precision import full_precision
from ._validation import as_rows, check_same_width


@full_precision
def match_concepts(U_a: Tensor, U_b: Tensor, method: Literal["bijective", "nearest"] = "bijective") -> Tensor:
    """For each concept of one dictionary, its counterpart in another (arXiv 2501.03012, section 3.1).

    Args:
        U_a: concepts to match, [K_a, D].
        U_b: concepts to match them with, [K_b, D].
        method: "bijective" gives every concept another counterpart, with the least total cost 1 − cosine
            (Hungarian algorithm); "nearest" gives each the one of largest cosine, however often. A concept of
            norm 0 has cosine 0 with all.

    Returns:
        Indices of rows of `U_b`, [K_a], int64, on the device of `U_a`.

    Raises:
        ValueError: if the widths differ, a matrix is not finite, `U_b` has no concept or, for "bijective", fewer
            than `U_a`, or the method is unknown.
    """
    U_a, U_b = as_rows(U_a, "U_a"), as_rows(U_b, "U_b")
    check_same_width(U_a, U_b, ("U_a", "U_b"))
    if method not in ("bijective", "nearest"):
        raise ValueError(f"`method` must be 'bijective' or 'nearest', got '{method}'")
    if len(U_b) < (len(U_a) if method == "bijective" else 1):
        raise ValueError(
            f"a {method} matching of the {len(U_a)} concepts of `U_a` needs more than the {len(U_b)} of `U_b`: "
            "fit both with the same `n_concepts` or, with fewer in `U_b`, use method 'nearest'"
        )
    cosine = normalize(U_a) @ normalize(U_b).to(U_a.device).T
    if method == "nearest":
        return cosine.argmax(dim=1)
    _, columns = linear_sum_assignment(1 - cosine.cpu().double().numpy())
    return torch.from_numpy(columns).long().to(U_a.device)


@full_precision
def stability(dictionaries: Sequence[Tensor]) -> Tensor:
    """How well each concept of a dictionary is found again in others, such as those of other seeds.

    Args:
        dictionaries: M ≥ 2 dictionaries, [K, D] each.

    Returns:
        For each concept of the first dictionary, the mean over the others of its cosine with its bijective match
        there, [K], float32; 1 where all have the same concept.

    Raises:
        ValueError: if there are fewer than two, their shapes differ, or one is not finite.
    """
    shapes = [list(U.shape) for U in dictionaries]
    if len(shapes) < 2 or shapes.count(shapes[0]) < len(shapes):
        raise ValueError(f"`dictionaries` must be two or more of one shape, got {shapes}: fit all alike")
    first, *others = (normalize(as_rows(U, "dictionaries")) for U in dictionaries)
    cosines = [(first * other.to(first.device)[match_concepts(first, other)]).sum(dim=1) for other in others]
    return torch.stack(cosines).mean(dim=0)
