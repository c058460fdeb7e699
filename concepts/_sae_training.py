"""Training of the overcomplete library's sparse autoencoders on rows that are read shard by shard.

Notation: Z [N, D] features, μ [D] their mean, σ the root mean square of z − μ over coordinates, X = (Z − μ) / σ.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ._overcomplete import library
from .rows import Rows, squared_norms


class Batches:
    """Standardised rows X in batches of one size, in another order within each shard every time.

    Args:
        rows: the rows.
        size: rows of a batch; those that do not fill one are left out.
        generator: of the order, on the CPU.

    Attributes:
        size: as given, at most N.
        mean: μ, float32.
        scale: σ.
    """

    def __init__(self, rows: Rows, size: int, generator: torch.Generator) -> None:
        self.rows = rows
        self.size = min(size, rows.n)
        self.mean = rows.mean.float()
        squares = sum(float(squared_norms(Z - self.mean).sum()) for Z in rows)
        # Equal rows have no spread, and need none.
        self.scale = (squares / (rows.n * rows.width)) ** 0.5 or 1.0
        self._generator = generator

    def standardised(self, Z: Tensor) -> Tensor:
        """X of rows [n, D]."""
        return (Z - self.mean) / self.scale

    def __iter__(self) -> Iterator[Tensor]:
        left = self.mean.new_zeros(0, self.rows.width)
        for Z in self.rows:
            order = torch.randperm(len(Z), generator=self._generator).to(Z.device)
            for part in torch.split(order, self.size):
                left = torch.cat([left, Z[part]])
                if len(left) >= self.size:
                    yield self.standardised(left[: self.size])
                    left = left[self.size :]


def train(model: Any, batches: Batches, epochs: int, learning_rate: float, l1_weight: float) -> list[float]:
    """Train an SAE with Adam.

    Args:
        model: the SAE, on the device of the rows.
        batches: what it is trained on.
        epochs: passes over them.
        learning_rate: step size of Adam.
        l1_weight: λ in ½‖Z − Ẑ‖² + λ‖V‖₁, where V = σ times the codes of X.

    Returns:
        That objective, estimated by the mean over each epoch.
    """
    losses: list[Tensor] = []

    def loss(X: Tensor, X_hat: Tensor, pre_codes: Tensor, codes: Tensor, dictionary: Tensor) -> Tensor:
        # Theirs adds the sum of |v| to the mean of (x − x̂)².
        penalty = 2 * l1_weight / (batches.scale * X.numel())
        value = library().mse_l1(X, X_hat, pre_codes, codes, dictionary, penalty=penalty)
        losses.append(value.detach())
        return value

    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    device = batches.mean.device
    library().train_sae(model, batches, loss, optimizer, nb_epochs=epochs, monitoring=0, device=device)
    means = torch.stack(losses).double().view(epochs, -1).mean(dim=1)
    objective: list[float] = (0.5 * batches.rows.n * batches.rows.width * batches.scale**2 * means).tolist()
    return objective
