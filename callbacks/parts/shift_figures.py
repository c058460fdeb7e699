"""Figures of concept shift, for TensorBoard and the report: what moves, how far, and what it recovers.

Notation: M paired samples, K concepts, D hidden size; δ_m [D] shift of a sample, Δ_k [D] shift of a concept.
They read what `shift.json` and `trajectory.json` hold; a measure of an empty concept is none, and nothing is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from scipy import stats

from ...lightning_modules.backbone.destinations import step_of
from ...records.files import write_whole
from .figure_style import BLUE, GRAY, INK, MARKERS, PALE, PALETTE, SIGNIFICANT, SOFT, STYLE
from .shift_measure import LEVEL
from .shift_projection import project_shifts
from .words_figure import words_figure

__all__ = [
    "most_moving",
    "project_shifts",
    "recovery_figure",
    "samples_figure",
    "save_figures",
    "trajectory_figure",
    "words_figure",
]

Json = dict[str, Any]
_Array = NDArray[np.float64]

# How a point is drawn whose shift is significant, is not, or cannot be told.
_FOUND: Json = {"marker": "o", "markerfacecolor": BLUE, "markeredgecolor": BLUE}
_NOT_FOUND: Json = {**_FOUND, "markerfacecolor": "white"}
_UNTESTED: Json = {"marker": "x", "markeredgecolor": SOFT}
_NAMED = 5  # concepts that the trajectory names
_NAMES = {
    "magnitude": "shift magnitude ‖Δ‖ (units of the states)",
    "consistency": "consistency (mean cosine of δ and Δ)",
    "aligned": "alignment (cosine with the last Δ)",
    "recovery_shifted": "recovery of words (%)",
}


# --- recovery against consistency and magnitude -----------------------------------------------------------


def recovery_figure(summary: Json) -> Figure:
    """What the shift recovers against how consistent and how large it is, a point a concept.

    The line is that of least squares, with the pointwise confidence band of its mean; none through fewer than three
    concepts or without a spread.

    Args:
        summary: What `shift.json` holds.
    """
    rows = [row for row in summary["concepts"] if row["samples"]]
    with rc_context(STYLE):
        figure = Figure(figsize=(10, 4.6), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, measure in zip(panels, ("consistency", "magnitude"), strict=True):
            axes.axhline(0, color=PALE, linewidth=0.8, zorder=0)
            # The consistency of a single sample is none.
            known = [row for row in rows if row[measure] is not None]
            _line(axes, known, measure, summary["level"])
            for row in known:
                _point(axes, row, measure)
            # Where nothing is recovered, not the rounding of it.
            axes.set_ylim(min(-5, axes.get_ylim()[0]), max(5, axes.get_ylim()[1]))
            at = [(row[measure], row["recovery_gain"]) for row in known]
            _number_points(axes, at, {row["concept"]: {"fontsize": 8, "color": INK} for row in known}, (300, 240))
            axes.set_xlabel(_NAMES[measure])
            axes.set_title(_correlation(summary["correlations"].get(measure), summary["level"]), loc="left")
        panels[0].set_ylabel("recovery gain of words (percentage points)")
        looks = {"significant shift (p ≤ 0.05)": _FOUND, "not significant": _NOT_FOUND}
        if any(row.get("too_few_samples") for row in rows):
            looks["too few samples to test"] = _UNTESTED
        for label, look in looks.items():
            panels[1].plot([], [], linestyle="none", markersize=6, label=label, **look)
        figure.legend(loc="outside upper right", ncols=3, frameon=False)
    return figure


def _point(axes: Axes, row: Json, measure: str) -> None:
    x, y = row[measure], row["recovery_gain"]
    bars: Json = {
        key: [[max(0.0, value - interval[0])], [max(0.0, interval[1] - value)]]
        for key, value, name in (("xerr", x, measure), ("yerr", y, "recovery_gain"))
        if (interval := row["intervals"].get(name))
    }
    p = row["p_adjusted"].get("magnitude", 1)
    look = _UNTESTED if row.get("too_few_samples") else _FOUND if p <= SIGNIFICANT else _NOT_FOUND
    axes.errorbar(
        x, y, **bars, **look, linestyle="none", markersize=6, ecolor="#a9c9e2", elinewidth=0.8,
        gid=f"concept-{row['concept']}",
    )  # fmt: skip


def _number_points(
    axes: Axes, at: Sequence[tuple[float, float]], looks: Mapping[int, Json], size: tuple[float, float]
) -> None:
    """Write the number of each concept beside its point, where it covers no other number and no point.

    Args:
        axes: With its final limits.
        at: The points.
        looks: Number of each point's concept → how it is written.
        size: About the width and height of `axes`, typographic points.
    """
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    points = [(size[0] * (x - left) / (right - left), size[1] * (y - low) / (high - low)) for x, y in at]
    numbers: list[tuple[float, float]] = []
    for (x, y), place, (concept, look) in zip(points, at, looks.items(), strict=True):
        free = (
            (far * dx, far * dy)
            for far in range(8, 64, 4)
            for dx, dy in ((1, 1), (-1, 1), (1, -1), (-1, -1), (0, 1.2), (0, -1.2))
            if _apart(x + far * dx, y + far * dy, points, 8, 7) and _apart(x + far * dx, y + far * dy, numbers, 13, 9)
        )
        dx, dy = next(free, (8, 8))
        numbers.append((x + dx, y + dy))
        leader = {"arrowstyle": "-", "color": GRAY, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}
        axes.annotate(
            str(concept), place, xytext=(dx, dy), textcoords="offset points", ha="center", va="center", zorder=5,
            path_effects=[withStroke(linewidth=2, foreground="white")],
            arrowprops=leader if max(abs(dx), abs(dy)) > 12 else None, **look,
        )  # fmt: skip


def _apart(x: float, y: float, others: Sequence[tuple[float, float]], wide: float, high: float) -> bool:
    return all(abs(x - u) >= wide or abs(y - v) >= high for u, v in others)


def _line(axes: Axes, rows: Sequence[Json], measure: str, level: float) -> None:
    x, y = (np.array([row[name] for row in rows], dtype=float) for name in (measure, "recovery_gain"))
    if len(x) < 3 or np.ptp(x) <= 1e-12 * np.abs(x).max():
        return
    at = np.linspace(x.min(), x.max(), 100)
    middle, half = least_squares_band(x, y, at, level)
    axes.plot(at, middle, color=SOFT, linewidth=1.2, zorder=1)
    axes.fill_between(at, middle - half, middle + half, color=SOFT, alpha=0.15, linewidth=0, zorder=0)


def least_squares_band(x: _Array, y: _Array, at: _Array, level: float) -> tuple[_Array, _Array]:
    """Line of least squares, and half the width of the confidence band of its mean, both at the points `at`.

    Args:
        x: At least three values, not all alike.
        y: As many.
        at: Where to evaluate.
        level: Coverage at each point, for normal residuals.
    """
    fit = stats.linregress(x, y)
    spread = ((x - x.mean()) ** 2).sum()
    residual = math.sqrt(((y - fit.intercept - fit.slope * x) ** 2).sum() / (len(x) - 2))
    error = residual * np.sqrt(1 / len(x) + (at - x.mean()) ** 2 / spread)
    return fit.intercept + fit.slope * at, stats.t.ppf((1 + level) / 2, len(x) - 2) * error


def _correlation(found: Json | None, level: float) -> str:
    if found is None:
        return "no correlation: too few concepts, or no spread"
    texts = []
    for name, letter in (("pearson", "r"), ("spearman", "ρ")):
        interval = found[f"{name}_interval"]
        bounds = f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""
        texts.append(f"{name.title()} {letter} = {found[name]:.2f}{bounds}")
    return f"{texts[0]}\n{texts[1]}   ({found['concepts']} concepts, {100 * level:.0f} % intervals)"


# --- shifts of samples ------------------------------------------------------------------------------------


def samples_figure(
    points: _Array, concepts: NDArray[np.int64], arrows: _Array, explained: tuple[float, float], labels: list[str]
) -> Figure:
    """Shifts of samples as dots and those of concepts as arrows from 0, on two axes.

    The concepts with the longest arrows have colors and numbers; the others are gray.

    Args:
        points: δ on the two axes, [M', 2].
        concepts: Concept of each, [M'].
        arrows: Δ on the two axes and the half axes of its 95 % confidence ellipse, [K, 3, 2]; 0 for an empty concept.
        explained: Share of Σ ‖δ‖² on each axis, between 0 and 1.
        labels: Words of each concept, K.
    """
    tips = arrows[:, 0]
    lengths = np.hypot(*tips.T)
    longest = [int(k) for k in np.argsort(-lengths, kind="stable") if lengths[k] > 0]
    colored = longest[: len(PALETTE)]
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 5.6), layout="constrained")
        axes = figure.subplots()
        axes.axhline(0, color=PALE, linewidth=0.6, zorder=0)
        axes.axvline(0, color=PALE, linewidth=0.6, zorder=0)
        others = ~np.isin(concepts, colored)
        axes.plot(*points[others].T, "o", markersize=2.5, color=PALE, zorder=1, markeredgewidth=0)
        for k, color, marker in zip(colored, PALETTE, MARKERS, strict=False):
            axes.plot(*points[concepts == k].T, marker, markersize=3.5, color=color, alpha=0.45, markeredgewidth=0)
            # Only for the legend: as visible there as the arrow is.
            axes.plot([], [], marker, markersize=6, color=color, label=f"{k}: {labels[k]}")
        for k in reversed(longest):
            _arrow(axes, k, arrows[k], PALETTE[colored.index(k)] if k in colored else GRAY)
        if len(longest) > len(colored):
            axes.plot([], [], "o", color=PALE, label=f"{len(longest) - len(colored)} other concepts")
        # One measure on both axes, so that lengths and angles are what they seem.
        axes.set_aspect("equal", adjustable="datalim")
        axes.apply_aspect()
        looks = {k: {"color": color, "weight": "bold"} for k, color in zip(colored, PALETTE, strict=False)}
        _number_points(axes, [(tips[k, 0], tips[k, 1]) for k in colored], looks, (430, 350))
        names = [f"axis, units of the states ({100 * share:.1f} % of Σ ‖δ‖²)" for share in explained]
        axes.set_xlabel(f"1st {names[0]}")
        axes.set_ylabel(f"2nd {names[1]}")
        title = f"Shift δ of each sample, and shift Δ of each concept with its {100 * LEVEL:.0f} % confidence ellipse"
        axes.set_title(title, loc="left")
        if longest:
            legend = figure.legend(loc="outside right upper", frameon=False, fontsize=8, title="concept")
            for text in legend.get_texts():
                text.set_parse_math(False)
    return figure


def _arrow(axes: Axes, concept: int, arrow: _Array, color: str) -> None:
    tip, *halves = arrow
    if np.any(halves):
        angle = np.linspace(0, 2 * np.pi, 60)[:, None]
        ellipse = tip + np.cos(angle) * halves[0] + np.sin(angle) * halves[1]
        axes.plot(*ellipse.T, color=color, linewidth=1, zorder=3, gid=f"ellipse-{concept}")
    strong = color != GRAY
    look = {"arrowstyle": "-|>", "color": color, "linewidth": 1.8 if strong else 0.8, "shrinkA": 0, "shrinkB": 0}
    axes.annotate(
        "", (tip[0], tip[1]), xytext=(0, 0), arrowprops=look, zorder=4 if strong else 3, gid=f"arrow-{concept}"
    )


# --- over training ----------------------------------------------------------------------------------------


def most_moving(points: Sequence[Json], count: int = _NAMED) -> list[int]:
    """The concepts with the largest shift at the last checkpoint, the largest first.

    Args:
        points: Those of `trajectory.json`.
        count: How many at most.
    """
    rows = [row for row in (points[-1]["concepts"] if points else ()) if row.get("magnitude") is not None]
    return [row["concept"] for row in sorted(rows, key=lambda row: (-row["magnitude"], row["concept"]))[:count]]


def trajectory_figure(trajectory: Json) -> Figure:
    """How concepts shift during a training: a thin line a concept, a thick one with its interval for their mean.

    Args:
        trajectory: What `trajectory.json` holds, two checkpoints at least. The concepts that move most are named.
    """
    points = [{"step": 0, "intervals": {}, **trajectory["start"]}, *trajectory["points"]]
    named = dict(zip(most_moving(points), PALETTE, strict=False))
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 6.4), layout="constrained")
        panels = figure.subplots(2, 2, sharex=True).flat
        for axes, (measure, name) in zip(panels, _NAMES.items(), strict=True):
            _lines(axes, points, measure, named)
            axes.set_ylabel(name)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        known = all(step_of(point["variant"]) is not None for point in trajectory["points"])
        for axes in figure.axes[2:]:
            axes.set_xlabel("training step" if known else "checkpoint")
        drawn = sum(row["magnitude"] is not None for row in points[-1]["concepts"])
        figure.suptitle(
            f"Black: mean of {drawn} concepts with its {100 * trajectory['level']:.0f} % interval; "
            f"colored: the {len(named)} that move most",
            x=0.01, ha="left", fontsize=9,
        )  # fmt: skip
    return figure


def _lines(axes: Axes, points: Sequence[Json], measure: str, named: Mapping[int, str]) -> None:
    steps = [point["step"] for point in points]
    lines: dict[int, list[float]] = {}
    for place, point in enumerate(points):
        for row in point["concepts"]:
            values = lines.setdefault(row["concept"], [math.nan] * len(points))
            values[place] = _number(row.get(measure))
    draw = partial(axes.plot, steps, marker="o", markersize=3)
    for concept, values in lines.items():
        if not all(map(math.isnan, values)):
            color = named.get(concept, PALE)
            draw(values, color=color, linewidth=1.3 if concept in named else 0.7, zorder=2 if concept in named else 1,
                 gid=f"concept-{concept}")  # fmt: skip
    mean = [_number(point["means"].get(measure)) for point in points]
    bounds = np.array([point["intervals"].get(measure) or (math.nan, math.nan) for point in points], dtype=float)
    draw(mean, color=INK, linewidth=2.6, markersize=5, zorder=4, gid="mean")
    axes.fill_between(steps, *bounds.T, color=INK, alpha=0.15, linewidth=0, zorder=3)
    _limit(axes, measure)
    if measure == "aligned":
        # Every line ends at 1.
        return
    ends = {str(concept): (lines[concept][-1], color) for concept, color in named.items()}
    _name_ends(axes, steps[-1], {**ends, "mean": (mean[-1], INK)})


def _limit(axes: Axes, measure: str) -> None:
    """Show the whole range of a measure, so that noise does not look like a move."""
    if measure == "recovery_shifted":
        # Some room for the marks.
        axes.set_ylim(-3, 103)
    elif measure == "magnitude":
        axes.set_ylim(bottom=0)
    else:
        axes.set_ylim(min(0.0, axes.get_ylim()[0]), 1.03)


def _name_ends(axes: Axes, step: float, ends: Mapping[str, tuple[float, str]]) -> None:
    """Names beside the ends of their lines, moved apart where they would overlap."""
    known = sorted((value, name, color) for name, (value, color) in ends.items() if not math.isnan(value))
    low, high = axes.get_ylim()
    places = spread([value for value, _, _ in known], 0.06 * (high - low), high)
    for (_, name, color), place in zip(known, places, strict=True):
        axes.annotate(
            name, (step, place), xytext=(8, 0), textcoords="offset points", va="center", color=color, fontsize=8,
            weight="bold", annotation_clip=False,
        )  # fmt: skip
    axes.set_ylim(low, high)


def spread(values: Sequence[float], gap: float, high: float) -> list[float]:
    """Ascending values, moved so that each is `gap` above the one before, and none above `high`."""
    places: list[float] = []
    for value in values:
        places.append(max(value, places[-1] + gap) if places else value)
    for place in reversed(range(len(places))):
        places[place] = min(places[place], places[place + 1] - gap if place + 1 < len(places) else high)
    return places


def _number(value: float | None) -> float:
    return math.nan if value is None else value


# --- files ------------------------------------------------------------------------------------------------


def save_figures(figures: Mapping[str, Figure], folder: Path) -> dict[str, str]:
    """Write each figure as PNG and SVG, complete or not at all; the same figure gives the same bytes.

    Args:
        figures: Name → figure.
        folder: They go to `figures` in it.

    Returns:
        Name → PNG, from the folder; the SVG lies beside it.

    Raises:
        OSError: A file cannot be written.
    """
    # Else ids in an SVG are drawn at random, and its date is today's.
    settings: dict[str, Json] = {"png": {"dpi": 150}, "svg": {"metadata": {"Date": None}}}
    with rc_context({"svg.hashsalt": "conceptshift"}):
        for name, figure in figures.items():
            for kind, options in settings.items():
                save = partial(figure.savefig, format=kind, **options)
                write_whole(folder / "figures" / f"{name}.{kind}", save)
    return {name: f"figures/{name}.png" for name in figures}
