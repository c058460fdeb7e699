"""What the answers of knockouts say: shares that stay right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...lightning_modules.backbone.knockout_names import KnockoutName, TokenSet
from ...metrics import bootstrap
from .trial_scores import Pictures, mean_tokens, value
from .trials import UNALTERED, Found


def summarize_knockout(found: Found, variant: str, knockouts: Mapping[str, KnockoutName], depth: int) -> dict[str, Any]:
    """What one variant still answers.

    Args:
        found: All trials.
        variant: Which.
        knockouts: Name → what it says, in the order of the rows.
        depth: Blocks of the language model.

    Returns:
        `settings`: how many samples there are and are right, and how many visual tokens their pictures have. `rows`: of
        each setting and knockout the share of samples that were right and stay so.
    """
    settings: dict[str, Any] = {}
    rows = []
    for setting in found.settings:
        right, unaltered = found.right(variant, setting), found.of(variant, UNALTERED, setting)
        settings[setting] = {
            "samples": len(unaltered),
            "visual_tokens": mean_tokens(unaltered, unaltered),
            "right": len(right),
        }
        trials = {name: found.of(variant, name, setting) for name in knockouts}
        trials = {name: of_knockout for name, of_knockout in trials.items() if of_knockout}
        if not trials:
            continue
        pictures = Pictures({i: found.samples[i] for i in right})
        scored = bootstrap(
            {name: pictures.share({i: trial.right for i, trial in of.items()}) for name, of in trials.items()}
        )
        for name, of_knockout in trials.items():
            knockout = knockouts[name]
            rows.append(
                {
                    "setting": setting,
                    "knockout": name,
                    "sources": _name(knockout.sources),
                    "targets": _name(knockout.targets),
                    "window": knockout.window,
                    "blocks": list(knockout.blocks(depth)),
                    "source_tokens": mean_tokens(of_knockout, of_knockout),
                    "samples": len(of_knockout),
                    **value(scored[name], "relative_accuracy"),
                    "without": len(right) - len(of_knockout),
                }
            )
    return {"settings": settings, "rows": rows}


def _name(side: TokenSet | str) -> str:
    return side.name if isinstance(side, TokenSet) else side
