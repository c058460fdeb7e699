"""Hooks a site, whatever its module keeps the hidden state in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from .sites import Site


def replace_state(output: Any, state: Tensor) -> Any:
    """Put a changed state back where a module keeps it: alone, or first in a tuple."""
    return (state, *output[1:]) if isinstance(output, tuple) else state


def state_of(output: Any) -> Tensor:
    """The hidden state in what a module returns."""
    state: Tensor = output[0] if isinstance(output, tuple) else output
    return state


Change = Callable[[Tensor], Tensor | None]


def attach(site: Site, change: Change) -> RemovableHandle:
    """Hook a site.

    Args:
        site: Where.
        change: Takes the state [B, T, D] and returns a new one, or nothing to leave it.
    """
    if site.at == "output":

        def after(module: Any, args: Any, output: Any) -> Any:
            changed = change(state_of(output))
            return None if changed is None else replace_state(output, changed)

        return site.module.register_forward_hook(after)

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        by_name = "hidden_states" in kwargs
        changed = change(kwargs["hidden_states"] if by_name else args[0])
        if changed is None:
            return None
        return (args, {**kwargs, "hidden_states": changed}) if by_name else ((changed, *args[1:]), kwargs)

    return site.module.register_forward_pre_hook(before, with_kwargs=True)
