"""Averages over the samples of a concept.

Notation: M samples, K concepts, D width; A_k = {m : assignment_m = k}.
"""

from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

Average = Literal["mean", "median", "trimmed_mean"]
# Share of the samples that a trimmed mean leaves out at each end.
TRIMMED = 0.1


def check_average(average: str) -> None:
    """Raise a ValueError unless there is such an average."""
    if average not in get_args(Average):
        raise ValueError(f"`average` must be one of {', '.join(get_args(Average))}, got '{average}'")


def rows_of(assignment: Tensor, n_concepts: int, n_samples: int, name: str = "assignment") -> list[Tensor]:
    """The rows A_k of each concept.

    Args:
        assignment: concept of each row, [M], integer; −1 for one that activates none.
        n_concepts: K.
        n_samples: M.
        name: what errors call the assignment.

    Returns:
        K tensors of indices in ascending order, [|A_k|], int64, on the CPU.

    Raises:
        ValueError: if the assignment has another shape, is not integer, or not within −1 … K − 1.
    """
    if assignment.is_floating_point() or assignment.shape != (n_samples,):
        raise ValueError(
            f"`{name}` must be an integer tensor [{n_samples}], one concept for each row, "
            f"got {assignment.dtype} {list(assignment.shape)}"
        )
    assignment = assignment.cpu().long()
    if n_samples and not -1 <= int(assignment.min()) <= int(assignment.max()) < n_concepts:
        raise ValueError(
            f"`{name}` must lie in −1 … {n_concepts - 1}, got values from {int(assignment.min())} to "
            f"{int(assignment.max())}"
        )
    sizes = (assignment + 1).bincount(minlength=n_concepts + 1)
    return list(torch.split(assignment.argsort(stable=True), sizes.tolist())[1:])


def averaged(X: Tensor, average: Average) -> Tensor:
    """Average of rows [n, D], each coordinate on its own, [D]; 0 of no rows."""
    n = len(X)
    if n == 0 or average == "mean":
        return X.sum(dim=0) / max(n, 1)
    # The median is what is left when all but the middle one or two are cut.
    cut = (n - 1) // 2 if average == "median" else int(TRIMMED * n)
    return _sorted(X.T.contiguous())[:, cut : n - cut].mean(dim=1)


def _sorted(X: Tensor) -> Tensor:
    """Each row of X in ascending order."""
    # On processors, NumPy sorts many short rows some 15 times as fast.
    return torch.from_numpy(np.sort(X.numpy(), axis=1)) if X.device.type == "cpu" else X.sort(dim=1).values
