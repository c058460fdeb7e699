"""Where iterative fits begin: a few rows far apart, and the axes that hold most of a sample.

Notation: Z [N, D] features, X [N, D] rows to choose from.
"""

import torch
from torch import Tensor

_POWER_ITERATIONS = 3


def spread_rows(X: Tensor, n_rows: int, generator: torch.Generator) -> Tensor:
    """Rows far apart, [n_rows, D]: greedy k-means++ (Arthur and Vassilvitskii, 2007).

    Args:
        X: rows to choose from, [N, D]; normalise them to choose directions.
        n_rows: how many; where there are fewer distinct rows, some come several times.
        generator: on the CPU, so that the choice is the same for every device.
    """
    squares = X.square().sum(dim=1)
    distances = torch.full((len(X),), torch.inf, dtype=torch.float64)
    chosen: list[int] = []
    for _ in range(n_rows):
        # All alike for the first row, and where fewer distinct rows are left than wanted.
        weights = distances if 0 < float(distances.sum()) < torch.inf else torch.ones_like(distances)
        candidates = torch.multinomial(weights, 4, replacement=True, generator=generator)
        on_device = candidates.to(X.device)
        apart = squares[:, None] + squares[on_device] - 2 * X @ X[on_device].T
        reduced = torch.minimum(apart.clamp_min(0).cpu().double(), distances[:, None])
        best = int(reduced.sum(dim=0).argmin())
        distances = reduced[:, best]
        chosen.append(int(candidates[best]))
    return X[chosen]


def principal_axes(Z: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Orthonormal axes that hold most of ‖Z‖², [min(count, N, D), D], by a randomised range finder.

    Halko, Martinsson and Tropp, Finding structure with randomness, 2011, algorithm 4.4.

    Args:
        Z: rows, [N, D], not centred.
        count: number of axes.
        generator: on the CPU, so that the axes are the same for every device.
    """
    count = min(count, *Z.shape)
    if count == Z.shape[1]:
        return torch.eye(count, device=Z.device)
    Q = torch.randn(Z.shape[1], count, generator=generator).to(Z.device)
    for _ in range(_POWER_ITERATIONS):
        Q = torch.linalg.qr(Z.T @ (Z @ Q)).Q
    return Q.T
