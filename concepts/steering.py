"""Steering vectors: directions that are added to hidden states, f ← f + α s.

Notation: Z_target [N, D], Z_source [M, D] states, U [K, D] dictionary, s [D] steering vector (or [K, D], one for each
    concept), in the units of the states; the length of [K, D] vectors is that of the longest.
Paper: Analyzing Fine-tuning Representation Shift (arXiv 2501.03012), section 3.3.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import svds
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, cross_val_score
from torch import Tensor
from torch.nn.functional import normalize

from ._precision import full_precision
from ._validation import as_rows, check_same_width

# A mean shorter than this share of the typical state that it is of is what rounding leaves in float32.
_ROUNDING = 1e-6
_FOLDS = 5


def coarse_vector(target: Tensor, source: Tensor) -> Tensor:
    """Vector from the states of one kind of answer to those of another, mean(target) − mean(source).

    Args:
        target: states to steer to, [N, D].
        source: states to steer from, [M, D].

    Returns:
        Steering vector, [D], float32.

    Raises:
        ValueError: if a set has no state, a state is not finite, or the widths differ.
    """
    target, source = _both(target, source)
    return target.mean(dim=0) - source.mean(dim=0)


@full_precision
def principal_vector(target: Tensor, source: Tensor) -> Tensor:
    """Vector along which most pairs of states differ: s = (p · mean(δ)) p with δ_i = target_i − source_i.

    p is the first right singular vector of the δ [N, D] (Representation Engineering, arXiv 2310.01405, section 3.1).
    The δ are not centred: that would remove what all pairs share, which is what is looked for. The sign of p is that
    with which the mean difference has a positive component along it, and this component is the length.

    Args:
        target: states to steer to, [N, D], N ≥ 2.
        source: states to steer from, one for each of `target`, [N, D].

    Returns:
        Steering vector, [D], float32, on the CPU.

    Raises:
        ValueError: if there are fewer than 2 pairs, a state is not finite, the widths differ, or the pairs differ in
            no common direction.
    """
    target, source = _both(target, source)
    if len(target) != len(source) or len(target) < 2:
        raise ValueError(f"the principal vector needs at least 2 pairs, got {len(target)} and {len(source)} states")
    differences = (target - source).cpu()
    typical = float(differences.square().mean(dim=0).sum().sqrt())
    direction = torch.from_numpy(_first_axis(differences.numpy())) if typical else torch.zeros(differences.shape[1])
    component = float(direction @ differences.mean(dim=0))
    if abs(component) <= _ROUNDING * typical:
        raise ValueError("target and source differ in no common direction: their differences cancel out")
    return component * direction


@full_precision
def probe_vector(target: Tensor, source: Tensor) -> Tensor:
    """Vector along which a linear probe tells the states apart: s = (w · (mean(target) − mean(source))) w.

    w, of length 1, is normal to the boundary of a logistic regression with an L2 penalty of 1, both sides weighted
    alike. The states are divided by one number, the root mean square of their centred coordinates, so that the penalty
    has no unit and no coordinate counts more than it does in the model. On states that vary equally in all directions
    this is nearly the direction of `coarse_vector`; where they do not, directions in which both sides vary much count
    less (arXiv 2310.01405, section 3.1; arXiv 2306.03341, section 4).

    Args:
        target: states to steer to, [N, D].
        source: states to steer from, [M, D].

    Returns:
        Steering vector, [D], float32, on the CPU.

    Raises:
        ValueError: if a set has no state, a state is not finite, the widths differ, or all states are equal.
    """
    X, y = _labelled(target, source)
    weights = _probe().fit(X, y).coef_[0].astype(np.float32)
    direction = normalize(torch.from_numpy(weights), dim=0)
    return float(direction @ coarse_vector(target, source).cpu()) * direction


@full_precision
def probe_accuracy(
    target: Tensor, source: Tensor, target_ids: Sequence[str], source_ids: Sequence[str], seed: int = 0
) -> float:
    """Balanced accuracy of the probe of `probe_vector` on samples that it was not fitted on; 0.5 is chance.

    Args:
        target: states to steer to, [N, D].
        source: states to steer from, [M, D].
        target_ids: sample of each state, [N]; all states of a sample are in one fold.
        source_ids: the same, [M].
        seed: seed of the folds: 5, or as many as the smaller set has samples.

    Returns:
        Mean over the folds, in 0 … 1.

    Raises:
        ValueError: as `probe_vector`, or if a set has fewer than 2 samples.
    """
    X, y = _labelled(target, source)
    samples = [len(set(ids)) for ids in (target_ids, source_ids)]
    folds = min(_FOLDS, *samples)
    if folds < 2:
        raise ValueError(f"a probe needs at least 2 samples of each side, got {samples[0]} and {samples[1]}")
    split = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    groups = [*target_ids, *source_ids]
    return float(cross_val_score(_probe(), X, y, groups=groups, cv=split, scoring="balanced_accuracy").mean())


def fine_vector(U: Tensor, i: int, j: int) -> Tensor:
    """Vector from one concept to another, s_ij = u_j − u_i.

    XL-VLMs, the public code of the paper, stores the opposite sign.

    Args:
        U: concepts, [K, D].
        i: concept to steer from.
        j: concept to steer to.

    Returns:
        Steering vector, [D], float32.

    Raises:
        ValueError: if `U` is no finite matrix, or `i` and `j` are not two different concepts of it.
    """
    U = as_rows(U, "U")
    if not (0 <= i < len(U) and 0 <= j < len(U)) or i == j:
        raise ValueError(f"`i` and `j` must be two different concepts of 0 … {len(U) - 1}, got {i} and {j}")
    return U[j] - U[i]


def cluster_vectors(
    U: Tensor, target_concepts: Tensor, source_concepts: Tensor
) -> tuple[Tensor, list[tuple[int, int]]]:
    """For each concept of the source the vector to the nearest concept of the target, s_i = u_j − u_i.

    A concept is of the target if a larger share of the target's states is assigned to it than of the source's. Every
    other concept i that has states of the source is steered to that of the target with the least ‖u_j − u_i‖.

    Args:
        U: concepts, [K, D].
        target_concepts: concept of each state to steer to, [N], integer; −1 for one that activates none.
        source_concepts: concept of each state to steer from, [M], integer.

    Returns:
        Steering vectors, [K, D], float32, zero where there is nothing to steer; and the pairs (i, j), by i.

    Raises:
        ValueError: if `U` is no finite matrix, there are no states, or no concept is of the target or of the source.
    """
    U = as_rows(U, "U")
    counts = [_counted(concepts, len(U)) for concepts in (target_concepts, source_concepts)]
    # Compared crosswise as whole numbers: equal shares must not differ by rounding.
    of_target = counts[0] * len(source_concepts) > counts[1] * len(target_concepts)
    of_source = ~of_target & (counts[1] > 0)
    for side, concepts in (("target", of_target), ("source", of_source)):
        if not concepts.any():
            raise ValueError(f"no concept has a larger share of the {side}'s states than of the other's")
    targets = of_target.nonzero().flatten().tolist()
    vectors, pairs = torch.zeros_like(U), []
    for i in of_source.nonzero().flatten().tolist():
        j = targets[int((U[targets] - U[i]).norm(dim=1).argmin())]
        vectors[i] = fine_vector(U, i, j)
        pairs.append((i, j))
    return vectors, pairs


def random_vector_like(vector: Tensor, seed: int) -> Tensor:
    """A control: vectors of the same norm in random directions, uniform on the sphere.

    Args:
        vector: steering vector, [D], or one for each concept, [K, D]; each row gets a direction of its own.
        seed: seed of the directions; the same on every device.

    Returns:
        Vectors, [D] or [K, D], float32, on the device of `vector`.

    Raises:
        ValueError: if `vector` is no finite floating vector.
    """
    vector = _checked(vector)
    direction = torch.randn(vector.shape, generator=torch.Generator().manual_seed(seed)).to(vector.device)
    drawn: Tensor = normalize(direction, dim=-1) * torch.linalg.vector_norm(vector, dim=-1, keepdim=True)
    return drawn


def vector_length(vector: Tensor) -> float:
    """Length of a steering vector [D]; of one for each concept [K, D], that of the longest."""
    return float(torch.linalg.vector_norm(vector, dim=-1).max())


def with_length(vector: Tensor, length: float) -> Tensor:
    """The same vector, [D] or [K, D], with another length, so that α means the same for all.

    Raises:
        ValueError: if it has no length.
    """
    own = vector_length(vector)
    if not own:
        raise ValueError("a steering vector must not be zero: the states to steer to and from do not differ")
    return vector * (length / own)


def shuffled_vectors(
    make: Callable[[Tensor, Tensor], Tensor], target: Tensor, source: Tensor, length: float, count: int, seed: int
) -> tuple[Tensor, list[float]]:
    """Controls: what the same method makes of the same states when it is not known which are the target's.

    Both sides are dealt anew, and each gets half of either old one. Plain shuffling would leave a little more of the
    old target on one side, and where target and source lie far apart that little is most of the control: it would steer
    as the real vector does, or against it. Pairs are dealt anew too, of two states of one old side: swapping within
    pairs would only change signs of differences, and leave the principal direction as it is. A vector from shuffled
    labels is short and would hardly steer, so each gets the length of the real one: it shall differ by its direction
    alone.

    Args:
        make: makes the vector, [D] or [K, D], of target and source.
        target: what it is made of: states [N, D], or their concepts [N].
        source: the same, [M, D] or [M].
        length: of the real vector.
        count: how many, S ≥ 1.
        seed: seed of the shuffling; more draws begin with the same ones.

    Returns:
        Vectors, [S, D] or [S, K, D], and the lengths that they had.

    Raises:
        ValueError: if shuffled labels make no vector, or one that is zero.
    """
    generator = torch.Generator().manual_seed(seed)
    made, lengths = [], []
    for _ in range(count):
        try:
            vector = make(*_dealt(target, source, generator))
            made.append(with_length(vector, length))
        except ValueError as error:
            raise ValueError(f"shuffled labels: {error}; use more states, or `shuffled: 0`") from error
        lengths.append(vector_length(vector))
    return torch.stack(made), lengths


def _dealt(target: Tensor, source: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """New sides, each with half of either old one; of an odd number one is left out."""
    halves = []
    for states in (target, source):
        drawn = states[torch.randperm(len(states), generator=generator).to(states.device)]
        half = len(states) // 2
        halves.append((drawn[:half], drawn[half : 2 * half]))
    (one, other), (third, fourth) = halves
    return torch.cat([one, third]), torch.cat([other, fourth])


def _both(target: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    target, source = as_rows(target, "target"), as_rows(source, "source")
    check_same_width(target, source, ("target", "source"))
    for name, states in (("target", target), ("source", source)):
        if len(states) == 0:
            raise ValueError(f"`{name}` must hold at least one state, got none: use more samples")
    return target, source.to(target.device)


def _first_axis(X: NDArray[np.float32]) -> NDArray[np.float32]:
    """The first right singular vector of X [N, D], float32."""
    if min(X.shape) <= 2:  # Lanczos finds fewer than all
        axes = np.linalg.svd(X, full_matrices=False)[2]
    else:
        # A fixed start: Lanczos would draw one.
        axes = svds(X, k=1, v0=np.random.default_rng(0).normal(size=min(X.shape)).astype(X.dtype))[2]
    axis: NDArray[np.float32] = np.ascontiguousarray(axes[0], dtype=np.float32)
    return axis


def _labelled(target: Tensor, source: Tensor) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Centred and scaled states [N + M, D], and which are the target's."""
    target, source = _both(target, source)
    X = torch.cat([target, source]).cpu()
    X = X - X.mean(dim=0)
    scale = X.square().mean().sqrt()
    if not scale:
        raise ValueError("a probe needs states that differ, but all of target and source are equal")
    return (X / scale).numpy(), np.repeat(np.array([1, 0]), [len(target), len(source)])


def _probe() -> Any:
    # A few coordinates of hidden states are often a hundred times as large as the rest; this solver does not mind.
    return LogisticRegression(class_weight="balanced", solver="newton-cg")


def _counted(concepts: Tensor, n_concepts: int) -> Tensor:
    """How many states each concept has, [K], int64."""
    if len(concepts) == 0:
        raise ValueError("`target_concepts` and `source_concepts` must hold at least one state each")
    counts: Tensor = concepts[concepts >= 0].cpu().bincount(minlength=n_concepts)
    return counts


def _checked(vector: Tensor) -> Tensor:
    if vector.ndim not in (1, 2):
        raise ValueError(f"a steering vector must have the shape [D] or [K, D], got {list(vector.shape)}")
    return as_rows(vector.reshape(-1, vector.shape[-1]), "vector").reshape(vector.shape)
