"""The mean visual token of a set of pictures, and a direction for each class of the objects in them.

Notation: N visual tokens, D hidden size.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from torch import Tensor

from ._validation import as_rows
from .artifacts import content_hash, load_artifact, save_artifact

_KIND = "mean_token"
_OBJECT = "object."


@dataclass(frozen=True)
class Moments:
    """Mean and variance of rows that come in pieces: those of pieces are joined exactly (Chan et al. 1982).

    Attributes:
        count: number of rows N.
        mean: their mean, [D], float64, on the CPU.
        squares: Σ (x − mean)², [D], float64, on the CPU.
    """

    count: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def of(cls, X: Tensor) -> "Moments":
        """Those of rows X, [N, D], N at least 1, any floating dtype and device.

        Raises:
            ValueError: if a row is not finite.
        """
        rows = as_rows(X, "X").double()
        mean = rows.mean(dim=0)
        return cls(len(rows), mean.cpu(), (rows - mean).square().sum(dim=0).cpu())

    @property
    def variance(self) -> Tensor:
        """Mean squared distance from the mean, [D], float64."""
        return self.squares / self.count

    def joined(self, other: "Moments") -> "Moments":
        """Those of the rows of both."""
        count = self.count + other.count
        apart = other.mean - self.mean
        return Moments(
            count,
            self.mean + apart * (other.count / count),
            self.squares + other.squares + apart.square() * (self.count * other.count / count),
        )


class TokenMoments:
    """Streams visual tokens: moments of all, and of those on objects of each class.

    Attributes:
        pictures: number of pictures.
        tokens: moments of all tokens; none before the first.
        objects: class → moments of the tokens on its objects.
    """

    def __init__(self) -> None:
        self.pictures = 0
        self.tokens: Moments | None = None
        self.objects: dict[str, Moments] = {}

    def update(self, states: Tensor, objects: Mapping[str, Tensor]) -> None:
        """Add one picture.

        Args:
            states: its visual tokens, [N, D].
            objects: class → which tokens lie on its objects, boolean [N].
        """
        found = TokenMoments()
        found.pictures, found.tokens = 1, Moments.of(states)
        found.objects = {name: Moments.of(states[on.to(states.device)]) for name, on in objects.items() if on.any()}
        self.merge(found)

    def merge(self, other: "TokenMoments") -> None:
        """Add what another, such as another process, has seen."""
        self.pictures += other.pictures
        self.tokens = _joined(one for one in (self.tokens, other.tokens) if one is not None)
        for name, moments in other.objects.items():
            self.objects[name] = self.objects[name].joined(moments) if name in self.objects else moments

    def finish(self, site: str, metadata: Mapping[str, Any]) -> "MeanToken":
        """The artifact.

        Args:
            site: where the tokens were read.
            metadata: JSON values that say of which model and pictures.

        Raises:
            ValueError: if there was no token, or objects of one class only.
        """
        if self.tokens is None:
            raise ValueError("a mean token needs at least one picture, got none")
        counts = {name: moments.count for name, moments in sorted(self.objects.items())}
        return MeanToken(
            site,
            self.tokens.mean.float(),
            self.tokens.variance.float(),
            {name: object_direction(self.objects, name).float() for name in counts},
            {**metadata, "pictures": self.pictures, "tokens": self.tokens.count, "object_tokens": counts},
        )


def object_direction(objects: Mapping[str, Moments], name: str) -> Tensor:
    """What makes tokens on objects of a class differ from tokens on other objects: mean − mean of those, [D].

    Against all other tokens it would mostly tell that there is an object, whatever it is.

    Args:
        objects: class → moments of the tokens on its objects.
        name: the class.

    Raises:
        ValueError: if there is no other class.
    """
    others = _joined(moments for other, moments in objects.items() if other != name)
    if others is None:
        raise ValueError(f"the direction of {name!r} needs objects of other classes to differ from, and there are none")
    return objects[name].mean - others.mean


def _joined(parts: Iterable[Moments]) -> Moments | None:
    """Those of the rows of all parts; nothing of none."""
    given = list(parts)
    return reduce(Moments.joined, given) if given else None


@dataclass(frozen=True)
class MeanToken:
    """The artifact of a mean visual token.

    Attributes:
        site: where the tokens were read.
        mean: mean token, [D], float32.
        variance: variance of tokens, [D], float32.
        objects: class → direction of its objects, [D], float32; empty where no instances were given.
        metadata: JSON values that say what they are (model, data, number of pictures and tokens, ...).

    Raises:
        ValueError: if a tensor is not finite or of another shape.
    """

    site: str
    mean: Tensor
    variance: Tensor
    objects: dict[str, Tensor]
    metadata: dict[str, Any]

    def __post_init__(self) -> None:
        """Refuse what could not stand for a visual token."""
        for name, tensor in self._tensors.items():
            if tensor.ndim != 1 or tensor.shape != self.mean.shape or not tensor.isfinite().all():
                raise ValueError(
                    f"{name!r} of a mean token must be finite and of shape {list(self.mean.shape[-1:])}, got "
                    f"{list(tensor.shape)}"
                )

    @property
    def _tensors(self) -> dict[str, Tensor]:
        return {
            "mean": self.mean,
            "variance": self.variance,
            **{f"{_OBJECT}{name}": direction for name, direction in self.objects.items()},
        }

    @property
    def content_hash(self) -> str:
        """Tells two of them apart."""
        return content_hash(self._tensors)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to one safetensors file; see `save_artifact` for the errors of writing."""
        save_artifact(path, _KIND, self._tensors, {**self.metadata, "site": self.site})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "MeanToken":
        """Read what `save` wrote.

        Raises:
            ValueError: if the file is missing, damaged, or holds something else.
        """
        tensors, metadata = load_artifact(path, _KIND)
        objects = {name.removeprefix(_OBJECT): one for name, one in tensors.items() if name.startswith(_OBJECT)}
        try:
            return cls(metadata["site"], tensors["mean"], tensors["variance"], objects, metadata)
        except (KeyError, ValueError) as error:
            raise ValueError(f"{Path(path)} is damaged: {error}; make it anew") from error
