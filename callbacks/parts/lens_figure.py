"""A figure of the logit lens: how sure the layers are of what visual tokens decode to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib import rc_context
from matplotlib.figure import Figure

from .figure_style import MARKERS, PALETTE, STYLE


def confidence_figure(layers: Sequence[str], confidence: Mapping[str, Sequence[float]]) -> Figure:
    """Probability of the most probable token over the layers, a line a variant.

    Args:
        layers: Names of the L layers.
        confidence: Variant → mean over visual tokens and pictures [L].
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.4), layout="constrained")
        axes = figure.subplots()
        for number, (variant, values) in enumerate(confidence.items()):
            color, marker = PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)]
            axes.plot(range(len(layers)), values, color=color, marker=marker, markersize=3, label=variant)
        step = max(1, len(layers) // 8)
        shown = range(0, len(layers), step)
        axes.set_xticks(list(shown), [layers[layer].removeprefix("lm.") for layer in shown])
        axes.set_ylim(bottom=0)
        axes.set_ylabel("mean probability of the first token")
        axes.set_title("What visual tokens decode to: confidence")
        if len(confidence) > 1:
            axes.legend(frameon=False)
    return figure
