"""What a fit of a concept dictionary reports."""

from dataclasses import dataclass


@dataclass(frozen=True)
class FitReport:
    """How a dictionary was fitted; every method fills the same fields.

    Attributes:
        objective_history: value of the method's objective after each iteration; the last value belongs to the
            final dictionary with its final activations.
        iterations: number of iterations run.
        converged: whether the fit stopped by its tolerance, not by its limit of iterations.
        explained_variance: 1 − ‖Z − VU‖² / ‖Z − mean‖² on the fitted rows, at most 1.
        l0: mean number of concepts that reconstruct a row (1 for hard assignment).
        dead_concepts: number of concepts that reconstruct no row.
    """

    objective_history: tuple[float, ...]
    iterations: int
    converged: bool
    explained_variance: float
    l0: float
    dead_concepts: int

    @property
    def objective(self) -> float:
        """The final value of the objective."""
        return self.objective_history[-1]
