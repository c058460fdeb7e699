"""Semi-NMF dictionaries: non-negative, sparse activations of directions of norm at most one.

Notation: Z [N, D] features, U [K, D] dictionary, V [N, K] activations, Z ≈ V U, λ the L1 weight.
    G [K, K] = U Uᵀ   B [N, K] = Z Uᵀ   (all that the activations need of Z and U)
    A [K, K] = Vᵀ V   C [K, D] = Vᵀ Z   (all that the dictionary needs of Z and V)
Inside, Vt [S, K, N] and Bt hold Vᵀ and Bᵀ of S descents at a time, so that one coordinate of all samples is contiguous.
A and C are sums over rows: shards and processes add theirs up.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ._validation import check_at_least
from .dictionary import ConceptDictionary, Fitted
from .rows import Rows, squared_norms
from .starts import principal_axes, spread_rows

# The problem is not convex in (U, V): of many short descents on a few rows, the best go on on more rows, and the best
# of these on all. All but the last stay within the leading axes of the rows, which hold nearly all that a dictionary
# can explain, and where a product costs next to nothing.
_STARTS = 8  # of each kind
_START_ITERATIONS = 50
_FINALISTS = 4
# Small problems are fitted on all their rows and axes at every stage.
_START_ROWS = (1000, 50)  # at least, and per concept
_FINAL_ROWS = (1000, 500)
_AXES = (128, 4)
# Passes over the coordinates, and steps of the dictionary, within one alternation. Concepts that share a large mean
# need them; more cost time and save few alternations.
_SWEEPS = 6
_DICTIONARY_STEPS = 20
# Alternations between two looks at the objective, which make a GPU wait for its host.
_CHECK_EVERY = 10
# A row of `transform` is done when one more sweep moves its gradient by less than this share of max_k |b_k|.
_CODE_TOLERANCE = 1e-6
_MAX_CODE_SWEEPS = 10_000


class SemiNMF(ConceptDictionary):
    """Semi-NMF with sparse activations, the dictionary of CoX-LMM (arXiv 2406.08074, section 3).

    Minimises ½‖Z − VU‖²_F + λ‖V‖₁ subject to V ≥ 0 and ‖u_k‖₂ ≤ 1 by alternating coordinate descent on V and
    accelerated projected gradient steps on U, from extrapolated dictionaries (Ang and Gillis, Accelerating nonnegative
    matrix factorization algorithms using extrapolation, 2019). A step that does not lower the objective is taken back,
    so it never increases. The problem is not convex: the dictionary is the best of several descents. The paper prints
    the square without the ½ and λ = 1, which is λ = ½ here; its code (scikit-learn's DictionaryLearning) minimises the
    form above with λ = 1, the default.

    Args:
        n_concepts: number of concepts K.
        l1_weight: λ, in the units of the features; larger is sparser.
        seed: seed of the initial dictionary; the same seed gives the same dictionary.
        max_iterations: limit of the alternations, of those within the leading axes and of those on all features.
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

    def _check(self, rows: Rows) -> None:
        if rows.longest <= self.l1_weight:
            raise ValueError(
                f"`l1_weight` = {self.l1_weight:g} leaves every activation at zero, because the longest row of `Z` has "
                f"the norm {rows.longest:g}: choose a smaller one"
            )

    def _fit(self, rows: Rows) -> Fitted:
        start, before = self._best_start(rows)
        start, before = rows.agreed(start.contiguous()), rows.agreed(before.contiguous())
        descent = _Descent(rows, start[None], self.l1_weight)
        descent.run(self.max_iterations, self.tolerance)
        # The last stage computes in another precision.
        history = torch.cat([before, torch.stack(descent.history)[:, 0]]).cummin(dim=0).values.tolist()
        return Fitted({"dictionary": descent.U[0].float()}, history, len(history), descent.converged)

    def _best_start(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """The best of several descents on a sample, the same on every process.

        Returns:
            The dictionary [K, D], and the objective after each of its iterations where the sample is all rows.
        """
        K, generator = self.n_concepts, torch.Generator().manual_seed(self.seed)
        sample = rows.sample(_size(_FINAL_ROWS, K), generator)
        axes = principal_axes(sample, _size(_AXES, K), generator)
        # Features share a large mean as a rule, which makes the problem ill-conditioned; here float64 is cheap.
        within = (sample @ axes.T).double()
        few = within[: _size(_START_ROWS, K)]
        short = _Descent(Rows(few, dtype=few.dtype), _starts(few, K, generator), self.l1_weight)
        short.run(min(_START_ITERATIONS, self.max_iterations), self.tolerance)
        best = short.U[short.E.argsort()[:_FINALISTS]]
        final = _Descent(Rows(within, dtype=within.dtype), best, self.l1_weight)
        final.run(self.max_iterations, self.tolerance)
        winner = final.E.argmin()
        # What lies outside the axes, no dictionary within them explains.
        outside = 0.5 * (rows.squares - float(squared_norms(within).sum()))
        history = torch.stack(final.history)[:, winner] + outside
        return final.U[winner] @ axes.double(), history if len(sample) == rows.n else history[:0]

    def _encode(self, Z: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        U = tensors["dictionary"]
        return solve_code(U @ Z.T, U @ U.T, self.l1_weight).T.contiguous()

    def _loss(self, errors: Tensor, V: Tensor) -> float:
        # V ≥ 0, so its sum is its L1 norm.
        return 0.5 * float(errors.sum()) + self.l1_weight * float(V.sum(dtype=torch.float64))

    def _settings(self) -> dict[str, Any]:
        return {
            "n_concepts": self.n_concepts,
            "l1_weight": self.l1_weight,
            "seed": self.seed,
            "max_iterations": self.max_iterations,
            "tolerance": self.tolerance,
        }


def _size(least_and_share: tuple[int, int], n_concepts: int) -> int:
    least, per_concept = least_and_share
    return max(least, per_concept * n_concepts)


def _starts(Z: Tensor, n_concepts: int, generator: torch.Generator) -> Tensor:
    """Initial dictionaries [S, K, D]: rows far apart suit clustered features, random directions suit spread ones."""
    rows = [spread_rows(normalize(Z), n_concepts, generator) for _ in range(_STARTS)]
    directions = torch.randn(_STARTS, n_concepts, Z.shape[1], generator=generator, dtype=torch.float64).to(Z)
    return torch.cat([torch.stack(rows), normalize(directions, dim=2)])


class _Descent:
    """S descents at a time, from S initial dictionaries [S, K, D], on the same rows.

    Products with the rows are in the rows' precision; all that is as small as a dictionary is in float64, so that the
    objective tells steps apart that gain little.

    Attributes:
        U: the best dictionaries so far [S, K, D].
        E: their objectives [S], float64.
        history: E after each alternation.
        converged: whether all have stopped to improve.
    """

    def __init__(self, rows: Rows, U: Tensor, l1_weight: float) -> None:
        self.rows, self.l1_weight = rows, l1_weight
        self.U = self._point = U.double()
        # Exact from the start: a good dictionary must not be changed for the sake of bad activations.
        X = U.to(rows.dtype)
        self._Vts = [torch.stack([solve_code(u @ Z.T, u @ u.T, l1_weight) for u in X]) for Z in rows]
        self.E = torch.full_like(self.U[:, 0, 0], torch.inf)
        self.history: list[Tensor] = []
        self.converged = False
        # How far a step goes on in the direction of the last, and the most that has proved safe.
        self._momentum = torch.full_like(self.E, 0.5)
        self._limit = torch.ones_like(self.E)
        # The first step and that after one that was taken back are plain: these cannot fail.
        self._momentum_is_safe = torch.zeros_like(self.E, dtype=torch.bool)

    def run(self, max_iterations: int, tolerance: float) -> None:
        """Alternate until an alternation gains less than the tolerance on average, or the limit is reached."""
        restarted = False
        while len(self.history) < max_iterations and not self.converged:
            before, count = self.E, min(_CHECK_EVERY, max_iterations - len(self.history))
            for _ in range(count):
                self._alternate()
            small = bool(((before - self.E <= count * tolerance * before) & before.isfinite()).all())
            # A restarted concept shows its gain in the next iterations; if that is small too, it has none.
            restarts = self._restart_dead()
            self.converged = small and (restarted or not restarts)
            restarted = restarts

    def _alternate(self) -> None:
        """One step from the extrapolated point, kept where it lowers the objective; nothing waits for the host."""
        X = self._point.to(self.rows.dtype)
        G = X @ X.mT
        A, C = torch.zeros_like(G, dtype=torch.float64), torch.zeros_like(self.U)
        l1 = torch.zeros_like(self.E)
        Vts = []
        for Z, Vt in zip(self.rows, self._Vts, strict=True):
            Vt, Bt = Vt.clone(), X @ Z.T
            for _ in range(_SWEEPS):
                sweep_code(Vt, Bt, G, self.l1_weight)
            A += Vt.double() @ Vt.double().mT
            C += Vt @ Z
            l1 += Vt.sum(dim=(1, 2), dtype=torch.float64)
            Vts.append(Vt)
        A, C, l1 = self.rows.sums(A, C, l1)
        U = update_dictionary(self._point, A, C, self._momentum_is_safe)
        # ½‖Z‖² − ⟨C, U⟩ + ½⟨A, U Uᵀ⟩ + λ Σ V: the objective without another pass over the rows.
        fitted = (C * U).sum(dim=(1, 2)) - 0.5 * (A * (U @ U.mT)).sum(dim=(1, 2))
        self._accept(U, Vts, 0.5 * self.rows.squares - fitted + self.l1_weight * l1)

    def _accept(self, U: Tensor, Vts: list[Tensor], E: Tensor) -> None:
        better = self._momentum_is_safe = E < self.E
        step = self._momentum.where(better, 0)[:, None, None]
        best = U.where(better[:, None, None], self.U)
        self._point = _to_ball(best + step * (best - self.U))
        self.U = best
        self._Vts = [new.where(better[:, None, None], old) for new, old in zip(Vts, self._Vts, strict=True)]
        self.E = E.minimum(self.E)
        self.history.append(self.E)
        # The schedule of Ang and Gillis: on while it helps, back at once where it does not.
        self._limit = torch.where(better, (1.01 * self._limit).clamp(max=1), self._momentum)
        self._momentum = torch.where(better, self._limit.minimum(1.05 * self._momentum), self._momentum / 1.5)

    def _restart_dead(self) -> bool:
        """Point concepts that no row uses at the residuals of the worst rows; the objective does not change.

        The residual r of a row is what the other concepts leave of it, so the new concept lowers the objective
        by ½(‖r‖ − λ)² there as soon as V is solved again; if ‖r‖ ≤ λ, it stays dead.
        """
        used = torch.stack([(Vt > 0).any(dim=2) for Vt in self._Vts]).any(dim=0).float()
        (used,) = self.rows.sums(used)
        dead = (used == 0).nonzero().tolist()
        if not dead:
            return False
        self.U = self.U.clone()
        for s in {s for s, _ in dead}:
            concepts = [k for which, k in dead if which == s]
            self.U[s, concepts] = normalize(self._worst_residuals(s, len(concepts)).double())
        self._point = self.U
        return True

    def _worst_residuals(self, s: int, count: int) -> Tensor:
        """The `count` longest rows of Z − VU, [count, D]; repeated where there are fewer rows."""
        worst = self.U.new_zeros(0, self.rows.width, dtype=self.rows.dtype)
        for Z, Vt in zip(self.rows, self._Vts, strict=True):
            found = torch.cat([worst, Z - Vt[s].T @ self.U[s].to(Z)])
            worst = found[squared_norms(found).topk(min(count, len(found))).indices]
        worst = self.rows.gather(worst)
        order = squared_norms(worst).argsort(descending=True, stable=True)
        return worst[order.repeat(count)[:count]]


def _to_ball(U: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(U, dim=-1, keepdim=True)
    return U / lengths.clamp_min(1)


def _inverse(diagonal: Tensor) -> Tensor:
    """1/x, and 0 where x is 0."""
    return torch.where(diagonal > 0, 1 / diagonal, 0)


def sweep_code(Vt: Tensor, Bt: Tensor, G: Tensor, l1_weight: float) -> None:
    """One pass of exact coordinate descent over the K activations of all rows, in place.

    Args:
        Vt: activations [S, K, N].
        Bt: U Zᵀ [S, K, N].
        G: U Uᵀ [S, K, K]; activations of a concept of length 0 become 0.
        l1_weight: λ.
    """
    inverse = _inverse(G.diagonal(dim1=1, dim2=2))
    # (b_k − λ − Σ_l≠k g_kl v_l) / g_kk as one product with a matrix whose diagonal is empty.
    others = G * inverse[:, :, None]
    others.diagonal(dim1=1, dim2=2).zero_()
    target = (Bt - l1_weight) * inverse[:, :, None]
    for k in range(Vt.shape[1]):
        Vt[:, k] = (target[:, k] - (others[:, k : k + 1] @ Vt)[:, 0]).clamp_min_(0)


def solve_code(Bt: Tensor, G: Tensor, l1_weight: float) -> Tensor:
    """Activations argmin_{V ≥ 0} ½‖Z − VU‖² + λ‖V‖₁ of each row, [K, N].

    Each row stops by its own criterion, so that its result does not depend on the rows it is solved with.
    """
    Vt = torch.zeros_like(Bt)
    curvature = G.diagonal()[:, None]
    allowed = _CODE_TOLERANCE * Bt.abs().amax(dim=0)
    rows = torch.arange(Bt.shape[1], device=Bt.device)
    for _ in range(_MAX_CODE_SWEEPS):
        if len(rows) == 0:
            break
        old = Vt[:, rows]
        new = old[None].clone()
        sweep_code(new, Bt[None, :, rows], G[None], l1_weight)
        Vt[:, rows] = new[0]
        # The largest gradient that a row still had in a coordinate when it was updated.
        violation = ((new[0] - old).abs() * curvature).amax(dim=0)
        rows = rows[violation > allowed[rows]]
    return Vt


def update_dictionary(U: Tensor, A: Tensor, C: Tensor, accelerated: Tensor) -> Tensor:
    """Projected gradient steps on the rows of U within the unit ball (Beck and Teboulle, FISTA, 2009).

    The step of row k is 1 / Σ_l a_kl, which majorises A because V ≥ 0. All iterates are combinations P of the 2K rows
    M = [U; C], so that a step needs only P and M Mᵀ: the width D is passed twice, whatever the number of steps.

    Args:
        U: dictionaries [S, K, D].
        A: Vᵀ V [S, K, K]; a concept that nothing uses stays as it is.
        C: Vᵀ Z [S, K, D].
        accelerated: whether to use momentum [S]; without it, no step raises the objective.

    Returns:
        The new dictionaries [S, K, D].
    """
    K = U.shape[1]
    M = torch.cat([U, C], dim=1)
    products, momentum = M @ M.mT, accelerated.to(U)[:, None, None]
    steps = _inverse(A.sum(dim=2))[:, :, None]
    A = A * steps
    target = torch.cat([torch.zeros_like(A), torch.diag_embed(steps[:, :, 0])], dim=2)
    P = Y = torch.eye(K, 2 * K, dtype=U.dtype, device=U.device).expand(len(U), K, 2 * K)
    t = 1.0
    for _ in range(_DICTIONARY_STEPS):
        new = Y + target - A @ Y
        new = new * torch.linalg.vecdot(new @ products, new).clamp_min(1).rsqrt()[:, :, None]
        t, before = (1 + (1 + 4 * t * t) ** 0.5) / 2, t
        Y = new + momentum * ((before - 1) / t) * (new - P)
        P = new
    return P @ M
