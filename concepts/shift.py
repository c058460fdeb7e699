"""How concepts move between two checkpoints, from the states of the same samples in both.

Notation: M paired samples, K concepts, D hidden size; a original, b destination.
    δ_m = b_m − a_m [D]             shift of a sample
    A_k = {m : assignment_m = k}    samples of a concept
    Δ_k = mean of δ_m over A_k [D]  shift of a concept; a median or a trimmed mean as an option
Paper: Analyzing Fine-tuning Representation Shift (arXiv 2501.03012), section 3.2.
A cosine with a zero vector is 0.
"""

import math
import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ._averages import Average, averaged, check_average, rows_of
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

    def shifted(self, U: Tensor, alpha: float = 1.0, lengths: Tensor | None = None) -> Tensor:
        """Shifted concepts u_k + α Δ_k / lengths_k; empty concepts stay where they are.

        Args:
            U: concepts of the original model, [K, D].
            alpha: how far to go along the shift.
            lengths: by how much each concept is multiplied in the states, [K] (`ConceptDictionary.lengths`); 1 by
                default, which is right where concepts are themselves as long as states.

        Returns:
            Shifted concepts, [K, D], float32.

        Raises:
            ValueError: if `U` is no finite matrix of the shape of `vectors`, or `lengths` not [K] and positive.
        """
        U = as_rows(U, "U")
        if U.shape != self.vectors.shape:
            raise ValueError(
                f"`U` must have the shape of the shift vectors, {list(self.vectors.shape)}, got {list(U.shape)}: "
                "use the dictionary that assigned the samples"
            )
        return U + steps(alpha, lengths, len(U)).to(U)[:, None] * self.vectors.to(U)

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


def steps(alpha: float, lengths: Tensor | None, n_concepts: int) -> Tensor:
    """By what a shift is multiplied before it is added to its concept, α / lengths_k, [K].

    Raises:
        ValueError: if `alpha` is not finite, or `lengths` not [K] and positive.
    """
    if not math.isfinite(alpha):
        raise ValueError(f"`alpha` must be finite, got {alpha}")
    lengths = torch.ones(n_concepts) if lengths is None else lengths
    n_bad = lengths.numel() - int(((lengths > 0) & lengths.isfinite()).sum())
    if lengths.shape != (n_concepts,) or n_bad:
        raise ValueError(
            f"`lengths` must hold {n_concepts} positive numbers, one for each concept, got {list(lengths.shape)}, "
            f"{n_bad} of them not positive: use `ConceptDictionary.lengths`"
        )
    return alpha / lengths


@full_precision
def concept_shift(
    original: Tensor, destination: Tensor, assignment: Tensor, n_concepts: int, average: Average = "mean"
) -> ConceptShift:
    """Shift vectors of the concepts from paired states, and their statistics.

    Args:
        original: states a_m of the original model, [M, D].
        destination: states b_m of the destination model for the same samples, [M, D].
        assignment: concept of each sample in the original model, [M], integer; −1 for one that activates none.
        n_concepts: number of concepts K.
        average: what Δ_k is of the δ_m of a concept; median and trimmed mean (10 % cut at each end) are those of each
            coordinate. Consistency and magnitude are those of this Δ_k.

    Returns:
        The shift; exactly 0 where the states are identical.

    Raises:
        ValueError: if a matrix is not finite, the shapes do not fit together, there is no sample, the assignment is
            not within −1 … K − 1, or the average is unknown.
    """
    check_at_least(n_concepts, 1, "n_concepts")
    check_average(average)
    a, b = paired_states(original, destination)
    rows = rows_of(assignment, n_concepts, len(a))
    measures = [_measures(b[own] - a[own], average) for own in (index.to(a.device) for index in rows)]
    vectors, consistency, pairwise_cosine, magnitude, mean_magnitude = map(torch.stack, zip(*measures, strict=True))
    return ConceptShift(
        vectors=vectors,
        counts=torch.tensor([len(own) for own in rows], device=a.device),
        consistency=consistency,
        pairwise_cosine=pairwise_cosine,
        magnitude=magnitude,
        mean_magnitude=mean_magnitude,
    )


def _measures(delta: Tensor, average: Average) -> tuple[Tensor, ...]:
    """Δ, consistency, pairwise cosine, ‖Δ‖ and mean ‖δ‖ of the samples of one concept, δ [n, D]."""
    n = len(delta)
    norms = delta.norm(dim=1)
    vector = averaged(delta, average)
    resultant = inverse(norms) @ delta  # Σ_m δ_m / ‖δ_m‖ [D]
    # Σ_{m≠n} cos(δ_m, δ_n) = ‖resultant‖² − (number of m with δ_m ≠ 0)
    pair_sum = resultant.square().sum() - (norms > 0).sum()
    return (
        vector,
        resultant @ normalize(vector, dim=0) / max(n, 1),
        pair_sum / max(n * (n - 1), 1) * (n > 1),
        vector.norm(),
        norms.sum() / max(n, 1),
    )


def inverse(norms: Tensor) -> Tensor:
    """1 / ‖δ‖, and 0 where ‖δ‖ = 0, so that a cosine with a zero vector is 0."""
    return torch.where(norms > 0, 1 / norms, 0)


def paired_states(original: Tensor, destination: Tensor) -> tuple[Tensor, Tensor]:
    """The states a and b, [M, D] each, in float32 on one device.

    Raises:
        ValueError: if they are not finite matrices of the same width and number of rows, at least one.
    """
    a, b = as_rows(original, "original"), as_rows(destination, "destination")
    check_same_width(a, b, ("original", "destination"))
    if len(a) != len(b) or len(a) == 0:
        raise ValueError(
            f"`original` and `destination` must hold the same samples, at least one, got {len(a)} and {len(b)} "
            "rows: select the common ones with `pair_rows`"
        )
    return a, b.to(a.device)
