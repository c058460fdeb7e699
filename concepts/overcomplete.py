"""Dictionaries of the overcomplete library (github.com/KempnerInstitute/overcomplete), an optional dependency.

Notation: Z [N, D] features, U [K, D] dictionary, V [N, K] activations, μ [D] the mean of Z and σ its spread.
"""

import inspect
import math
import warnings
from collections.abc import Iterable
from typing import Any, Self

import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from ._overcomplete import Method, named, seeded
from ._overcomplete_state import concepts, estimator_state, restore_estimator, restore_sae, sae_state
from ._sae_training import Batches, train
from ._validation import check_at_least, check_whole
from .dictionary import ConceptDictionary, Fitted
from .rows import Rows
from .semi_nmf import solve_code

_TRAINING = ("epochs", "batch_size", "learning_rate", "l1_weight")
_NON_NEGATIVE = ("NMF", "SkNMF")
_DISTANCES = ("SkKMeans",)


class Overcomplete(ConceptDictionary):
    """Any method of `overcomplete.optimization` and `overcomplete.sae`, fitted by that library.

    Optimisers (`NMF`, `ConvexNMF`, `SkICA`, ...) hold all rows in memory. Sparse autoencoders (`TopKSAE`,
    `BatchTopKSAE`, `JumpSAE`, the archetypal `RATopKSAE` and `RAJumpSAE`, ...) read batches from one shard after the
    other, so that shards should mix samples. They are trained on (z − μ) / σ, as their authors advise: on states with
    a large common mean, most concepts die. V is given back in the units of the features, U points away from μ.

    The objective is ½‖Z − Ẑ‖² + λ‖V‖₁. The history of an SAE is its mean over each epoch. Optimisers report the final
    value only, without penalties of their own; `NMF`, `SemiNMF` and `ConvexNMF` do not tell how many iterations they
    took, so that their limit stands for it.

    Four things are not as in the library. `NMF`, `SemiNMF` and `ConvexNMF` encode each row exactly; there, activations
    hang on random numbers and on the other rows, and `ConvexNMF` encodes no rows but those it was fitted on. `SkICA`
    adds the mean back, and its concepts are the columns of the mixing matrix instead of the filters. `SkKMeans` has
    activations 1 / (1 + distance) as `KMeans` has, not distances. `top_k` of `BatchTopKSAE` counts the concepts of a
    row on average, not those of a batch.

    Args:
        method: name of the class in the library.
        n_concepts: number of concepts K.
        seed: seed of all random numbers; the same seed gives the same dictionary.
        options: further arguments of the class or of its `fit`, such as `top_k: 5` or `max_iter: 200`. Of archetypal
            SAEs, `points` is the number of rows, drawn at random, between which the concepts lie.
        epochs: of an SAE, passes over the rows.
        batch_size: of an SAE, rows of a step; in each epoch, rows that do not fill a batch are left out.
        learning_rate: of an SAE, step size of Adam.
        l1_weight: of an SAE, λ in the units of the features; where only the k largest activations are kept, 0 will do.

    Raises:
        ValueError: if the library is not installed, has no such method, or refuses the options.
    """

    adds_up = False

    def __init__(
        self,
        method: str,
        n_concepts: int = 20,
        seed: int = 0,
        options: dict[str, Any] | None = None,
        epochs: int = 100,
        batch_size: int = 128,
        learning_rate: float = 2e-3,
        l1_weight: float = 0.0,
    ) -> None:
        super().__init__(n_concepts, seed)
        check_whole(epochs, 1, "epochs")
        check_whole(batch_size, 1, "batch_size")
        check_at_least(learning_rate, 0, "learning_rate")
        check_at_least(l1_weight, 0, "l1_weight")
        self.method = method
        self.options = dict(options or {})
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.l1_weight = l1_weight
        self._method = Method(method, n_concepts, self.options)
        defaults = inspect.signature(Overcomplete).parameters
        given = [name for name in _TRAINING if getattr(self, name) != defaults[name].default]
        if given and not self._method.is_sae:
            raise ValueError(f"`{given[0]}` is for SAEs and '{method}' is an optimiser: leave it out")

    def fit(self, Z: Tensor | Iterable[Tensor], distributed: bool = False) -> Self:
        """Learn U from features; see `ConceptDictionary.fit`.

        Raises:
            TypeError: as there.
            ValueError: as there, or if `distributed`, which the library cannot do.
        """
        if distributed:
            raise ValueError(
                f"'{self.method}' of overcomplete is fitted in one process: leave `distributed` out and give one "
                "process the shards of all"
            )
        return super().fit(Z)

    def _check(self, rows: Rows) -> None:
        if self.method in _NON_NEGATIVE:
            for Z in rows:
                self._check_sign(Z)

    def _check_sign(self, Z: Tensor) -> None:
        if bool((Z < 0).any()):
            raise ValueError(
                f"'{self.method}' needs non-negative features, but `Z` has negative values, as hidden states do: "
                "use 'SemiNMF' or 'ConvexNMF', which take both signs"
            )

    def _fit(self, rows: Rows) -> Fitted:
        # The library takes gradients, also where the caller has turned them off.
        with seeded(self.seed, rows.device), torch.inference_mode(False), torch.enable_grad():
            return self._train(rows) if self._method.is_sae else self._optimise(rows)

    def _optimise(self, rows: Rows) -> Fitted:
        model, limits = self._method.build(rows.width, str(rows.device)), self._method.limits
        estimator = getattr(model, "model", None)
        if estimator is not None:
            estimator.set_params(random_state=self.seed)
        with warnings.catch_warnings():
            # One warning an inner iteration; whether it converged is in the report.
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(torch.cat(list(rows)), **limits)
        found = len(model.get_dictionary())
        if found != self.n_concepts:
            raise ValueError(
                f"'{self.method}' found {found} of `n_concepts` = {self.n_concepts} concepts in {rows.n} rows of width "
                f"{rows.width}: ask for fewer"
            )
        U, offset = concepts(model)
        if not bool(U.isfinite().all()):
            raise ValueError(f"'{self.method}' diverged: try another `options.solver`, or features of a smaller scale")
        tensors = {"dictionary": U, "offset": offset}
        if estimator is not None:
            iterations = int(getattr(estimator, "n_iter_", 1))
            converged = iterations < getattr(estimator, "max_iter", math.inf)
            return Fitted({**tensors, **estimator_state(model)}, iterations=iterations, converged=converged)
        # Their objective is mean (z − ẑ)² + penalty · mean |v|; one of two solvers leaves out the penalty.
        penalty = model.l1_penalty if "l1_penalty" in named(model.solver_fn) else 0.0
        tensors["l1_weight"] = torch.tensor(0.5 * penalty * rows.width / self.n_concepts)
        limit = limits.get("max_iter", inspect.signature(model.fit).parameters["max_iter"].default)
        return Fitted(tensors, iterations=limit, converged=False)

    def _train(self, rows: Rows) -> Fitted:
        generator = torch.Generator().manual_seed(self.seed)
        batches = Batches(rows, self.batch_size, generator)
        points = None
        if self._method.takes_points:
            points = batches.standardised(rows.sample(self._method.points, generator))
        model = self._method.build(rows.width, str(rows.device), batches.size, points)
        history = train(model, batches, self.epochs, self.learning_rate, self.l1_weight)
        if not all(map(math.isfinite, history)):
            raise ValueError(
                f"'{self.method}' diverged: lower `learning_rate` = {self.learning_rate:g}, or change `options` = "
                f"{self.options}"
            )
        model.eval()
        tensors = {"dictionary": concepts(model)[0], "offset": batches.mean, "scale": torch.tensor(batches.scale)}
        return Fitted({**tensors, **sae_state(model)}, history, self.epochs, converged=False)

    def _encode(self, Z: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        if self.method in _NON_NEGATIVE:
            self._check_sign(Z)
        if len(Z) == 0:
            return Z.new_zeros(0, self.n_concepts)
        U = tensors["dictionary"]
        if "l1_weight" in tensors:
            return solve_code(U @ Z.T, U @ U.T, float(tensors["l1_weight"])).T.contiguous()
        if self._method.is_sae:
            model = self._method.build(U.shape[1], "meta")
            restore_sae(model, tensors, U)
            X = (Z - tensors["offset"]) / tensors["scale"]
            return torch.cat([model.encode(part)[1] for part in torch.split(X, self.batch_size)]) * tensors["scale"]
        model = self._method.build(U.shape[1], str(Z.device))
        restore_estimator(model, tensors)
        # Some draw random numbers here too, if to no effect.
        with seeded(self.seed, Z.device), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            V: Tensor = model.encode(Z)
        return 1 / (1 + V) if self.method in _DISTANCES else V

    def _code(self, V: Tensor) -> Tensor:
        if self.method in _DISTANCES:
            return torch.nn.functional.one_hot(V.argmax(dim=1), self.n_concepts).to(V)
        return V

    def _decode(self, V: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        return super()._decode(V, tensors) + tensors["offset"]

    def _loss(self, errors: Tensor, V: Tensor) -> float:
        return 0.5 * float(errors.sum()) + self.l1_weight * float(V.abs().sum(dtype=torch.float64))

    def _settings(self) -> dict[str, Any]:
        names = ("method", "n_concepts", "seed", "options", *(_TRAINING if self._method.is_sae else ()))
        return {name: getattr(self, name) for name in names}
