"""KMeans dictionaries: a concept is the centre of a cluster.

Notation: Z [N, D] features, U [K, D] centres, V [N, K] activations, v_k = 1 / (1 + ‖z − u_k‖).
"""

from typing import Any

import torch
from torch import Tensor

from .dictionary import Fitted
from .rows import Rows, squared_norms
from .simple import Prototypes
from .starts import principal_axes, spread_rows

# Within the leading axes of a sample, a run costs next to nothing.
_STARTS = 32
_START_ITERATIONS = 100
_START_ROWS_PER_CONCEPT = 500
_START_AXES_PER_CONCEPT = 8
_MAX_ITERATIONS = 300
# The centres rest when their squared moves sum to less than this share of the mean variance of a coordinate.
_TOLERANCE = 1e-6


class KMeans(Prototypes):
    """Centres of clusters as concepts; the dictionary of the shift analysis (arXiv 2501.03012, section 3.1).

    Lloyd's algorithm from the best of several k-means++ starts. The objective is the inertia Σ_n min_k ‖z_n − u_k‖². A
    sample is reconstructed by its nearest centre.

    Args:
        n_concepts: number of concepts K.
        seed: seed of the initial centres; the same seed gives the same centres.
    """

    def __init__(self, n_concepts: int = 20, seed: int = 0) -> None:
        super().__init__(n_concepts, seed)

    def _fit(self, rows: Rows) -> Fitted:
        start = rows.agreed(self._best_start(rows).contiguous())
        U, history, converged = _lloyd(rows, start, _MAX_ITERATIONS)
        return Fitted({"dictionary": U}, history, len(history), converged)

    def _best_start(self, rows: Rows) -> Tensor:
        """The best of several short runs on a sample, [K, D]; every process finds the same."""
        generator = torch.Generator().manual_seed(self.seed)
        sample = rows.sample(_START_ROWS_PER_CONCEPT * self.n_concepts, generator)
        mean = sample.mean(dim=0)
        axes = principal_axes(sample - mean, _START_AXES_PER_CONCEPT * self.n_concepts, generator)
        within = Rows((sample - mean) @ axes.T)
        runs = []
        for _ in range(_STARTS):
            (X,) = within
            U, history, _ = _lloyd(within, spread_rows(X, self.n_concepts, generator), _START_ITERATIONS)
            runs.append((history[-1], U))
        return min(runs, key=lambda run: run[0])[1] @ axes + mean

    def _settings(self) -> dict[str, Any]:
        return {"n_concepts": self.n_concepts, "seed": self.seed}


def _lloyd(rows: Rows, U: Tensor, max_iterations: int) -> tuple[Tensor, list[float], bool]:
    """Centres [K, D], inertia before each move, and whether the centres came to rest."""
    mean = rows.mean.to(U)
    history: list[float] = []
    for _ in range(max_iterations):
        sums, counts, inertia, farthest = _clusters(rows, U, mean)
        history.append(inertia)
        moved = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], U)
        empty = (counts == 0).nonzero().flatten()
        # A centre without rows goes to a row that is badly served.
        moved[empty] = farthest[: len(empty)]
        step = float(squared_norms(moved - U).sum())
        U = moved
        if step <= _TOLERANCE * inertia / (rows.n * rows.width) and not len(empty):
            return U, history, True
    return U, history, False


def _clusters(rows: Rows, U: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, float, Tensor]:
    """Sums [K, D] and counts [K] of the clusters, the inertia, and the K rows farthest from their centres [K, D]."""
    sums, counts = torch.zeros_like(U), U.new_zeros(len(U))
    inertia = torch.zeros((), dtype=torch.float64, device=U.device)
    far, apart = U.new_zeros(0, U.shape[1]), U.new_zeros(0)
    for Z in rows:
        # ‖z − u‖² without the part that all centres share: a large common mean would cost the small differences.
        offsets = U - mean
        scores = Z @ offsets.T - ((U + mean) * offsets).sum(dim=1) / 2
        nearest = scores.argmax(dim=1)
        members = torch.nn.functional.one_hot(nearest, len(U)).to(Z)
        sums += members.T @ Z
        counts += members.sum(dim=0)
        distances = squared_norms(Z - U[nearest])
        inertia += distances.sum()
        found, apart = torch.cat([far, Z]), torch.cat([apart, distances.to(apart)])
        top = apart.topk(min(len(U), len(apart))).indices
        far, apart = found[top], apart[top]
    sums, counts, inertia = rows.sums(sums, counts, inertia)
    if rows.distributed:
        far, apart = rows.gather(far), rows.gather(apart)
        far = far[apart.argsort(descending=True, stable=True)]
    return sums, counts, float(inertia), far
