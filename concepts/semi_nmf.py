"""Semi-NMF dictionaries: non-negative, sparse activations of directions of norm at most one.

Notation: Z [N, D] features, U [K, D] dictionary, V [N, K] activations, Z ≈ V U, λ the L1 weight.
    G [K, K] = U Uᵀ   B [N, K] = Z Uᵀ   (all that the activations need of Z and U)
    A [K, K] = Vᵀ V   C [K, D] = Vᵀ Z   (all that the dictionary needs of Z and V)
Inside, Vt [K, N] and Bt [K, N] hold Vᵀ and Bᵀ, so that one coordinate of all samples is contiguous.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ._validation import check_at_least
from .dictionary import ConceptDictionary, Fitted, squared_norms

# The problem is not convex in (U, V): of a few short runs on a sample of the rows, the best is run to the end.
# Over 48 small problems, 4 starts ended above scikit-learn's objective in 4 of them, 8 in 1 and 12 in none.
_STARTS = 12
_START_ITERATIONS = 20
_START_ROWS_PER_CONCEPT = 100
# Passes over the coordinates within one alternation; more cost time and save few alternations.
_CODE_SWEEPS = 5
_DICTIONARY_SWEEPS = 3
# A row of `transform` is done when one more sweep moves its gradient by less than this share of max_k |b_k|.
_CODE_TOLERANCE = 1e-6
_MAX_CODE_SWEEPS = 10_000


class SemiNMF(ConceptDictionary):
    """Semi-NMF with sparse activations, the dictionary of CoX-LMM (arXiv 2406.08074, section 3).

    Minimises ½‖Z − VU‖²_F + λ‖V‖₁ subject to V ≥ 0 and ‖u_k‖₂ ≤ 1 by alternating exact coordinate descent on V
    and on the rows of U (Mairal et al., Online dictionary learning, 2010, algorithm 2). The objective never
    increases, up to float32 rounding. The paper prints the square without the ½ and λ = 1, which is λ = ½ here;
    its code (scikit-learn's DictionaryLearning) minimises the form above with λ = 1, the default.

    Args:
        n_concepts: number of concepts K.
        l1_weight: λ, in the units of the features; larger is sparser.
        seed: seed of the initial dictionary; the same seed gives the same dictionary.
        max_iterations: limit of the alternations.
        tolerance: stop when an alternation lowers the objective by less than this share of it.
    """

    def __init__(
        self,
        n_concepts: int = 20,
        l1_weight: float = 1.0,
        seed: int = 0,
        max_iterations: int = 1000,
        tolerance: float = 1e-7,
    ) -> None:
        super().__init__(n_concepts, seed)
        check_at_least(l1_weight, 0, "l1_weight")
        check_at_least(max_iterations, 1, "max_iterations")
        check_at_least(tolerance, 0, "tolerance")
        self.l1_weight = l1_weight
        self.max_iterations = max_iterations
        self.tolerance = tolerance

    def _fit(self, Z: Tensor) -> Fitted:
        descent = _Descent(Z, self._best_start(Z), self.l1_weight)
        descent.run(self.max_iterations, self.tolerance)
        return descent.U, tuple(descent.history), len(descent.history), descent.converged

    def _best_start(self, Z: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        rows = torch.randperm(len(Z), generator=generator)[: _START_ROWS_PER_CONCEPT * self.n_concepts]
        sample = Z[rows.to(Z.device)]
        starts = [
            _Descent(sample, _spread_rows(sample, self.n_concepts, generator), self.l1_weight) for _ in range(_STARTS)
        ]
        for start in starts:
            start.run(_START_ITERATIONS, self.tolerance)
        return min(starts, key=lambda start: start.history[-1]).U

    def _encode(self, Z: Tensor, U: Tensor) -> Tensor:
        return _solve_code(U @ Z.T, U @ U.T, self.l1_weight).T.contiguous()

    def _objective(self, Z: Tensor, U: Tensor, V: Tensor) -> float:
        return _objective(squared_norms(Z - V @ U), V, self.l1_weight)

    def _settings(self) -> dict[str, Any]:
        return {
            "n_concepts": self.n_concepts,
            "l1_weight": self.l1_weight,
            "seed": self.seed,
            "max_iterations": self.max_iterations,
            "tolerance": self.tolerance,
        }


class _Descent:
    """One descent from one initial dictionary, U [K, D], which it updates in place."""

    def __init__(self, Z: Tensor, U: Tensor, l1_weight: float) -> None:
        self.Z, self.U, self.l1_weight = Z, U, l1_weight
        self.Vt = Z.new_zeros(len(U), len(Z))
        self.history: list[float] = []
        self.converged = False

    def run(self, max_iterations: int, tolerance: float) -> None:
        """Alternate until an alternation gains less than the tolerance, or the limit is reached."""
        restarted = False
        while len(self.history) < max_iterations and not self.converged:
            self._update_code()
            _update_dictionary(self.U, self.Vt @ self.Vt.T, self.Vt @ self.Z)
            errors = squared_norms(self.Z - self.Vt.T @ self.U)
            self.history.append(_objective(errors, self.Vt, self.l1_weight))
            small = len(self.history) > 1 and (self.history[-2] - self.history[-1] <= tolerance * self.history[-2])
            # A restarted concept shows its gain in the next iteration; if that is small too, it has none.
            restarts = self._restart_dead(errors)
            self.converged = small and (restarted or not restarts)
            restarted = restarts

    def _update_code(self) -> None:
        G, Bt = self.U @ self.U.T, self.U @ self.Z.T
        for _ in range(_CODE_SWEEPS):
            _sweep_code(self.Vt, Bt, G, self.l1_weight)

    def _restart_dead(self, errors: Tensor) -> bool:
        """Point concepts that no row uses at the residuals of the worst rows; the objective does not change.

        The residual r of a row is what the other concepts leave of it, so the new concept lowers the objective
        by ½(‖r‖ − λ)² there as soon as V is solved again; if ‖r‖ ≤ λ, it stays dead.
        """
        dead = (self.Vt == 0).all(dim=1).nonzero().flatten().tolist()
        worst = errors.topk(len(dead)).indices.to(self.Z.device)
        residuals = self.Z[worst] - self.Vt[:, worst].T @ self.U
        for k, residual in zip(dead, residuals, strict=True):
            self.U[k] = normalize(residual, dim=0)
        return bool(dead)


def _objective(errors: Tensor, V: Tensor, l1_weight: float) -> float:
    # V ≥ 0, so its sum is its L1 norm.
    return 0.5 * float(errors.sum()) + l1_weight * float(V.sum(dim=0).cpu().double().sum())


def _spread_rows(Z: Tensor, n_rows: int, generator: torch.Generator) -> Tensor:
    """Directions of rows far apart, [K, D]: greedy k-means++ (Arthur and Vassilvitskii, 2007) on the sphere."""
    X = normalize(Z)
    distances = torch.full((len(X),), 4.0, dtype=torch.float64)  # squared; none on the sphere is larger
    chosen: list[int] = []
    for _ in range(n_rows):
        # Fewer distinct directions than concepts: repeat some; the copies die and are restarted.
        probabilities = distances if float(distances.sum()) > 0 else torch.ones_like(distances)
        candidates = torch.multinomial(probabilities, 4, replacement=True, generator=generator)
        to_candidates = (2 - 2 * (X @ X[candidates.to(X.device)].T)).clamp_min(0).cpu().double()
        reduced = torch.minimum(to_candidates, distances[:, None])
        best = int(reduced.sum(dim=0).argmin())
        distances = reduced[:, best]
        chosen.append(int(candidates[best]))
    return X[chosen]


def _sweep_code(Vt: Tensor, Bt: Tensor, G: Tensor, l1_weight: float) -> Tensor:
    """One pass of exact coordinate descent over the K activations of all rows, in place.

    Returns:
        The largest gradient that each row still had in a coordinate when it was updated, [N].
    """
    violation = Vt.new_zeros(Vt.shape[1])
    for k, curvature in enumerate(G.diagonal().tolist()):
        old = Vt[k].clone()
        if curvature == 0:
            Vt[k] = 0
            continue
        Vt[k] = (old + (Bt[k] - l1_weight - G[k] @ Vt) / curvature).clamp_min(0)
        violation = torch.maximum(violation, (Vt[k] - old).abs() * curvature)
    return violation


def _solve_code(Bt: Tensor, G: Tensor, l1_weight: float) -> Tensor:
    """Activations argmin_{V ≥ 0} ½‖Z − VU‖² + λ‖V‖₁ of each row, [K, N].

    Each row stops by its own criterion, so that its result does not depend on the rows it is solved with.
    """
    Vt = torch.zeros_like(Bt)
    allowed = _CODE_TOLERANCE * Bt.abs().amax(dim=0)
    rows = torch.arange(Bt.shape[1], device=Bt.device)
    for _ in range(_MAX_CODE_SWEEPS):
        if len(rows) == 0:
            break
        part = Vt[:, rows]
        violation = _sweep_code(part, Bt[:, rows], G, l1_weight)
        Vt[:, rows] = part
        rows = rows[violation > allowed[rows]]
    return Vt


def _update_dictionary(U: Tensor, A: Tensor, C: Tensor) -> None:
    """Exact block coordinate descent over the rows of U, projected on the unit ball, in place."""
    for _ in range(_DICTIONARY_SWEEPS):
        for k, usage in enumerate(A.diagonal().tolist()):
            if usage > 0:
                row = U[k] + (C[k] - A[k] @ U) / usage
                U[k] = row / row.norm().clamp_min(1)
