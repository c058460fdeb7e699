"""Sites: named places in a model whose hidden states can be read or changed (METHODS: `vision.block.k` … `lm.norm`)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from torch import nn

from .structure import Structure


@dataclass(frozen=True)
class Site:
    """One place.

    Attributes:
        name: `vision.block.k`, `projector`, `lm.embed`, `lm.block.k`, `lm.norm`, or a module's own name.
        module: The module to hook.
        at: Whether the state is what goes into the module or what comes out.
        positions: Whether rows are positions of the language model's sequence (`sequence`), the image positions
            among them (`image`), or the vision tower's own patches (`patches`).
    """

    name: str
    module: nn.Module
    at: Literal["input", "output"]
    positions: Literal["sequence", "image", "patches"]


def find_sites(structure: Structure) -> dict[str, Site]:
    """All named sites of a model, in the order of computation."""
    blocks = list(structure.blocks)
    sites = [
        Site(f"vision.block.{number}", block, "output", "patches")
        for number, block in enumerate(structure.image_blocks)
    ]
    if structure.has_visual_tokens:
        # What enters the language model holds the visual tokens after the projector, whatever module made them.
        sites.append(Site("projector", blocks[0], "input", "image"))
    sites.append(Site("lm.embed", blocks[0], "input", "sequence"))
    sites += [Site(f"lm.block.{number}", block, "output", "sequence") for number, block in enumerate(blocks)]
    if not isinstance(structure.norm, nn.Identity):
        sites.append(Site("lm.norm", structure.norm, "output", "sequence"))
    return {site.name: site for site in sites}


def resolve_sites(
    structure: Structure, patterns: Iterable[str], source: str, own: Collection[str], live: Callable[[str], nn.Module]
) -> dict[str, Site]:
    """Turn names and wildcards into sites.

    Args:
        structure: The model's parts.
        patterns: Site names, `*` wildcards over them, or names of the model's own modules.
        source: Where the model came from, for the error message.
        own: Names of the model's own modules: what adapters put inside them is no site.
        live: Which module stands under such a name now.

    Raises:
        ValueError: A pattern matches nothing.
    """
    known = find_sites(structure)
    chosen: dict[str, Site] = {}
    for pattern in patterns:
        names = [name for name in known if fnmatchcase(name, pattern)]
        found = {name: known[name] for name in names} or {
            name: Site(name, live(name), "output", "sequence") for name in own if name and fnmatchcase(name, pattern)
        }
        if not found:
            why = f" ({structure.without_visual_tokens})" if pattern == "projector" else ""
            raise ValueError(
                f"site {pattern!r} not found{why}: the model has {_summary(known)}; "
                f"`conceptshift sites --model {source}` lists them"
            )
        chosen.update(found)
    return chosen


def _summary(known: dict[str, Site]) -> str:
    """`vision.block.0–3, projector, lm.embed, lm.block.0–5, lm.norm`."""
    parts: list[str] = []
    for name in known:
        kind, _, number = name.rpartition(".")
        if not number.isdigit():
            parts.append(name)
        elif number == "0":
            parts.append(f"{kind}.0–{sum(other.startswith(f'{kind}.') for other in known) - 1}")
    return ", ".join(parts)
