"""Whether concepts cause what they stand for: which directions to remove from states, and the test against chance.

Notation: Z [N, D] states, μ [D] their mean, U [K, D] dictionary, d [D] direction of length 1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ._precision import full_precision
from ._validation import as_rows, check_same_width, check_whole

# What is left of a multiple of μ by rounding, as a share of its length.
_ROUNDING = 1e-4


@full_precision
def own_directions(U: Tensor, Z: Tensor) -> Tensor:
    """The direction of each concept that is not in all states: its part orthogonal to their mean.

    States of one dictionary have much in common (all predict the same word, say), and concepts hold it too: centres
    of KMeans and rows of Simple lie around μ, and Semi-NMF has no other place for μ than its concepts. Removing u_k
    itself would remove this common part, and show what it is for rather than what the concept is for. A direction
    orthogonal to μ takes the same from f as from f − μ, so removing it leaves μ as it is.

    Args:
        U: concepts, [K, D].
        Z: states that they were learned from, [N, D].

    Returns:
        Directions of length 1, [K, D], float32; 0 for a concept that is a multiple of μ.

    Raises:
        ValueError: if a matrix is not finite, or the widths differ.
    """
    U, Z = as_rows(U, "U").double(), as_rows(Z, "Z")
    check_same_width(U, Z, ("U", "Z"))
    mean = normalize(Z.mean(dim=0, dtype=torch.float64), dim=0)
    rest = U - (U @ mean)[:, None] * mean
    lost = rest.norm(dim=1) <= _ROUNDING * U.norm(dim=1)
    return normalize(rest.masked_fill(lost[:, None], 0)).float()


@full_precision
def random_directions(Z: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Random directions as the states vary: normal with their covariance, and like concepts orthogonal to their mean.

    A direction drawn uniformly from all is no fair comparison: it takes 1/D of the squared length of a state, next
    to nothing, and any direction in which states do differ would beat it.

    Args:
        Z: states, [N, D].
        count: how many.
        generator: of random numbers, on the CPU.

    Returns:
        Directions of length 1, [count, D], float32.

    Raises:
        ValueError: if `Z` is no finite matrix, or `count` is below 1.
    """
    check_whole(count, 1, "count")
    Z = as_rows(Z, "Z")
    weights = torch.randn(count, len(Z), generator=generator, dtype=torch.float32)
    # Weights that sum to 0 leave out the mean of the states.
    directions: Tensor = own_directions((weights - weights.mean(dim=1, keepdim=True)).to(Z) @ Z, Z)
    return directions


def empirical_p(observed: float, null: Sequence[float]) -> float:
    """Share of chance values at least as large as the observed one, which counts itself; at least 1 / (1 + n).

    Args:
        observed: what was measured.
        null: n values under chance.
    """
    return (1 + sum(value >= observed for value in null)) / (1 + len(null))
