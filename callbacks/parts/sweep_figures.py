"""Figures of a sweep, for TensorBoard and the report, and its runs as TensorBoard's HParams; they read `sweep.json`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...records.files import write_whole
from .figure_style import GRAY, INK, MARKERS, PALE, PALETTE, SOFT, STYLE

Json = dict[str, Any]
Row = Mapping[str, Any]

_CONTROLS = {"random": ("x", "random direction"), "shuffled": ("+", "shuffled labels")}
# More lines, and more entries of the legend, than this are not told apart; the others are drawn gray.
_COLORED = 4
# Points of the front with fewer ones between them would write over each other; as a share of the axes.
_APART = 0.07
# Maps below each other; more are a table.
_MAPS = 6
_HPARAMS = ("kind", "vector", "site", "alpha", "positions", "mode", "control")
_METRICS = (
    "target",
    "elsewhere",
    "overall",
    "yes/no",
    "number",
    "other",
    "CIDEr",
    "BLEU-4",
    "ROUGE-L",
    "length",
    "repetition",
    "changed",
)


def show_sweep(sweep: Json, folder: Path, loggers: Sequence[Logger]) -> None:
    """Draw a sweep into a folder and into TensorBoard, whose HParams get the Pareto front and the unsteered run.

    Args:
        sweep: Content of `sweep.json`.
        folder: Takes `figures/*.png` and `*.svg`.
        loggers: Of the trainer.
    """
    figures = {"pareto": pareto_figure(sweep)}
    if _groups(sweep):
        figures["map"] = map_figure(sweep)
    for name, figure in figures.items():
        for kind in ("png", "svg"):
            write_whole(folder / "figures" / f"{name}.{kind}", partial(figure.savefig, format=kind, dpi=144))
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            for name, figure in figures.items():
                logger.experiment.add_figure(f"sweep/{sweep['name']}/{name}", figure, close=False)
            for number, row in enumerate(sweep["runs"]):
                # Not all: of more than 40 runs TensorBoard hides everything until they are chosen one by one.
                if row["pareto"] or row["kind"] == "unsteered":
                    _log_hparams(logger, sweep["name"], number, row)


def sweep_numbers(sweep: Json) -> dict[str, float]:
    """Tag → score, of all runs of a sweep."""
    return {
        f"sweep/{sweep['name']}/{row['name']}/{name}": row["scores"][name]
        for row in sweep["runs"]
        for name in _METRICS
        if name in row["scores"]
    }


def _log_hparams(logger: TensorBoardLogger, target: str, number: int, row: Row) -> None:
    scores = {f"sweep/{target}/{name}": row["scores"][name] for name in _METRICS if name in row["scores"]}
    folder = re.sub(r"[^\w.-]+", "_", row["name"])
    logger.experiment.add_hparams(
        {name: row[name] for name in _HPARAMS}, scores, run_name=f"sweep/{target}/{number:03d}-{folder}", global_step=0
    )


def pareto_figure(sweep: Json) -> Figure:
    """Target against quality: a line for each vector, site, positions and mode over α; controls; the Pareto front."""
    quality = sweep["quality"]
    with rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.6), layout="constrained")
        axes = figure.subplots()
        for kind, (marker, label) in _CONTROLS.items():
            points = [_point(row, quality) for row in sweep["runs"] if row["kind"] == kind]
            if points:
                axes.plot(*zip(*points, strict=True), marker, color=GRAY, markersize=5, label=label, zorder=1)
        lines = _lines(sweep)
        for number, (name, rows) in enumerate(lines.items()):
            style: Json = {"color": PALE, "marker": ".", "zorder": 2}
            if number < _COLORED:
                style = {"color": PALETTE[number], "marker": MARKERS[number], "label": name, "zorder": 3}
            elif number == _COLORED:
                style["label"] = f"{len(lines) - _COLORED} others"
            axes.plot(*zip(*(_point(row, quality) for row in rows), strict=True), **style, markersize=5, linewidth=1)
        _draw_front(axes, [row for row in sweep["runs"] if row["pareto"]], quality)
        (unsteered,) = (row for row in sweep["runs"] if row["kind"] == "unsteered")
        axes.plot(*_point(unsteered, quality), "*", color=INK, markersize=11, label="unsteered", zorder=4)
        axes.set_xlabel(f"{_target_name(sweep)} (share of {sweep['samples']:,} samples)", parse_math=False)
        axes.set_ylabel(_quality_name(sweep))
        legend = axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
        for text in legend.get_texts():
            text.set_parse_math(False)
    return figure


def _draw_front(axes: Axes, rows: Sequence[Row], quality: str) -> None:
    """The front as a line; α and intervals at those of its points that leave room for them."""
    front = sorted(rows, key=lambda row: _point(row, quality))
    axes.plot(*zip(*(_point(row, quality) for row in front), strict=True), "--", color=SOFT, linewidth=1,
              label="Pareto front", zorder=1)  # fmt: skip
    size = np.array([np.ptp(axes.get_xlim()), np.ptp(axes.get_ylim())])
    told: list[tuple[float, float]] = []
    # From the strongest on: the weak ones crowd around the unsteered run.
    for row in reversed(front):
        x, y = _point(row, quality)
        if row["kind"] != "steered" or any(np.hypot(*((np.array((x, y)) - at) / size)) < _APART for at in told):
            continue
        told.append((x, y))
        for key, across in (("target", True), (quality, False)):
            low, high = row["intervals"][key]
            ends = ([low, high], [y, y]) if across else ([x, x], [low, high])
            axes.plot(*ends, color=SOFT, linewidth=0.7, zorder=1)
        axes.annotate(f"α {row['alpha']:g}", (x, y), (4, 5), textcoords="offset points", fontsize=7, color=SOFT)


def map_figure(sweep: Json) -> Figure:
    """Site × α: how far the target rises, and how far the quality falls, from the unsteered run.

    A map for each vector, mode and positions with several sites, those in which the target rises most.
    """
    groups = _groups(sweep)
    alphas = sorted({row["alpha"] for rows in groups.values() for row in rows})
    sites = {name: sorted({row["site"] for row in rows}, key=_depth) for name, rows in groups.items()}
    measures = {"target": _target_name(sweep), sweep["quality"]: _quality_name(sweep)}
    heights = [0.75 + 0.32 * len(of_group) for of_group in sites.values()]
    with rc_context(STYLE):
        figure = Figure(figsize=(3.8 + 1.24 * len(alphas), 0.9 + sum(heights)), layout="constrained")
        grid = figure.subplots(len(groups), 2, squeeze=False, height_ratios=heights)
        for axes_row, (group, rows) in zip(grid, groups.items(), strict=True):
            for axes, (measure, name) in zip(axes_row, measures.items(), strict=True):
                _draw_map(axes, rows, measure, sites[group], alphas)
                axes.set_title(f"{group}\nchange of {name}", parse_math=False)
    return figure


def _depth(site: str) -> list[str | int]:
    """Sorts block 2 before block 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", site)]


def _groups(sweep: Json) -> dict[str, list[Row]]:
    """Steered runs that differ in site and α only, at several sites, as far as they are drawn."""
    groups: dict[str, list[Row]] = {}
    for row in sweep["runs"]:
        if row["kind"] == "steered":
            groups.setdefault(f"{row['vector']}, {row['mode']}, {row['positions']}", []).append(row)
    several = {name: rows for name, rows in groups.items() if len({row["site"] for row in rows}) > 1}
    most = sorted(several, key=lambda name: -max(row["scores"]["target"] for row in several[name]))[:_MAPS]
    return {name: several[name] for name in most}


def _draw_map(axes: Axes, rows: Sequence[Row], measure: str, sites: Sequence[str], alphas: Sequence[float]) -> None:
    values = np.full((len(sites), len(alphas)), np.nan)
    for row in rows:
        values[sites.index(row["site"]), alphas.index(row["alpha"])] = row["changes"][measure]["difference"]
    limit = max(float(np.nanmax(np.abs(values))), 1e-9)
    axes.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    for (y, x), value in np.ndenumerate(values):
        if not np.isnan(value):
            color = "white" if abs(value) > 0.6 * limit else INK
            axes.text(x, y, f"{round(float(value), 2) + 0:+.2f}", ha="center", va="center", fontsize=7, color=color)
    axes.set_xticks(range(len(alphas)), [f"{alpha:g}" for alpha in alphas])
    axes.set_yticks(range(len(sites)), list(sites), parse_math=False)
    axes.set_xlabel("α")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _lines(sweep: Json) -> dict[str, list[Row]]:
    """Steered runs that differ in α only, in its order; named by what tells them from the others.

    First those that the Pareto front leads to, those with most of the target before the others.
    """
    steered = [row for row in sweep["runs"] if row["kind"] == "steered"]
    keys = [key for key in ("vector", "site", "positions", "mode") if len({row[key] for row in steered}) > 1]
    lines: dict[str, list[Row]] = {}
    for row in sorted(steered, key=lambda row: row["alpha"]):
        lines.setdefault(", ".join(row[key] for key in keys) or "steered", []).append(row)

    def strongest(item: tuple[str, list[Row]]) -> tuple[bool, float]:
        return max((row["pareto"], row["scores"]["target"]) for row in item[1])

    return dict(sorted(lines.items(), key=strongest, reverse=True))


def _point(row: Row, quality: str) -> tuple[float, float]:
    return row["scores"]["target"], row["scores"][quality]


def _quality_name(sweep: Json) -> str:
    names = {"elsewhere": "VQA accuracy elsewhere", "overall": "VQA accuracy"}
    return names.get(sweep["quality"], str(sweep["quality"]))


def _target_name(sweep: Json) -> str:
    if sweep["task"] == "vqa":
        return f"answers {'other than ' if sweep.get('avoid') else ''}“{sweep['target']}”"
    return f"captions {'without' if sweep.get('avoid') else 'with'} a word of the class"
