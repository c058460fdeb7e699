"""Full float32 precision, whatever the caller's training precision is."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")


def full_precision(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Run a function without gradients, autocast and TF32, and put the caller's settings back.

    Inside a mixed-precision training loop, or after `torch.set_float32_matmul_precision("high")`, a product of
    float32 matrices keeps 8 to 11 bits: too few for an objective that must not increase.
    """

    @wraps(function)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
                return function(*args, **kwargs)
        finally:
            torch.set_float32_matmul_precision(precision)

    return wrapped
