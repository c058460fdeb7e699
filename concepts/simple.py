"""Dictionaries of rows as they are: the baseline of CoX-LMM.

Notation: Z [N, D] features, U [K, D] prototypes, V [N, K] activations, v_k = 1 / (1 + ‖z − u_k‖).
"""

from typing import Any

import torch
from torch import Tensor

from .dictionary import ConceptDictionary, Fitted
from .rows import Rows, squared_norms


class Prototypes(ConceptDictionary):
    """Base of the dictionaries whose concepts lie among the states; a sample is reconstructed by the nearest."""

    def _encode(self, Z: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        # The expanded square loses the small distances, which are the ones that matter here.
        return 1 / (1 + torch.cdist(Z, tensors["dictionary"], compute_mode="donot_use_mm_for_euclid_dist"))

    def _settings(self) -> dict[str, Any]:
        return {"n_concepts": self.n_concepts}

    def _code(self, V: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(V.argmax(dim=1), self.n_concepts).to(V)


class Simple(Prototypes):
    """The K rows with the largest norm as concepts, a baseline of CoX-LMM (arXiv 2406.08074, section 4).

    Equal rows count once. Nothing is random and nothing is minimised; the objective is Σ_n min_k ‖z_n − u_k‖².

    Args:
        n_concepts: number of concepts K.
    """

    def __init__(self, n_concepts: int = 20) -> None:
        super().__init__(n_concepts)

    def _fit(self, rows: Rows) -> Fitted:
        longest = torch.zeros(0, rows.width, device=rows.device)
        for Z in rows:
            longest = _longest(torch.cat([longest, Z]), self.n_concepts)
        return Fitted({"dictionary": _longest(rows.gather(longest), self.n_concepts)})


def _longest(Z: Tensor, count: int) -> Tensor:
    """The `count` distinct rows with the largest norm, longest first, the earlier of equally long ones first."""
    chosen: list[Tensor] = []
    for number in squared_norms(Z).argsort(descending=True, stable=True).tolist():
        if len(chosen) == count:
            break
        if not any(torch.equal(Z[number], other) for other in chosen):
            chosen.append(Z[number])
    return torch.stack(chosen) if chosen else Z
