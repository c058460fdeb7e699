"""Hooks that read or change hidden states while the model runs, and that never outlive their context."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.hooks import RemovableHandle

from .selectors import Selector
from .sites import Site
from .token_map import Role, TokenMap


class Intervention(ABC):
    """Changes hidden states along a vector.

    Attributes:
        kind: What it is called in errors.
        site: Name of a site of the language model.
        vector: One vector for all samples [D], or one for each sample of the batch [B, D].
        positions: The positions to change: a selector, or a boolean mask over each sample's sequence without padding
            [B, L]. Padding is never changed.
    """

    kind: ClassVar[str]
    site: str
    vector: Tensor
    positions: str | Tensor

    @abstractmethod
    def changed(self, states: Tensor, vector: Tensor) -> Tensor:
        """The states [B, T, D] as they become where they are selected; `vector` is [1, D] or [B, 1, D]."""


@dataclass(frozen=True)
class Steering(Intervention):
    """Adds a vector to hidden states: f ← f + α s (Representation Shift, arXiv 2501.03012, §4).

    Attributes:
        alpha: Strength α; 0 leaves the model exactly as it is.
    """

    kind = "steering"
    site: str
    vector: Tensor
    alpha: float = 1.0
    positions: str | Tensor = "all"

    def changed(self, states: Tensor, vector: Tensor) -> Tensor:
        """Add α s."""
        return states + self.alpha * vector.to(states)


@dataclass(frozen=True)
class DirectionalAblation(Intervention):
    """Removes a direction from hidden states: f ← f − (f·d̂) d̂ (directional ablation, arXiv 2406.11717, §2.4).

    The length of the vector does not matter; a zero vector removes nothing.
    """

    kind = "ablation"
    site: str
    vector: Tensor
    positions: str | Tensor = "all"

    def changed(self, states: Tensor, vector: Tensor) -> Tensor:
        """Subtract (f·d̂) d̂, in float32: the product of long vectors in half precision would leave much of it."""
        direction = normalize(vector.to(states.device, torch.float32), dim=-1)
        full = states.float()
        return (full - (full * direction).sum(dim=-1, keepdim=True) * direction).to(states.dtype)


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
def intervening(site: Site, intervention: Intervention, current: Callable[[], RunningPass | None]) -> Iterator[None]:
    """Apply one intervention within the context.

    Args:
        site: The resolved site.
        intervention: What to change, and where.
        current: Gives the running pass.

    Raises:
        ValueError: The site is in the vision tower, or the selector needs the finished answer.
    """
    if site.positions == "patches":
        raise ValueError(
            f"site {site.name!r}: {intervention.kind} works on sites of the language model (projector, lm.*)"
        )
    mask_of = _selection(site, intervention)
    hook = object()

    def change(state: Tensor) -> Tensor:
        running = current()
        if running is None:
            raise RuntimeError("a model with interventions must be run through VisionLanguageModel.generate or .read")
        start = running.advance(hook, state.shape[1])
        _check_shapes(site, intervention, state)
        mask = mask_of(running.token_map, start, state.shape[1])
        changed = intervention.changed(state, intervention.vector.unsqueeze(-2))
        return torch.where(mask[:, :, None], changed, state)

    handle = attach(site, change)
    try:
        yield
    finally:
        handle.remove()


def _selection(site: Site, intervention: Intervention) -> Callable[[TokenMap, int, int], Tensor]:
    """What gives the mask [B, length] of the columns from `start` on that an intervention changes."""
    positions = intervention.positions
    if isinstance(positions, str):
        selector = Selector.parse("image" if site.positions == "image" else positions)
        if selector.needs_answer:
            raise ValueError(
                f"positions {positions!r} are known only after generation; give a role, a range, or a mask of positions"
            )
        return selector.mask

    def mask(token_map: TokenMap, start: int, length: int) -> Tensor:
        roles = token_map.window(start, length)
        allowed = roles == Role.IMAGE if site.positions == "image" else roles != Role.PAD
        chosen = positions.to(roles.device)
        indices = torch.arange(start, start + length, device=roles.device) - token_map.first_column[:, None]
        within = (indices >= 0) & (indices < chosen.shape[1])
        return allowed & within & chosen.gather(1, indices.clamp(0, chosen.shape[1] - 1))

    return mask


def _check_shapes(site: Site, intervention: Intervention, state: Tensor) -> None:
    samples, _, width = state.shape
    vector, positions = intervention.vector, intervention.positions
    if vector.shape[-1] != width:
        raise ValueError(
            f"{intervention.kind} vector of width {vector.shape[-1]} at {site.name!r}, where states have width "
            f"{width}; it was made for another model"
        )
    given = [("vectors", vector)] if vector.ndim == 2 else []
    given += [("masks of positions", positions)] if isinstance(positions, Tensor) else []
    for name, rows in given:
        if len(rows) != samples:
            raise ValueError(
                f"{intervention.kind} with {len(rows)} {name} for a batch of {samples} samples; give one each"
            )


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
