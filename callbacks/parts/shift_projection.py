"""Shifts of samples on the two axes that hold most of them.

Notation: M paired samples, K concepts, D hidden size; δ_m [D] shift of a sample, Δ_k [D] shift of a concept.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_Array = NDArray[np.float64]
# Of orthogonal iteration: two axes and some besides them, and how often.
_BLOCK, _ITERATIONS = 16, 16


def project_shifts(
    delta: Tensor, assignment: Tensor, vectors: Tensor, limit: int = 2000, seed: int = 0
) -> tuple[_Array, NDArray[np.int64], _Array, tuple[float, float]]:
    """Project shifts on the two axes that hold most of them.

    The axes are those of the uncentred second moment Σ δ δᵀ: centred, as in PCA, the shift that all samples have in
    common would vanish, and 0 would no longer be "did not move". Each axis points where its largest coordinate is
    positive. They are found by orthogonal iteration, so that neither D × D nor M × M numbers are held.

    Args:
        delta: δ, [M, D], M ≥ 1.
        assignment: Concept of each sample, [M], int64.
        vectors: Δ, [K, D].
        limit: Most samples to return: evenly, as many of each concept as it has in all.
        seed: Seed of the iteration's start.

    Returns:
        Points of samples, [M', 2]; concept of each, [M']; arrows of concepts, [K, 2]; share of Σ ‖δ‖² on each axis.
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
    arrows = (vectors.detach().to(delta) @ axes).cpu().double()
    return points[chosen].numpy(), assignment[chosen].numpy(), arrows.numpy(), (first, second)


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
