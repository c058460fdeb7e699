"""What a fitted object of the overcomplete library knows, as tensors."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

_ESTIMATOR = "estimator."
_MODULE = "module."


def concepts(model: Any) -> tuple[Tensor, Tensor]:
    """The concepts [K, D] that a fitted model reconstructs with, and what is added to their sum [D]."""
    estimator = getattr(model, "model", None)
    invert = getattr(estimator, "inverse_transform", None)
    if invert is None:
        U = model.get_dictionary().detach().contiguous()
        return U, torch.zeros_like(U[0])
    # Not `get_dictionary` and `decode`: of ICA, these give the filters instead of the concepts, and forget the mean.
    # In float64, because the mean may be large.
    offset = torch.from_numpy(invert(np.zeros((1, model.nb_concepts))))
    U = torch.from_numpy(invert(np.eye(model.nb_concepts))) - offset
    return U.float().to(model.device), offset[0].float().to(model.device)


def estimator_state(model: Any) -> dict[str, Tensor]:
    """What a fitted wrapper of scikit-learn encodes with."""
    settings = model.model.get_params()
    fitted = {name: value for name, value in vars(model.model).items() if name not in settings}
    return {
        _ESTIMATOR + name: torch.tensor(np.asarray(value)).contiguous()
        for name, value in fitted.items()
        if _numeric(value)
    }


def restore_estimator(model: Any, tensors: dict[str, Tensor]) -> None:
    """Give an unfitted wrapper what `estimator_state` took."""
    for name, value in _below(_ESTIMATOR, tensors).items():
        setattr(model.model, name, value.cpu().numpy() if value.ndim else value.item())
    model.fitted = True


def sae_state(model: Any) -> dict[str, Tensor]:
    """What a trained SAE encodes with, besides its concepts."""
    # Its dictionary layer is left out, which may hold thousands of rows: the concepts are what comes of it. Some SAEs
    # keep a tensor as a plain attribute.
    layers = {name: value for name, value in model.state_dict().items() if not name.startswith("dictionary.")}
    plain = {name: value for name, value in vars(model).items() if isinstance(value, Tensor)}
    return {_MODULE + name: value.detach().clone().contiguous() for name, value in {**layers, **plain}.items()}


def restore_sae(model: Any, tensors: dict[str, Tensor], U: Tensor) -> None:
    """Give an untrained SAE what `sae_state` took, and its concepts U [K, D]."""
    state = _below(_MODULE, tensors)
    layers = state.keys() & model.state_dict().keys()
    model.load_state_dict({name: state[name] for name in layers}, strict=False, assign=True)
    for name in state.keys() - layers:
        setattr(model, name, state[name])
    model.eval()
    model.dictionary._fused_dictionary = U
    model.device = str(U.device)


def _numeric(value: Any) -> bool:
    return isinstance(value, np.ndarray | np.generic | int | float)


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
