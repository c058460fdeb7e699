"""The artifact of steering vectors: one vector or one for each concept at each site, and controls of the same length.

Notation: D hidden size, K concepts, S shuffled controls.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..records.paths import user_path
from ._validation import as_rows
from .artifacts import load_artifact, save_artifact
from .gguf_vectors import read_gguf, write_gguf

_KIND = "steering_vectors"


@dataclass(frozen=True)
class SteeringVectors:
    """Directions that are added to hidden states, f ← f + α s, in the units of the states.

    Attributes:
        vectors: site → s [D], or [K, D] with one for each concept of the dictionary that `metadata["dictionary"]` names
            (a file); finite, float32, on the CPU.
        shuffled: site → [S, D] or [S, K, D], the same made from shuffled labels; empty where there are none.
        metadata: JSON values that say what they are (model, sites, from what to what, ...).

    Raises:
        ValueError: there is no vector, one is empty or not finite, or a control does not fit its vector.
    """

    vectors: dict[str, Tensor]
    shuffled: dict[str, Tensor]
    metadata: dict[str, Any]

    def __post_init__(self) -> None:
        """Refuse what could not be added to states."""
        if not self.vectors:
            raise ValueError("steering vectors need at least one site, got none")
        object.__setattr__(self, "vectors", {site: _checked(site, vector) for site, vector in self.vectors.items()})
        object.__setattr__(self, "shuffled", {site: self._checked_control(site) for site in self.shuffled})

    def _checked_control(self, site: str) -> Tensor:
        """The controls of a site, [S, D] or [S, K, D]."""
        controls, vector = self.shuffled[site], self.vectors.get(site)
        if vector is None or len(controls) == 0 or controls.shape[1:] != vector.shape:
            raise ValueError(
                f"the shuffled controls of {site!r} must be [S, …] of its vector, got {list(controls.shape)} for "
                f"{'no vector' if vector is None else list(vector.shape)}"
            )
        return as_rows(controls.flatten(0, -2), f"the shuffled controls of {site}").cpu().reshape(controls.shape)

    def at(self, sites: Sequence[str] | None) -> "SteeringVectors":
        """Those of some sites; all by default.

        Raises:
            ValueError: there is none for one of them.
        """
        if sites is None:
            return self
        for site in sites:
            if site not in self.vectors:
                raise ValueError(f"there is no vector for the site {site!r}, only for {', '.join(self.vectors)}")
        vectors, shuffled = ({site: of[site] for site in sites if site in of} for of in (self.vectors, self.shuffled))
        return SteeringVectors(vectors, shuffled, self.metadata)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write them to one safetensors file; see `save_artifact` for the errors of writing."""
        tensors = {f"vectors/{site}": vector for site, vector in self.vectors.items()}
        tensors |= {f"shuffled/{site}": controls for site, controls in self.shuffled.items()}
        save_artifact(path, _KIND, tensors, self.metadata)

    def save_gguf(self, path: str | os.PathLike[str], model_hint: str) -> None:
        """Write them as a control vector of llama.cpp, without the controls; see `write_gguf` for the errors."""
        write_gguf(user_path(path), self.vectors, self.metadata, model_hint)


def _checked(site: str, vector: Tensor) -> Tensor:
    """A vector [D] or [K, D] in float32 on the CPU."""
    if vector.ndim not in (1, 2) or vector.numel() == 0:
        raise ValueError(
            f"the steering vector of {site!r} must have the shape [D] or [K, D] and not be empty, got "
            f"{list(vector.shape)}"
        )
    return as_rows(vector.reshape(-1, vector.shape[-1]), f"the steering vector of {site}").cpu().reshape(vector.shape)


def load_steering_vectors(path: str | os.PathLike[str]) -> SteeringVectors:
    """Read steering vectors.

    Args:
        path: file that `SteeringVectors.save` wrote; or a control vector of llama.cpp, which ends in `.gguf` and whose
            sites are `lm.block.N`.

    Raises:
        ValueError: if the file is missing, damaged, or holds something else.
    """
    path = user_path(path)
    if path.suffix == ".gguf":
        vectors, metadata = read_gguf(path)
        shuffled: dict[str, Tensor] = {}
    else:
        tensors, metadata = load_artifact(path, _KIND)
        vectors, shuffled = _of("vectors/", tensors), _of("shuffled/", tensors)
    try:
        return SteeringVectors(vectors, shuffled, metadata)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; make it anew") from error


def _of(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
