"""The final norm as numbers, so that it can be stored and applied without the model."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

_EPS_NAMES = ("eps", "variance_epsilon", "epsilon")
# Where a module does not tell.
_USUAL_EPS = (1e-5, 1e-6)
# Rows of these sizes tell a wrong eps, mean or weight apart from rounding.
_PROBE_SIZES = (0.001, 1.0, 30.0)


@dataclass(frozen=True, eq=False)
class NormForm:
    """RMSNorm or LayerNorm: (x − mean) / √(variance + eps) · (offset + weight) + bias.

    Attributes:
        weight: Scale of each coordinate [D], or none.
        bias: Shift of each coordinate [D], or none.
        eps: What is added to the variance.
        centered: Whether the mean over the coordinates is subtracted (LayerNorm) or not (RMSNorm).
        offset: 1 where the weight is stored as its difference from 1 (Gemma), else 0.
    """

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    centered: bool
    offset: float

    def __call__(self, states: Tensor) -> Tensor:
        """Norm states [..., D], computed in float32, in their own dtype."""
        x = states.float()
        if self.centered:
            x = x - x.mean(dim=-1, keepdim=True)
        x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps)
        if self.weight is not None:
            x = x * (self.offset + self.weight.float())
        if self.bias is not None:
            x = x + self.bias.float()
        return x.to(states.dtype)

    @classmethod
    @torch.no_grad()
    def of(cls, module: nn.Module, width: int, dtype: torch.dtype) -> NormForm | None:
        """Find the form that gives what a module gives on random states; nothing where none does.

        Args:
            module: A norm of any class.
            width: D.
            dtype: Of the states that it norms.
        """
        weight, bias = (_vector(module, name) for name in ("weight", "bias"))
        told = [float(eps) for name in _EPS_NAMES if (eps := getattr(module, name, None)) is not None]
        device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        probes = torch.cat([size * (1 + torch.randn(4, width, generator=generator)) for size in _PROBE_SIZES])
        probes = probes.to(device, dtype)
        wanted = module(probes)
        forms = [
            cls(weight, bias, eps, centered, offset)
            for eps, centered, offset in product(told or _USUAL_EPS, (False, True), (0.0, 1.0))
        ]
        # The nearest, not the first that is near enough: in bfloat16, w and 1 + w may be alike for large weights.
        nearest = min(forms, key=lambda form: _distance(form(probes), wanted))
        return nearest if _same(nearest(probes), wanted) else None

    def to(self, device: torch.device) -> NormForm:
        """The same with its tensors on a device."""
        weight, bias = (None if vector is None else vector.to(device) for vector in (self.weight, self.bias))
        return NormForm(weight, bias, self.eps, self.centered, self.offset)


def _vector(module: nn.Module, name: str) -> Tensor | None:
    found: Any = getattr(module, name, None)
    return found.detach() if isinstance(found, Tensor) and found.ndim == 1 else None


def _distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.float() - theirs.float()).abs().mean()) if ours.shape == theirs.shape else torch.inf


def _same(ours: Tensor, theirs: Tensor) -> bool:
    """Equal but for rounding: models round between the steps, too."""
    tolerance = max(1e-5, *(4 * torch.finfo(states.dtype).eps for states in (ours, theirs)))
    ours, theirs = ours.float(), theirs.float()
    return ours.shape == theirs.shape and bool(((ours - theirs).abs() <= tolerance * theirs.abs().amax()).all())
