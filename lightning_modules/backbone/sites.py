"""Sites: named places in a model whose hidden states can be read or changed (METHODS: `vision.block.k` … `lm.norm`)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import nn

# Models that keep their final norm under another name than `norm`.
_NORM_NAMES = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f")


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


def find_sites(model: Any) -> dict[str, Site]:
    """All named sites of a transformers image-text-to-text model, in the order of computation."""
    decoder = model.get_decoder()
    blocks = list(decoder.layers)
    sites = [
        Site(f"vision.block.{number}", block, "output", "patches")
        for number, block in enumerate(_vision_blocks(model, decoder))
    ]
    # What enters the language model holds the visual tokens after the projector, whatever module made them.
    sites.append(Site("projector", blocks[0], "input", "image"))
    sites.append(Site("lm.embed", blocks[0], "input", "sequence"))
    sites += [Site(f"lm.block.{number}", block, "output", "sequence") for number, block in enumerate(blocks)]
    sites.append(Site("lm.norm", final_norm(decoder), "output", "sequence"))
    return {site.name: site for site in sites}


def final_norm(decoder: nn.Module) -> nn.Module:
    """The norm between the last block and the unembedding.

    Raises:
        ValueError: The decoder has none under a known name.
    """
    for name in _NORM_NAMES:
        if isinstance(module := getattr(decoder, name, None), nn.Module):
            return module
    children = ", ".join(name for name, _ in decoder.named_children())
    raise ValueError(f"{type(decoder).__name__} has no final norm among {', '.join(_NORM_NAMES)}; it has {children}")


def _vision_blocks(model: Any, decoder: nn.Module) -> Iterable[nn.Module]:
    encoder = model.get_encoder(modality="image")
    if encoder is model or encoder is decoder:
        return ()
    lists = [module for module in encoder.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=nn.ModuleList())


def resolve_sites(model: Any, patterns: Iterable[str], source: str) -> dict[str, Site]:
    """Turn names and wildcards into sites.

    Args:
        model: The transformers model.
        patterns: Site names, `*` wildcards over them, or names of the model's own modules.
        source: Where the model came from, for the error message.

    Raises:
        ValueError: A pattern matches nothing.
    """
    known = find_sites(model)
    chosen: dict[str, Site] = {}
    for pattern in patterns:
        names = [name for name in known if fnmatchcase(name, pattern)]
        found = {name: known[name] for name in names} or {
            name: Site(name, module, "output", "sequence")
            for name, module in model.named_modules()
            if name and fnmatchcase(name, pattern)
        }
        if not found:
            raise ValueError(
                f"site {pattern!r} not found: the model has {_summary(known)}; "
                f"`conceptshift sites --model {source}` lists them"
            )
        chosen.update(found)
    return chosen


def _summary(known: dict[str, Site]) -> str:
    """`vision.block.0–3, projector, lm.embed, lm.block.0–5, lm.norm`."""
    parts: list[str] = []
    for kind in ("vision.block", "lm.block"):
        last = sum(name.startswith(kind) for name in known) - 1
        if last >= 0:
            parts.append(f"{kind}.0–{last}")
    return ", ".join([*parts, "projector", "lm.embed", "lm.norm"])
