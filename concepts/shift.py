"""How concepts move between two checkpoints, from the states of the same samples in both.

Notation: M paired samples, K concepts, D hidden size; a original, b destination.
    δ_m = b_m − a_m [D]             shift of a sample
    A_k = {m : assignment_m = k}    samples of a concept
    Δ_k = mean of δ_m over A_k [D]  shift of a concept
Paper: Analyzing Fine-tuning Representation Shift (arXiv 2501.03012), section 3.2.
A cosine with a zero vector is 0.
"""

import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from ._precision import full_precision
from ._validation import as_rows, check_at_least, check_same_width
from .artifacts import load_artifact, save_artifact

_KIND = "shift"


@dataclass(frozen=True, eq=False)
class ConceptShift:
    """Shift vectors of K concepts, and how well each describes its samples.

    Attributes:
        vectors: Δ_k, [K, D], in the units of the states; 0 for an empty concept.
        counts: samples of each concept, |A_k|, [K], int64.
        consistency: mean of cos(δ_m, Δ_k) over A_k, [K].
        pairwise_cosine: mean of cos(δ_m, δ_n) over the pairs m ≠ n of A_k, [K]; 0 with fewer than two samples.
        magnitude: ‖Δ_k‖, [K].
        mean_magnitude: mean of ‖δ_m‖ over A_k, [K].
    """

    vectors: Tensor
    counts: Tensor
    consistency: Tensor
    pairwise_cosine: Tensor
    magnitude: Tensor
    mean_magnitude: Tensor

    @property
    def empty(self) -> Tensor:
        """Concepts without a sample, [K], bool: they have no shift vector."""
        return self.counts == 0

    def shifted(self, U: Tensor, alpha: float = 1.0) -> Tensor:
        """Shifted concepts u_k + α Δ_k; empty concepts stay where they are.

        Args:
            U: concepts of the original model, [K, D].
            alpha: how far to go along the shift.

        Returns:
            Shifted concepts, [K, D], float32.

        Raises:
            ValueError: if `U` is no finite matrix of the shape of `vectors`.
        """
        U = as_rows(U, "U")
        if U.shape != self.vectors.shape:
            raise ValueError(
                f"`U` must have the shape of the shift vectors, {list(self.vectors.shape)}, got {list(U.shape)}: "
                "use the dictionary that assigned the samples"
            )
        return U + alpha * self.vectors.to(U.device)

    def save(self, path: str | os.PathLike[str], metadata: Mapping[str, Any]) -> None:
        """Write the shift to one safetensors file; see `save_artifact` for the errors.

        Args:
            path: file to write.
            metadata: JSON values that say where the states come from (models, site, dictionary, data, ...).
        """
        save_artifact(path, _KIND, {field.name: getattr(self, field.name) for field in fields(self)}, metadata)


def load_shift(path: str | os.PathLike[str]) -> tuple[ConceptShift, dict[str, Any]]:
    """Read a shift that `ConceptShift.save` wrote; see `load_artifact` for the errors.

    Args:
        path: file to read.

    Returns:
        The shift, on the CPU, and its metadata.
    """
    tensors, metadata = load_artifact(path, _KIND)
    return ConceptShift(**tensors), metadata


def pair_rows(ids_a: Sequence[Hashable], ids_b: Sequence[Hashable]) -> tuple[Tensor, Tensor]:
    """Rows of two sets of states that belong to the same sample.

    Args:
        ids_a: sample id of each row of the first set.
        ids_b: sample id of each row of the second set.

    Returns:
        Indices of rows of the first and of the second set, [M] each, int64, in the order of the first.

    Raises:
        ValueError: if an id occurs twice in one set, or no id is in both.
    """
    row_a, row_b = _row_of(ids_a, "ids_a"), _row_of(ids_b, "ids_b")
    common = [sample for sample in row_a if sample in row_b]
    if not common:
        raise ValueError(
            f"`ids_a` and `ids_b` must share sample ids, but none of {len(ids_a)} and {len(ids_b)} is common: "
            "extract both from the same data (ids compare with their type: 1 is not '1')"
        )
    return torch.tensor([row_a[sample] for sample in common]), torch.tensor([row_b[sample] for sample in common])


def _row_of(ids: Sequence[Hashable], name: str) -> dict[Hashable, int]:
    rows: dict[Hashable, int] = {}
    for row, sample in enumerate(ids):
        if sample in rows:
            raise ValueError(
                f"`{name}` must hold each sample id once, but {sample!r} is in rows {rows[sample]} and {row}: "
                "drop the duplicates"
            )
        rows[sample] = row
    return rows


@full_precision
def concept_shift(original: Tensor, destination: Tensor, assignment: Tensor, n_concepts: int) -> ConceptShift:
    """Shift vectors of the concepts from paired states, and their statistics.

    Args:
        original: states a_m of the original model, [M, D].
        destination: states b_m of the destination model for the same samples, [M, D].
        assignment: concept of each sample in the original model, [M], integer; −1 for one that activates none.
        n_concepts: number of concepts K.

    Returns:
        The shift; exactly 0 where the states are identical.

    Raises:
        ValueError: if a matrix is not finite, the shapes do not fit together, there is no sample, or the
            assignment is not within −1 … K − 1.
    """
    check_at_least(n_concepts, 1, "n_concepts")
    delta = _paired_difference(original, destination)
    members = _membership(assignment, n_concepts, len(delta)).to(delta)  # [K, M], 1 where m is in A_k
    counts = members.sum(dim=1)
    size = counts.clamp_min(1)
    direction = normalize(delta)
    vectors = (members @ delta) / size[:, None]
    resultant = members @ direction  # Σ_m δ_m / ‖δ_m‖ [K, D]
    moved = members @ (delta != 0).any(dim=1).to(delta)
    # Σ_{m≠n} cos(δ_m, δ_n) = ‖resultant‖² − (number of m with δ_m ≠ 0)
    pair_sum = resultant.square().sum(dim=1) - moved
    return ConceptShift(
        vectors=vectors,
        counts=counts.long(),
        consistency=(resultant * normalize(vectors)).sum(dim=1) / size,
        pairwise_cosine=pair_sum / (counts * (counts - 1)).clamp_min(1) * (counts > 1),
        magnitude=vectors.norm(dim=1),
        mean_magnitude=(members @ delta.norm(dim=1)) / size,
    )


def _paired_difference(original: Tensor, destination: Tensor) -> Tensor:
    a, b = as_rows(original, "original"), as_rows(destination, "destination")
    check_same_width(a, b, ("original", "destination"))
    if len(a) != len(b) or len(a) == 0:
        raise ValueError(
            f"`original` and `destination` must hold the same samples, at least one, got {len(a)} and {len(b)} "
            "rows: select the common ones with `pair_rows`"
        )
    return b.to(a.device) - a


def _membership(assignment: Tensor, n_concepts: int, n_samples: int) -> Tensor:
    if assignment.is_floating_point() or assignment.shape != (n_samples,):
        raise ValueError(
            f"`assignment` must be an integer tensor [{n_samples}], one concept for each pair, "
            f"got {assignment.dtype} {list(assignment.shape)}"
        )
    low, high = int(assignment.min()), int(assignment.max())
    if low < -1 or high >= n_concepts:
        raise ValueError(f"`assignment` must lie in −1 … {n_concepts - 1}, got values from {low} to {high}")
    # Those of no concept fill the first column, which is dropped.
    return one_hot(assignment.long() + 1, n_concepts + 1).T[1:]
