"""Steering vectors: directions that are added to hidden states, f ← f + α s.

Notation: Z [N, D] states, U [K, D] dictionary, s [D] steering vector, in the units of the states.
Paper: Analyzing Fine-tuning Representation Shift (arXiv 2501.03012), section 3.3.
"""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ._validation import as_rows, check_same_width
from .artifacts import load_artifact, save_artifact

_KIND = "steering_vector"


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
    target, source = as_rows(target, "target"), as_rows(source, "source")
    check_same_width(target, source, ("target", "source"))
    for name, states in (("target", target), ("source", source)):
        if len(states) == 0:
            raise ValueError(f"`{name}` must hold at least one state, got none: use more samples")
    return target.mean(dim=0) - source.mean(dim=0).to(target.device)


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


def random_vector_like(vector: Tensor, seed: int) -> Tensor:
    """A control: a vector of the same norm in a random direction, uniform on the sphere.

    Args:
        vector: steering vector, [D].
        seed: seed of the direction; the same on every device.

    Returns:
        Vector, [D], float32, on the device of `vector`.

    Raises:
        ValueError: if `vector` is no finite floating vector.
    """
    vector = _checked(vector)
    direction = torch.randn(len(vector), generator=torch.Generator().manual_seed(seed)).to(vector.device)
    return normalize(direction, dim=0).mul(torch.linalg.vector_norm(vector))


def save_steering_vector(path: str | os.PathLike[str], vector: Tensor, metadata: Mapping[str, Any]) -> None:
    """Write a steering vector to one safetensors file; see `save_artifact` for the errors of writing.

    Args:
        path: file to write.
        vector: steering vector, [D].
        metadata: JSON values that say what it is (model, site, from what to what, samples, ...).

    Raises:
        ValueError: if `vector` is no finite floating vector.
    """
    save_artifact(path, _KIND, {"vector": _checked(vector)}, metadata)


def load_steering_vector(path: str | os.PathLike[str]) -> tuple[Tensor, dict[str, Any]]:
    """Read what `save_steering_vector` wrote; see `load_artifact` for the errors.

    Args:
        path: file to read.

    Returns:
        The vector, [D], float32, on the CPU, and its metadata.
    """
    tensors, metadata = load_artifact(path, _KIND)
    return tensors["vector"], metadata


def _checked(vector: Tensor) -> Tensor:
    if vector.ndim != 1:
        raise ValueError(f"a steering vector must have one dimension, got the shape {list(vector.shape)}")
    return as_rows(vector[None], "vector")[0]
