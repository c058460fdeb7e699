"""The interface of every concept dictionary, and its artifact.

Notation, in this room: N samples, D hidden size, K concepts; rows are samples.
    Z [N, D]  features (hidden states)
    U [K, D]  dictionary, one concept a row
    V [N, K]  activations, Z ≈ V U
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import asdict
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from ._averages import rows_of
from ._precision import full_precision
from ._validation import as_rows, check_whole
from .artifacts import content_hash, load_artifact, save_artifact
from .report import FitReport
from .rows import Rows, squared_norms

_KIND = "dictionary"
# Below this share of ‖Z‖², ‖Z − mean‖² is float32 rounding of equal rows, not variance.
_NO_VARIANCE = 1e-12


class Fitted(NamedTuple):
    """What a method's own fit returns.

    Attributes:
        tensors: `dictionary` U [K, D], and what else the method needs to encode.
        history: objective after each iteration, without that of the final activations.
        iterations: how many there were.
        converged: whether it stopped before their limit.
    """

    tensors: dict[str, Tensor]
    history: Sequence[float] = ()
    iterations: int = 1
    converged: bool = True


class ConceptDictionary(ABC):
    """K directions that reconstruct hidden states: Z ≈ V U.

    A method implements `_fit`, `_encode` and `_settings`; `_code` only where V is not itself what multiplies U, `_loss`
    where it minimises more than the squared error, and `_check` where its settings can be wrong for some features. All
    computation is in float32; results are on the device of the features.
    """

    adds_up: ClassVar[bool] = True
    """Whether processes can fit it together, each on its own rows."""
    signed: ClassVar[bool] = False
    """Whether activations may be negative by their meaning."""
    _classes: ClassVar[dict[str, type["ConceptDictionary"]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Enter the class in the table that `load_dictionary` looks names up in."""
        super().__init_subclass__(**kwargs)
        ConceptDictionary._classes[cls.__name__] = cls

    def __init__(self, n_concepts: int, seed: int = 0) -> None:
        check_whole(n_concepts, 1, "n_concepts")
        self.n_concepts = n_concepts
        self.seed = seed
        self.metadata: dict[str, Any] = {}
        self._tensors: dict[str, Tensor] = {}
        self._report: FitReport | None = None

    @property
    def dictionary(self) -> Tensor:
        """The concepts U, [K, D], float32.

        Raises:
            ValueError: if the dictionary is not fitted.
        """
        return self._fitted()["dictionary"]

    @property
    def report(self) -> FitReport:
        """How the last fit went; stored with the dictionary.

        Raises:
            ValueError: if the dictionary is not fitted.
        """
        self._fitted()
        assert self._report is not None
        return self._report

    @full_precision
    def fit(self, Z: Tensor | Iterable[Tensor], distributed: bool = False) -> Self:
        """Learn U from features.

        Args:
            Z: features, [N, D], any floating dtype, on a CPU or CUDA device; or shards [n, D] of them that can be gone
                through several times (a list, a `StateShards`), of which one at a time is held.
            distributed: `Z` holds the rows of this process only. All processes of the default process group call `fit`
                alike and get the same dictionary, that of all rows in the order of the processes.

        Returns:
            The dictionary itself.

        Raises:
            TypeError: if `Z` can be gone through only once.
            ValueError: if `Z` is no finite floating matrix, has fewer distinct rows than there are concepts, or the
                settings cannot work on it; before any long computation.
        """
        rows = Rows(Z, distributed)
        self._check_rows(rows)
        fitted = self._fit(rows)
        self._report = self._measure(rows, fitted)
        self._tensors = fitted.tensors
        return self

    @full_precision
    def transform(self, Z: Tensor) -> Tensor:
        """Activations of the concepts in features, each row on its own.

        Args:
            Z: features, [N, D], any floating dtype and device; N = 0 is allowed.

        Returns:
            Activations V, [N, K], float32.

        Raises:
            ValueError: if the dictionary is not fitted or `Z` is no finite floating matrix of its width.
        """
        width = self.dictionary.shape[1]
        Z = as_rows(Z, "Z")
        if Z.shape[1] != width:
            raise ValueError(
                f"`Z` must have the width {width} that the dictionary was fitted on, got {Z.shape[1]}: "
                "use features of the same model and site"
            )
        return self._encode(Z, self._on(Z.device))

    @full_precision
    def reconstruct(self, V: Tensor) -> Tensor:
        """Features from activations.

        Args:
            V: activations as `transform` gives them, [N, K].

        Returns:
            Reconstructed features, [N, D], float32.

        Raises:
            ValueError: if the dictionary is not fitted or `V` is no finite floating matrix of K columns.
        """
        V = self._activations(V)
        return self._decode(V, self._on(V.device))

    @full_precision
    def explained_variance(self, Z: Tensor) -> float:
        """Share of the variance of features that the dictionary reconstructs.

        Args:
            Z: features, [N, D].

        Returns:
            1 − ‖Z − VU‖² / ‖Z − mean‖², at most 1; 0 where the rows do not vary.

        Raises:
            ValueError: as in `transform`.
        """
        reconstruction = self.reconstruct(self.transform(Z))
        Z = as_rows(Z, "Z")
        error, variance, squares = (float(squared_norms(X).sum()) for X in (Z - reconstruction, Z - Z.mean(dim=0), Z))
        return _explained(error, variance, squares)

    def assign(self, Z: Tensor) -> Tensor:
        """The strongest concept of each sample, argmax_k |v_k|.

        Args:
            Z: features, [N, D].

        Returns:
            Indices of concepts, [N], int64; −1 for a row that activates none.

        Raises:
            ValueError: as in `transform`.
        """
        return strongest(self.transform(Z))

    def with_concepts(self, U: Tensor) -> Self:
        """The same method with other concepts: what shifted concepts are in states.

        Args:
            U: concepts, [K, D].

        Returns:
            A copy of this dictionary; a method that learned how to encode encodes as it did.

        Raises:
            ValueError: if the dictionary is not fitted, or `U` is no finite matrix of its shape.
        """
        own, U = self.dictionary, as_rows(U, "U")
        if U.shape != own.shape:
            raise ValueError(f"`U` must have the shape of the dictionary, {list(own.shape)}, got {list(U.shape)}")
        other = copy(self)
        other._tensors = {**self._tensors, "dictionary": U.to(own)}
        return other

    @full_precision
    def lengths(self, V: Tensor, assignment: Tensor) -> Tensor:
        """How long each concept is among the states: by how much it is multiplied in those assigned to it.

        What is to be added to a concept has to be divided by it first, if it is a difference of states: the concepts
        of Semi-NMF are no longer than 1, states are often a hundred times as long. Concepts that are themselves states
        (KMeans, Simple) are multiplied by 1.

        Args:
            V: activations as `transform` gives them, [N, K].
            assignment: concept of each row, [N], integer (`strongest`); −1 for one that activates none.

        Returns:
            Mean over the rows of a concept of |v_k|, or of what multiplies u_k in its place, [K], float32; 1 for a
            concept without rows.

        Raises:
            ValueError: as in `reconstruct`, or if the assignment does not fit.
        """
        code = self._code(self._activations(V)).abs()
        rows = rows_of(assignment, self.n_concepts, len(code))
        means = torch.stack([code[own.to(code.device), k].sum() / max(len(own), 1) for k, own in enumerate(rows)])
        return means.where(means > 0, 1)

    @property
    def content_hash(self) -> str:
        """Tells what was learned apart: a hash of all its tensors.

        Raises:
            ValueError: if the dictionary is not fitted.
        """
        self._fitted()
        return content_hash(self._tensors)

    def save(self, path: str | os.PathLike[str], metadata: Mapping[str, Any]) -> None:
        """Write the dictionary to one safetensors file.

        Args:
            path: file to write.
            metadata: JSON values that say where the features come from (model, site, data, ...).

        Raises:
            ValueError: if the dictionary is not fitted or `metadata` is not JSON.
            OSError: if the file cannot be written.
        """
        content = {
            "class": type(self).__name__,
            "settings": self._settings(),
            "report": asdict(self.report),
            "metadata": dict(metadata),
        }
        save_artifact(path, _KIND, self._tensors, content)

    @abstractmethod
    def _fit(self, rows: Rows) -> Fitted:
        """Learn from checked features; the interface adds the objective of the final activations."""

    @abstractmethod
    def _encode(self, Z: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        """Activations V of checked features."""

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """The arguments of the constructor."""

    def _check(self, rows: Rows) -> None:  # noqa: B027 - most settings work on all features
        """Raise a ValueError where the settings cannot work on these features."""

    def _loss(self, errors: Tensor, V: Tensor) -> float:
        """What rows with squared errors ‖z − ẑ‖² [N] and activations V add to the value that the fit minimises."""
        return float(errors.sum())

    def _code(self, V: Tensor) -> Tensor:
        """What multiplies U in the reconstruction, [N, K]."""
        return V

    def _decode(self, V: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        return self._code(V) @ tensors["dictionary"]

    def _activations(self, V: Tensor) -> Tensor:
        self._fitted()
        V = as_rows(V, "V")
        if V.shape[1] != self.n_concepts:
            raise ValueError(f"`V` must have {self.n_concepts} columns, one a concept, got {V.shape[1]}")
        return V

    def _check_rows(self, rows: Rows) -> None:
        K = self.n_concepts
        if rows.n < K:
            raise ValueError(
                f"`fit` needs at least `n_concepts` = {K} rows, got {rows.n}: use more samples or fewer concepts"
            )
        if not rows.distinct(K):
            raise ValueError(
                f"`fit` needs at least `n_concepts` = {K} distinct rows, but most of the {rows.n} rows of `Z` are "
                "equal: do the samples differ at this site and position?"
            )
        self._check(rows)

    def _measure(self, rows: Rows, fitted: Fitted) -> FitReport:
        """One pass over the rows with their final activations."""
        sums = torch.zeros(4, dtype=torch.float64)
        used = torch.zeros(self.n_concepts)
        for Z in rows:
            V = self._encode(Z, fitted.tensors)
            code = self._code(V)
            errors = squared_norms(Z - self._decode(V, fitted.tensors))
            variance = squared_norms(Z - rows.mean.to(Z)).sum()
            parts = (self._loss(errors, V), float(errors.sum()), float(variance), float((code != 0).sum()))
            sums += torch.tensor(parts, dtype=torch.float64)
            used += (code != 0).sum(dim=0).cpu()
        sums, used = rows.sums(sums.to(rows.device), used.to(rows.device))
        objective, error, variance, active = sums.tolist()
        return FitReport(
            objective_history=(*fitted.history, objective),
            iterations=fitted.iterations,
            converged=fitted.converged,
            explained_variance=_explained(error, variance, rows.squares),
            l0=active / rows.n,
            dead_concepts=int((used == 0).sum()),
        )

    def _fitted(self) -> dict[str, Tensor]:
        if not self._tensors:
            raise ValueError(f"{type(self).__name__} is not fitted: call `fit(Z)` or `load_dictionary(path)` first")
        return self._tensors

    def _on(self, device: torch.device) -> dict[str, Tensor]:
        return {name: tensor.to(device) for name, tensor in self._fitted().items()}


def strongest(V: Tensor) -> Tensor:
    """The strongest concept of each sample, argmax_k |v_k|, [N], int64; −1 for a row of V [N, K] that is all zero."""
    strength, concept = V.abs().max(dim=1)
    return concept.where(strength > 0, -1)


def _explained(error: float, variance: float, squares: float) -> float:
    return 1.0 - error / variance if variance > _NO_VARIANCE * squares else 0.0


def load_dictionary(path: str | os.PathLike[str]) -> ConceptDictionary:
    """Read a dictionary that `ConceptDictionary.save` wrote.

    Args:
        path: file to read.

    Returns:
        The fitted dictionary, of the class it was saved from, on the CPU; what was given to `save` is its
        `metadata`.

    Raises:
        ValueError: if the file is no intact dictionary, or of a class this version does not know.
    """
    tensors, content = load_artifact(path, _KIND)
    cls = ConceptDictionary._classes.get(content["class"])
    if cls is None:
        known = ", ".join(sorted(ConceptDictionary._classes))
        raise ValueError(f"{path} holds a dictionary of class '{content['class']}', known are {known}")
    loaded = cls(**content["settings"])
    report = content["report"]
    loaded._tensors = tensors
    loaded._report = FitReport(**{**report, "objective_history": tuple(report["objective_history"])})
    loaded.metadata = content["metadata"]
    return loaded
