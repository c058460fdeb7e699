"""The figure of `conceptshift explain`."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image

_COLUMNS = 5
_BLUE, _RED = "#3b6ea8", "#b04a3a"
_LEGEND = "Heat-maps: dot product of concept and state of each visual token, from low ({}) to high ({}); gray: not seen"


@dataclass(frozen=True)
class Explanation:
    """What one picture activates.

    Attributes:
        picture: The picture.
        prompt: What was asked about it.
        answer: What the model answered.
        state: Which state was explained, in words.
        activations: Activation of each of K concepts.
        top: The strongest concepts, strongest first, without those of activation 0.
        words: Words of each of K concepts.
        overlays: A heat-map of each concept in `top`; none where visual tokens cannot be placed in the picture.
        signed: Whether activations are.
    """

    picture: Image.Image
    prompt: str
    answer: str
    state: str
    activations: list[float]
    top: list[int]
    words: list[list[str]]
    overlays: list[Image.Image]
    signed: bool


def explain_figure(explanation: Explanation) -> Figure:
    """The picture with the answer, bars of the strongest activations, and their heat-maps below."""
    rows = -(-len(explanation.overlays) // _COLUMNS)
    width, height = explanation.picture.size
    panel = min(max(2.1 * height / width, 1.2), 3.5) + 0.4
    heights = [max(3.2, 0.36 * len(explanation.top) + 0.9), *[panel] * rows]
    figure = Figure(figsize=(11, sum(heights) + 0.3), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06))
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    above = grid[0].subgridspec(1, 2, width_ratios=[1, 1.7])
    _show_picture(figure.add_subplot(above[0]), explanation)
    _show_activations(figure.add_subplot(above[1]), explanation)
    for row in range(rows):
        below = grid[row + 1].subgridspec(1, _COLUMNS)
        for column in range(_COLUMNS):
            axis = figure.add_subplot(below[column])
            axis.axis("off")
            place = row * _COLUMNS + column
            if place < len(explanation.overlays):
                concept = explanation.top[place]
                axis.imshow(explanation.overlays[place], interpolation="bilinear")
                axis.set_title(_label(explanation, concept, words=3, width=24), fontsize=9)
    if rows:
        ends = ("blue", "red") if explanation.signed else ("dark", "bright")
        figure.supxlabel(_LEGEND.format(*ends), fontsize=8, color="dimgray")
    return figure


def _show_picture(axis: Any, explanation: Explanation) -> None:
    axis.imshow(explanation.picture, interpolation="bilinear")
    axis.axis("off")
    answer = textwrap.fill(f"“{explanation.answer}”", 44, max_lines=6, placeholder=" …")
    # An answer may hold dollar signs, which would be read as formulas.
    axis.set_title(answer, fontsize=11, parse_math=False)


def _show_activations(axis: Any, explanation: Explanation) -> None:
    values = [explanation.activations[concept] for concept in explanation.top]
    places = range(len(values))
    # Of signed activations red is positive, as in the heat-maps.
    colors = [_RED if explanation.signed and value > 0 else _BLUE for value in values]
    axis.barh(places, values, height=0.62, color=colors)
    labels = [_label(explanation, concept, words=4, width=40) for concept in explanation.top]
    axis.set_yticks(places, labels, fontsize=10)
    axis.invert_yaxis()
    axis.axvline(0, color="black", linewidth=0.6)
    axis.bar_label(axis.containers[0], fmt="%.3g", padding=3, fontsize=9)
    axis.margins(x=0.12)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    axis.set_title(f"Activations of concepts\n{explanation.state}", fontsize=11)


def _label(explanation: Explanation, concept: int, words: int, width: int) -> str:
    named = ", ".join(explanation.words[concept][:words]) or "(no word)"
    return textwrap.fill(f"{concept}: {named}", width)
