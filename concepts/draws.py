"""Shift vectors as they might have been, for what is made of them."""

from typing import Literal, get_args

import torch
from torch import Tensor

from ._averages import Average
from ._precision import full_precision
from ._validation import check_whole
from .pairs import Pairs

Kind = Literal["bootstrap", "pairing", "directions"]


@full_precision
def shift_draws(
    kind: Kind,
    original: Tensor,
    destination: Tensor,
    assignment: Tensor,
    n_concepts: int,
    *,
    count: int,
    average: Average = "mean",
    samples: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """Shift vectors under resampling or chance, for what is made of them (such as words); see `shift_significance`.

    Args:
        kind: "bootstrap" draws samples with replacement; "pairing" permutes the destination's states over all samples;
            "directions" takes random directions in place of those of the shifts.
        original: states a_m of the original model, [M, D].
        destination: states b_m of the destination model for the same samples, [M, D].
        assignment: concept of each sample in the original model, [M], integer; −1 for one that activates none.
        n_concepts: number of concepts K.
        count: number of draws.
        average: as in `concept_shift`.
        samples: sample that each row belongs to, [M], integer; by default each row is one.
        seed: seed of the draws; those of `shift_significance` with the same seed are the same.

    Returns:
        Shift vectors, [count, K, D], float32; 0 for an empty concept. Where a draw leaves a concept no sample, it has
        the shift of another draw.

    Raises:
        ValueError: as `concept_shift`, or if `samples` does not fit, `count` is below 1, or the kind is unknown.
    """
    check_whole(count, 1, "count")
    if kind not in get_args(Kind):
        raise ValueError(f"`kind` must be one of {', '.join(get_args(Kind))}, got '{kind}'")
    pairs = Pairs(original, destination, assignment, n_concepts, average, samples)
    draws = {"bootstrap": pairs.resampled, "pairing": pairs.paired_anew, "directions": pairs.random}
    found = torch.cat(list(draws[kind](count, seed)))
    for k, lost in enumerate(found[:, :, 0].isnan().T):
        # Without the draw, as far as the others tell.
        there = found[~lost, k] if not bool(lost.all()) else pairs.shift.vectors[k, None]
        found[lost, k] = there[torch.arange(int(lost.sum()), device=lost.device) % len(there)]
    return found
