"""The interface of every concept dictionary, and its artifact.

Notation, in this room: N samples, D hidden size, K concepts; rows are samples.
    Z [N, D]  features (hidden states)
    U [K, D]  dictionary, one concept a row
    V [N, K]  activations, Z ≈ V U
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, ClassVar, Self

from torch import Tensor

from ._precision import full_precision
from ._validation import as_rows, check_at_least
from .artifacts import load_artifact, save_artifact
from .report import FitReport

_KIND = "dictionary"
# Below this share of ‖Z‖², ‖Z − mean‖² is float32 rounding of equal rows, not variance.
_NO_VARIANCE = 1e-12


# What a method's own fit returns: U [K, D], objective history without the final value, iterations, converged.
Fitted = tuple[Tensor, tuple[float, ...], int, bool]


class ConceptDictionary(ABC):
    """K directions that reconstruct hidden states: Z ≈ V U.

    A method implements `_fit`, `_encode`, `_objective` and `_settings`; `_code` only where V is not itself
    what multiplies U. All computation is in float32; results are on the device of the features.
    """

    _classes: ClassVar[dict[str, type["ConceptDictionary"]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Enter the class in the table that `load_dictionary` looks names up in."""
        super().__init_subclass__(**kwargs)
        ConceptDictionary._classes[cls.__name__] = cls

    def __init__(self, n_concepts: int, seed: int) -> None:
        check_at_least(n_concepts, 1, "n_concepts")
        self.n_concepts = n_concepts
        self.seed = seed
        self.metadata: dict[str, Any] = {}
        self._U: Tensor | None = None
        self._report: FitReport | None = None

    @property
    def dictionary(self) -> Tensor:
        """The concepts U, [K, D], float32.

        Raises:
            ValueError: if the dictionary is not fitted.
        """
        if self._U is None:
            raise self._not_fitted()
        return self._U

    @property
    def report(self) -> FitReport:
        """How the last fit went; stored with the dictionary.

        Raises:
            ValueError: if the dictionary is not fitted.
        """
        if self._report is None:
            raise self._not_fitted()
        return self._report

    @full_precision
    def fit(self, Z: Tensor) -> Self:
        """Learn U from features.

        Args:
            Z: features, [N, D], any floating dtype and device.

        Returns:
            The dictionary itself.

        Raises:
            ValueError: if `Z` is no finite floating matrix or has fewer rows than there are concepts.
        """
        Z = as_rows(Z, "Z")
        if len(Z) < self.n_concepts:
            raise ValueError(
                f"`fit` needs at least `n_concepts` = {self.n_concepts} rows, got {len(Z)}: "
                "use more samples or fewer concepts"
            )
        U, history, iterations, converged = self._fit(Z)
        V = self._encode(Z, U)
        code = self._code(V)
        self._U = U
        self._report = FitReport(
            objective_history=(*history, self._objective(Z, U, V)),
            iterations=iterations,
            converged=converged,
            explained_variance=_explained_variance(Z, code @ U),
            l0=float((code != 0).sum(dim=1).float().mean()),
            dead_concepts=int((code == 0).all(dim=0).sum()),
        )
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
        Z = self._checked(Z)
        return self._encode(Z, self.dictionary.to(Z.device))

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
        U = self.dictionary
        V = as_rows(V, "V")
        if V.shape[1] != self.n_concepts:
            raise ValueError(f"`V` must have {self.n_concepts} columns, one a concept, got {V.shape[1]}")
        return self._code(V) @ U.to(V.device)

    def explained_variance(self, Z: Tensor) -> float:
        """Share of the variance of features that the dictionary reconstructs.

        Args:
            Z: features, [N, D].

        Returns:
            1 − ‖Z − VU‖² / ‖Z − mean‖², at most 1; 0 where the rows do not vary.

        Raises:
            ValueError: as in `transform`.
        """
        Z = self._checked(Z)
        return _explained_variance(Z, self.reconstruct(self.transform(Z)))

    def assign(self, Z: Tensor) -> Tensor:
        """The strongest concept of each sample, argmax_k |v_k|.

        A row without any activation (a state that SemiNMF's penalty leaves at zero) is assigned to concept 0.

        Args:
            Z: features, [N, D].

        Returns:
            Indices of concepts, [N], int64.

        Raises:
            ValueError: as in `transform`.
        """
        return self.transform(Z).abs().argmax(dim=1)

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
        save_artifact(path, _KIND, {"dictionary": self.dictionary}, content)

    @abstractmethod
    def _fit(self, Z: Tensor) -> Fitted:
        """Learn U from checked features; the interface adds the objective of the final activations."""

    @abstractmethod
    def _encode(self, Z: Tensor, U: Tensor) -> Tensor:
        """Activations V of checked features."""

    @abstractmethod
    def _objective(self, Z: Tensor, U: Tensor, V: Tensor) -> float:
        """The value that the fit minimises."""

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """The arguments of the constructor."""

    def _code(self, V: Tensor) -> Tensor:
        """What multiplies U in the reconstruction, [N, K]."""
        return V

    def _checked(self, Z: Tensor) -> Tensor:
        width = self.dictionary.shape[1]
        Z = as_rows(Z, "Z")
        if Z.shape[1] != width:
            raise ValueError(
                f"`Z` must have the width {width} that the dictionary was fitted on, got {Z.shape[1]}: "
                "use features of the same model and site"
            )
        return Z

    def _not_fitted(self) -> ValueError:
        return ValueError(f"{type(self).__name__} is not fitted: call `fit(Z)` or `load_dictionary(path)` first")


def squared_norms(X: Tensor) -> Tensor:
    """‖x_i‖² of each row, [N], float64 on the CPU: long sums of float32 would lose the last digits."""
    return X.square().sum(dim=1).cpu().double()


def _explained_variance(Z: Tensor, reconstruction: Tensor) -> float:
    total = float(squared_norms(Z - Z.mean(dim=0)).sum())
    if not total > _NO_VARIANCE * float(squared_norms(Z).sum()):
        return 0.0
    return 1.0 - float(squared_norms(Z - reconstruction).sum()) / total


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
    loaded._U = tensors["dictionary"]
    loaded._report = FitReport(**{**report, "objective_history": tuple(report["objective_history"])})
    loaded.metadata = content["metadata"]
    return loaded
