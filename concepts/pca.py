"""PCA dictionaries: the axes along which the features vary most.

Notation: Z [N, D] features, μ [D] their mean, U [K, D] orthonormal axes, V [N, K] = (Z − μ) Uᵀ, signed.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh
from scipy.sparse.linalg import eigsh
from torch import Tensor

from .dictionary import ConceptDictionary, Fitted
from .rows import Rows

# Beyond this share of all axes, the dense solver is faster than Lanczos.
_FEW = 0.25


class PCA(ConceptDictionary):
    """Principal axes as concepts, a baseline of CoX-LMM (arXiv 2406.08074, section 4).

    Activations are signed coordinates of the centred features. Each axis points where its largest coordinate is
    positive. The objective is Σ_n ‖z_n − μ − U ᵀ v_n‖². Nothing is random.

    Args:
        n_concepts: number of concepts K, at most the width and one less than the rows.
    """

    signed = True

    def __init__(self, n_concepts: int = 20) -> None:
        super().__init__(n_concepts)

    def _check(self, rows: Rows) -> None:
        most = min(rows.n - 1, rows.width)
        if self.n_concepts > most:
            raise ValueError(
                f"`n_concepts` = {self.n_concepts} is more than the {most} axes that {rows.n} rows of width "
                f"{rows.width} have: use fewer concepts"
            )

        if self.n_concepts == 1 and not rows.distinct(2):
            raise ValueError("`Z` must vary, but all its rows are equal: do the samples differ at this site?")

    def _fit(self, rows: Rows) -> Fitted:
        mean = rows.mean.float()
        scatter = torch.zeros(rows.width, rows.width, device=rows.device, dtype=torch.float64)
        for Z in rows:
            centred = Z - mean
            scatter += centred.T @ centred
        (scatter,) = rows.sums(scatter)
        axes = torch.from_numpy(_leading(scatter.cpu().numpy(), self.n_concepts)).float().to(rows.device)
        largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
        return Fitted({"dictionary": axes * largest.sign(), "mean": mean})

    def _encode(self, Z: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        return (Z - tensors["mean"]) @ tensors["dictionary"].T

    def _decode(self, V: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        return V @ tensors["dictionary"] + tensors["mean"]

    def _settings(self) -> dict[str, Any]:
        return {"n_concepts": self.n_concepts}


def _leading(scatter: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Eigenvectors of the largest eigenvalues, largest first, [count, D]."""
    D = len(scatter)
    if count > _FEW * D:
        vectors = eigh(scatter, subset_by_index=[D - count, D - 1])[1]
    else:
        # A fixed start: Lanczos would draw one.
        vectors = eigsh(scatter, k=count, v0=np.random.default_rng(0).normal(size=D))[1]
    leading: NDArray[np.float64] = vectors[:, ::-1].T.copy()
    return leading
