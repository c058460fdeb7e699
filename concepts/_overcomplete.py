"""The overcomplete library: its methods by name, what they accept, and the random numbers that they draw."""

import inspect
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ._optional import require
from ._validation import check_whole

# What is given to every method, under the names that the library and scikit-learn have for it.
_GIVEN = {"self", "nb_concepts", "n_components", "n_clusters", "input_shape", "device", "random_state"}
_POINTS_PER_CONCEPT = 20


class Library(NamedTuple):
    """The part of overcomplete that is used.

    Attributes:
        optimisers: its optimisation-based methods by name: factorisations of its own, and wrappers of scikit-learn.
        saes: its sparse autoencoders by name.
        train_sae: its training loop.
        mse_l1: its loss, the mean squared error and an L1 term.
    """

    optimisers: dict[str, type[Any]]
    saes: dict[str, type[Any]]
    train_sae: Callable[..., Any]
    mse_l1: Callable[..., Tensor]


@cache
def library() -> Library:
    """Import the library.

    Raises:
        ValueError: if it is not installed.
    """
    require(("overcomplete", "einops"), "overcomplete")
    optimisation, sae = _submodules("overcomplete.optimization", "overcomplete.sae")
    return Library(
        _concrete(optimisation, optimisation.BaseOptimDictionaryLearning),
        _concrete(sae, sae.SAE),
        sae.train_sae,
        sae.mse_l1,
    )


def _submodules(*names: str) -> list[Any]:
    """Import modules of one package without running its `__init__`."""
    package = names[0].partition(".")[0]
    if package in sys.modules:
        return [import_module(name) for name in names]
    # The `__init__` imports torchvision, timm and OpenCV for models and figures that are not used here, and fails with
    # matplotlib 3.9 and newer. An empty package with the same path lets the submodules in; then all go again, so that
    # whoever imports the package later gets what they would have got.
    spec = find_spec(package)
    assert spec is not None
    sys.modules[package] = module_from_spec(spec)
    try:
        return [import_module(name) for name in names]
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            del sys.modules[name]


def _concrete(module: Any, base: type) -> dict[str, type[Any]]:
    """Classes of a module that are no mere interfaces, by name."""
    found = ((name, value) for name, value in vars(module).items() if isinstance(value, type))
    return {name: value for name, value in found if issubclass(value, base) and not inspect.isabstract(value)}


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators that the library draws from, and put the caller's states of them back."""
    numpy_state = np.random.get_state()
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda):
        torch.default_generator.manual_seed(seed)
        for which in cuda:
            with torch.cuda.device(which):
                torch.cuda.manual_seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)


class Method:
    """One class of the library with the options that it is made with.

    Args:
        name: name of the class.
        n_concepts: number of concepts K.
        options: arguments of its constructor or its `fit`.

    Attributes:
        is_sae: whether it is a sparse autoencoder, to be trained on batches.
        takes_points: whether its concepts are combinations of given rows.

    Raises:
        ValueError: if there is no such class, or it refuses the options.
    """

    def __init__(self, name: str, n_concepts: int, options: dict[str, Any]) -> None:
        known = library()
        if name not in {**known.optimisers, **known.saes}:
            raise ValueError(
                f"`method` '{name}' not found in overcomplete: its optimisers are "
                f"{', '.join(sorted(known.optimisers))}; its SAEs are {', '.join(sorted(known.saes))}"
            )
        self.name = name
        self.n_concepts = n_concepts
        self.options = options
        self.is_sae = name in known.saes
        self._class = {**known.optimisers, **known.saes}[name]
        own = inspect.signature(self._class).parameters
        self.takes_points = "points" in own
        self._counts_over_batch = "threshold_momentum" in own
        # The first two are the object and the features.
        self._fit_names = list(inspect.signature(self._class.fit).parameters)[2:]
        self._check()

    @property
    def limits(self) -> dict[str, Any]:
        """The options that go to `fit`."""
        return {name: value for name, value in self.options.items() if name in self._fit_names}

    @property
    def points(self) -> int:
        """Number of rows of which archetypal concepts are combinations."""
        return int(self.options.get("points", _POINTS_PER_CONCEPT * self.n_concepts))

    def build(self, width: int, device: str, batch_size: int = 1, points: Tensor | None = None) -> Any:
        """An unfitted object of the class; on the device "meta" it costs nothing and draws no random number.

        Args:
            width: D.
            device: where it is to compute.
            batch_size: rows that it is trained on at a time.
            points: rows of which archetypal concepts are combinations [n, D].

        Raises:
            ValueError: if the class refuses the options.
        """
        return self._build(self.options, width, device, batch_size, points)

    def _build(
        self, options: dict[str, Any], width: int, device: str, batch_size: int = 1, points: Tensor | None = None
    ) -> Any:
        arguments = {name: value for name, value in options.items() if name not in self._fit_names}
        if self.is_sae:
            arguments["input_shape"] = width
        if self.takes_points:
            arguments["points"] = torch.empty(1, width, device=device) if points is None else points
        if self._counts_over_batch:
            arguments["top_k"] = batch_size * options.get("top_k", max(self.n_concepts // 10, 1))
        try:
            # Some of their layers begin on the default device, whatever they are told.
            with torch.device(device) if device == "meta" else nullcontext():
                return self._class(nb_concepts=self.n_concepts, device=device, **arguments)
        except (TypeError, AssertionError, KeyError, ValueError) as error:
            reason = str(error) or "a value is out of range"
            raise ValueError(f"'{self.name}' refuses `options` = {options}: {reason}") from error

    def _check(self) -> None:
        for name, value in self.options.items():
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise ValueError(f"`options.{name}` must be JSON, to be stored with the dictionary: {error}") from error
        accepted = self._accepted()
        unknown = sorted(self.options.keys() - accepted)
        if unknown:
            raise ValueError(f"'{self.name}' has no option '{unknown[0]}': it has {', '.join(sorted(accepted))}")
        if "top_k" in self.options:
            check_whole(self.options["top_k"], 1, "options.top_k")
            if self.options["top_k"] > self.n_concepts:
                raise ValueError(
                    f"`options.top_k` = {self.options['top_k']} is more than the `n_concepts` = {self.n_concepts} that "
                    "there are"
                )
        if "points" in self.options:
            check_whole(self.options["points"], self.n_concepts, "options.points")
        # Any width will do to see whether the values are accepted.
        self.build(self.n_concepts, "meta")

    def _accepted(self) -> set[str]:
        """Names of the options, also of those that the class hands on without naming them."""
        makers = [vars(base)["__init__"] for base in inspect.getmro(self._class) if "__init__" in vars(base)]
        estimator = getattr(self._build({}, self.n_concepts, "meta"), "model", None)
        handed_on = set(estimator.get_params()) if estimator is not None else set()
        return (set().union(*map(named, makers), self._fit_names) | handed_on) - _GIVEN


def named(function: Callable[..., Any]) -> set[str]:
    """Names of the arguments that are given by name, without `**kwargs`."""
    parameters = inspect.signature(function).parameters.values()
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {parameter.name for parameter in parameters if parameter.kind not in variable}
