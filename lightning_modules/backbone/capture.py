"""Reads hidden states while the model runs, by hooks that never outlive their context."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from .hooks import Change, attach
from .sites import Site
from .token_map import Role, TokenMap


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
            if state.ndim > 3:
                raise ValueError(
                    f"site {name!r} has states of the shape {list(state.shape)}, not one vector for each position; "
                    "choose a module that passes the hidden state on"
                )
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
        raw = {name: self._within(parts, token_map) for name, parts in self._parts.items()}
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

    @staticmethod
    def _within(parts: list[Tensor], token_map: TokenMap) -> Tensor:
        """One site's calls joined, on the token map's device; its block may lie on another.

        A model can go on behind the last token, where other processes wait for its pieces.
        """
        steps = token_map.roles.shape[1] - parts[0].shape[1]
        return torch.cat(parts[: 1 + max(steps, 0)], dim=1).to(token_map.roles.device)


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
