"""KMeans dictionaries: a concept is the centre of a cluster.

Notation: Z [N, D] features, U [K, D] centres, V [N, K] activations, v_k = 1 / (1 + ‖z − u_k‖).
"""

from typing import Any

import torch
from sklearn import cluster
from torch import Tensor

from .dictionary import ConceptDictionary, Fitted, squared_norms


class KMeans(ConceptDictionary):
    """Centres of clusters as concepts; the dictionary of the shift analysis (arXiv 2501.03012, section 3.1).

    The objective is the inertia Σ_n min_k ‖z_n − u_k‖². A sample is reconstructed by its nearest centre.

    Args:
        n_concepts: number of concepts K.
        seed: seed of the initial centres; the same seed gives the same centres.
    """

    def __init__(self, n_concepts: int = 20, seed: int = 0) -> None:
        super().__init__(n_concepts, seed)

    def _fit(self, Z: Tensor) -> Fitted:
        model = cluster.KMeans(n_clusters=self.n_concepts, random_state=self.seed, n_init="auto")
        model.fit(Z.cpu().numpy())
        U = torch.from_numpy(model.cluster_centers_).to(Z)
        return U, (), int(model.n_iter_), bool(model.n_iter_ < model.max_iter)

    def _encode(self, Z: Tensor, U: Tensor) -> Tensor:
        # The expanded square loses the small distances, which are the ones that matter here.
        return 1 / (1 + torch.cdist(Z, U, compute_mode="donot_use_mm_for_euclid_dist"))

    def _objective(self, Z: Tensor, U: Tensor, V: Tensor) -> float:
        return float(squared_norms(Z - U[V.argmax(dim=1)]).sum())

    def _settings(self) -> dict[str, Any]:
        return {"n_concepts": self.n_concepts, "seed": self.seed}

    def _code(self, V: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(V.argmax(dim=1), self.n_concepts).to(V)
