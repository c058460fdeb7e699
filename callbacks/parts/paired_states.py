"""The states of the same samples in two models."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...concepts import pair_rows
from .concept_states import ConceptStates


@dataclass(frozen=True)
class PairedStates:
    """M pairs of states of an original and a destination.

    Attributes:
        a: All states of the original.
        b: All states of the destination.
        original: Its states of the pairs [M, D], float32.
        destination: The destination's, in the same order [M, D], float32.
        samples: Number of the sample that each pair is of [M].
        unpaired: How many states of each model have no counterpart.
    """

    a: ConceptStates
    b: ConceptStates
    original: Tensor
    destination: Tensor
    samples: Tensor
    unpaired: dict[str, int]

    @classmethod
    def of(cls, a: ConceptStates, b: ConceptStates, device: torch.device) -> PairedStates:
        """Pair states by sample id, and where a sample has several (its visual tokens, say), by position too.

        Args:
            a: States of the original.
            b: States of the destination, at the same site and of the same selector.
            device: Where the pairs shall be.

        Raises:
            ValueError: No sample is common, one was shown or asked otherwise to the other model, or the widths differ.
        """
        single = all(len(set(states.ids)) == len(states.ids) for states in (a, b))
        try:
            rows_a, rows_b = pair_rows(_keys(a, single), _keys(b, single))
        except ValueError as error:
            raise ValueError(
                f"{a.store.folder} and {b.store.folder}: no sample is common to both ({len(a.ids)} and {len(b.ids)} "
                f"states of {a.ids[0]!r} … and {b.ids[0]!r} …); extract both from the same data"
            ) from error
        _check_inputs(a, b)
        original, destination = a.states[rows_a], b.states[rows_b]
        if original.shape != destination.shape:
            raise ValueError(
                f"{a.store.folder} has states of width {original.shape[1]}, {b.store.folder} of width "
                f"{destination.shape[1]}; a shift needs two models of one width"
            )
        number = {sample_id: row for row, sample_id in enumerate(dict.fromkeys(a.ids))}
        samples = torch.tensor([number[a.ids[row]] for row in rows_a.tolist()])
        unpaired = {"original": len(a.ids) - len(rows_a), "destination": len(b.ids) - len(rows_b)}
        return cls(a, b, original.to(device), destination.to(device), samples, unpaired)

    @property
    def n_samples(self) -> int:
        """Distinct samples among the pairs."""
        return len(set(self.samples.tolist()))


def _keys(states: ConceptStates, single: bool) -> list[Hashable]:
    return list(states.ids) if single else list(zip(states.ids, states.positions, strict=True))


def _check_inputs(a: ConceptStates, b: ConceptStates) -> None:
    """Refuse pairs of what is no longer the same sample: another prompt, or another picture under the same name.

    Raises:
        ValueError: One has; names it, and both prompts.
    """
    for sample_id in a.samples.keys() & b.samples.keys():
        one, other = a.samples[sample_id], b.samples[sample_id]
        if one["prompt"] != other["prompt"]:
            odd = f"was asked {one['prompt']!r} and {other['prompt']!r}"
        elif None not in (one.get("input"), other.get("input")) and one["input"] != other["input"]:
            odd = f"had another picture ({one['image']} and {other['image']})"
        else:
            continue
        raise ValueError(
            f"{a.store.folder} and {b.store.folder}: sample {sample_id!r} {odd}; extract both from the same data"
        )
