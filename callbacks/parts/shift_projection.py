"""Shifts of samples on the two axes that hold most of them.

Notation: M paired samples, K concepts, D hidden size; δ_m [D] shift of a sample, Δ_k [D] shift of a concept.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from .shift_measure import LEVEL

_Array = NDArray[np.float64]
# Of orthogonal iteration: two axes and some besides them, and how often.
_BLOCK, _ITERATIONS = 16, 16


def project_shifts(
    delta: Tensor,
    assignment: Tensor,
    vectors: Tensor,
    samples: Tensor | None = None,
    limit: int = 2000,
    seed: int = 0,
) -> tuple[_Array, NDArray[np.int64], _Array, tuple[float, float]]:
    """Project shifts on the two axes that hold most of them.

    The axes are those of the uncentred second moment Σ δ δᵀ: centred, as in PCA, the shift that all samples have in
    common would vanish, and 0 would no longer be "did not move". Each axis points where its largest coordinate is
    positive. They are found by orthogonal iteration, so that neither D × D nor M × M numbers are held.

    Args:
        delta: δ, [M, D], M ≥ 1.
        assignment: Concept of each sample, [M], int64.
        vectors: Δ, [K, D].
        samples: Number of the sample that each row is of, [M]; by default each row is one. Several rows of one sample
            count as one in the ellipses.
        limit: Most samples to return: evenly, as many of each concept as it has in all.
        seed: Seed of the iteration's start.

    Returns:
        Points of samples, [M', 2]; concept of each, [M']; of each concept, [K, 3, 2], Δ and the two half axes of its
        95 % confidence ellipse; share of Σ ‖δ‖² on each axis.
    """
    delta = delta.detach().float()
    axes = _leading_axes(delta, seed)
    points = (delta @ axes).cpu().double()
    total = float(torch.linalg.vector_norm(delta, dim=1).cpu().double().square().sum())
    first, second = (points.square().sum(dim=0) / total).tolist() if total else (0.0, 0.0)
    assignment = assignment.cpu()
    order = assignment.argsort(stable=True)
    count = min(limit, len(order))
    chosen = order[torch.arange(count) * len(order) // max(1, count)]
    tips = (vectors.detach().to(delta) @ axes).cpu().double().numpy()
    numbers = np.arange(len(points)) if samples is None else samples.cpu().numpy()
    members = (assignment.numpy() == k for k in range(len(tips)))
    halves = [half_axes(points.numpy()[of], numbers[of]) for of in members]
    arrows = np.concatenate([tips[:, None], np.stack(halves)], axis=1)
    return points[chosen].numpy(), assignment[chosen].numpy(), arrows, (first, second)


def half_axes(points: _Array, samples: NDArray[np.int64]) -> _Array:
    """Half axes of the ellipse around a mean in which the true mean lies, 95 times in 100 (Hotelling's T²).

    Args:
        points: δ of one concept on two axes, [m, 2].
        samples: Number of the sample that each is of, [m]; the points of one are averaged first.

    Returns:
        The longer one last, [2, 2]; 0 of fewer than three samples, which have no spread in two directions.
    """
    _, own = np.unique(samples, return_inverse=True)
    n = len(np.bincount(own))
    if n < 3:
        return np.zeros((2, 2))
    means = np.stack([np.bincount(own, of) for of in points.T], axis=1) / np.bincount(own)[:, None]
    variances, directions = np.linalg.eigh(np.cov(means.T) / n)
    radius = 2 * (n - 1) / (n - 2) * stats.f.ppf(LEVEL, 2, n - 2)
    halves: _Array = np.sqrt(radius * variances.clip(0))[:, None] * directions.T
    return halves


def _leading_axes(delta: Tensor, seed: int) -> Tensor:
    """The two leading right singular vectors, [D, 2]; of one dimension or sample, the second is 0."""
    M, D = delta.shape
    block = min(M, D, _BLOCK)
    start = torch.randn(D, block, generator=torch.Generator().manual_seed(seed)).to(delta)
    basis = torch.linalg.qr(start)[0]
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(delta.T @ (delta @ basis))[0]
    projected = delta @ basis
    # The eigenvalues ascend.
    vectors = torch.linalg.eigh((projected.T @ projected).cpu().double())[1].flip(1)[:, :2]
    axes = basis @ vectors.to(basis)
    axes = axes * axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
    return torch.nn.functional.pad(axes, (0, 2 - axes.shape[1]))
