"""Hooks that read or change hidden states while the model runs, and that never outlive their context."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from .selectors import Selector
from .sites import Site
from .token_map import Role, TokenMap


@dataclass(frozen=True)
class Steering:
    """Adds a vector to hidden states: f ← f + α s (Representation Shift, arXiv 2501.03012, §4).

    Attributes:
        site: Name of a site of the language model.
        vector: The steering vector s [D].
        alpha: Strength α; 0 leaves the model exactly as it is.
        positions: Selector of the positions to change; padding is never changed.
    """

    site: str
    vector: Tensor
    alpha: float = 1.0
    positions: str = "all"


class RunningPass:
    """One pass through the model: its token map, and how far each hook has come.

    With a cache a generation calls every module first with the whole prompt and then with one column at a time; each
    hook counts the columns it has seen and so knows which ones it is shown.
    """

    def __init__(self, token_map: TokenMap) -> None:
        self.token_map = token_map
        self._seen: Counter[int] = Counter()

    def advance(self, hook: object, columns: int) -> int:
        """First column of those that `hook` is shown now."""
        start = self._seen[id(hook)]
        self._seen[id(hook)] += columns
        return start


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


@contextmanager
def steering(site: Site, intervention: Steering, current: Callable[[], RunningPass | None]) -> Iterator[None]:
    """Apply one steering vector within the context.

    Args:
        site: The resolved site.
        intervention: What to add, and where.
        current: Gives the running pass.

    Raises:
        ValueError: The site is in the vision tower, or the selector needs the finished answer.
    """
    if site.positions == "patches":
        raise ValueError(f"site {site.name!r}: steering works on sites of the language model (projector, lm.*)")
    selector = Selector.parse("image" if site.positions == "image" else intervention.positions)
    if selector.needs_answer:
        raise ValueError(f"positions {selector.name!r} are known only after generation; steer with a role or a range")
    hook = object()

    def change(state: Tensor) -> Tensor:
        running = current()
        if running is None:
            raise RuntimeError("a steered model must be run through VisionLanguageModel.generate or .read")
        start = running.advance(hook, state.shape[1])
        if intervention.vector.shape[0] != state.shape[2]:
            raise ValueError(
                f"steering vector of width {intervention.vector.shape[0]} at {site.name!r}, where states have width "
                f"{state.shape[2]}; it was made for another model"
            )
        step = intervention.alpha * intervention.vector.to(state)
        mask = selector.mask(running.token_map, start, state.shape[1])
        return torch.where(mask[:, :, None], state + step, state)

    handle = attach(site, change)
    try:
        yield
    finally:
        handle.remove()


class Capture:
    """Collects the states of several sites over one pass.

    Args:
        sites: Resolved sites.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        self.sites = sites
        self._parts: dict[str, list[Tensor]] = {site.name: [] for site in sites}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Collect within the context. Enter after interventions, so that what they change is what is read."""
        with ExitStack() as stack:
            for site in self.sites:
                stack.callback(attach(site, self._collector(site.name)).remove)
            yield

    def _collector(self, name: str) -> Change:
        def collect(state: Tensor) -> None:
            self._parts[name].append(state.detach())

        return collect

    def raw(self) -> dict[str, Tensor]:
        """States per site as the modules gave them, calls joined along the sequence."""
        return {name: parts[0] if len(parts) == 1 else torch.cat(parts, dim=1) for name, parts in self._parts.items()}

    def states(self, token_map: TokenMap) -> dict[str, Tensor]:
        """States per site [B, columns, D] in the columns of `token_map`.

        Sites of the vision tower are put into the image columns; other columns are zero there and must not be
        selected.
        """
        silent = [name for name, parts in self._parts.items() if not parts]
        if silent:
            raise ValueError(f"site {silent[0]!r} was not reached by the model; choose one that takes part in its pass")
        raw = self.raw()
        starts = token_map.answer_start.tolist()
        end = max(start + len(answer) for start, answer in zip(starts, token_map.answers, strict=True))
        for site in self.sites:
            columns = raw[site.name].shape[1]
            if site.positions != "patches" and not end - 1 <= columns <= token_map.roles.shape[1]:
                raise ValueError(
                    f"site {site.name!r} has {columns} states a sample where the sequence has {end} positions; "
                    "choose a module of the language model"
                )
        return {
            site.name: _to_columns(raw[site.name], token_map, site) if site.positions == "patches" else raw[site.name]
            for site in self.sites
        }


def _to_columns(patches: Tensor, token_map: TokenMap, site: Site) -> Tensor:
    """Vision states [pictures or tiles, patches, D] → [B, L, D], each patch in its image token's column."""
    is_image = token_map.window(0, token_map.roles.shape[1]) == Role.IMAGE
    tokens, given = int(is_image.sum()), patches.shape[0] * patches.shape[1]
    if given == tokens + patches.shape[0]:
        patches = patches[:, 1:]  # the class token comes first and becomes no visual token
    elif given != tokens:
        raise ValueError(
            f"site {site.name!r} has {given} patches while the language model sees {tokens} image tokens, so that they "
            "cannot be paired; use the site `projector`"
        )
    columns = patches.new_zeros(*is_image.shape, patches.shape[-1])
    columns[is_image] = patches.reshape(tokens, -1)
    return columns
