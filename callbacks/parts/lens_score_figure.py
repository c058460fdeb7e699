"""The lens score over the depth of a model, for `figures/` and TensorBoard; reads `lens.json`."""

from __future__ import annotations

from typing import Any

import lightning as L
import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from .figure_style import GRAY, INK, PALETTE, STYLE
from .numbers import log_numbers

Json = dict[str, Any]

_LINES = {"strict": "-", "lenient": "--", "background": ":"}


def lens_score_figure(summary: Json) -> Figure:
    """Share of patches that decode to the class of their object, over relative depth, a color a variant.

    Depth is 0 for what enters the language model, and 1 for its last block.
    """
    layers, published = summary["layers"], summary["published"]
    depth = np.linspace(0, 1, len(layers))
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        axes = figure.subplots()
        for number, (variant, found) in enumerate(summary["variants"].items()):
            color = PALETTE[number % len(PALETTE)]
            for kind, line in _LINES.items():
                shares = [np.nan if one["share"] is None else one["share"] for one in found[kind]]
                axes.plot(depth, shares, line, color=color, linewidth=1.2, label=f"{variant}, {kind}")
            ends = np.array([one["interval"] for one in found["strict"]], dtype=float)
            axes.fill_between(depth, *ends.T, color=color, alpha=0.15, linewidth=0)
        x, y = published["layer"] / (published["layers"] - 1), published["share"]
        axes.plot(x, y, "*", color=INK, markersize=9)
        axes.annotate("published: LLaVA-1.5-7B, COCO", (x, y), (-5, 6), textcoords="offset points", ha="right",
                      fontsize=7, color=GRAY)  # fmt: skip
        axes.set_xlim(0, 1)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(f"relative depth ({layers[0]} to {layers[-1]})")
        axes.set_ylabel("share of patches")
        axes.set_title("Patches that decode to the class of their object")
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
    return figure


def log_lens_scores(summary: Json, trainer: L.Trainer) -> None:
    """Log the shares, with the layer as the step."""
    for variant, found in summary["variants"].items():
        for kind in ("strict", "lenient", "any", "background"):
            for layer, one in enumerate(found[kind]):
                if one["share"] is not None:
                    log_numbers(trainer, {f"lens/{variant}/{kind}": one["share"]}, layer)
