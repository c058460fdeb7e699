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

from ...datamodules.files import write_whole
from .figure_style import GRAY, INK, MARKERS, PALE, PALETTE, SOFT, STYLE

Json = dict[str, Any]
Row = Mapping[str, Any]

_CONTROLS = {"random": ("x", "random direction"), "shuffled": ("+", "shuffled labels")}
# More lines than this cannot be told apart; the rest is drawn gray.
_COLORED = len(PALETTE)
_HPARAMS = ("kind", "vector", "site", "alpha", "positions", "mode", "control")
_METRICS = (
    "target",
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
    """Draw a sweep into a folder, and into TensorBoard where the run has one.

    Args:
        sweep: Content of `sweep.json`.
        folder: Takes `figures/*.png` and `*.svg`.
        loggers: Of the trainer.
    """
    figures = {"pareto": pareto_figure(sweep)}
    if len({row["site"] for row in sweep["runs"] if row["kind"] == "steered"}) > 1:
        figures["map"] = map_figure(sweep)
    for name, figure in figures.items():
        for kind in ("png", "svg"):
            write_whole(folder / "figures" / f"{name}.{kind}", partial(figure.savefig, format=kind, dpi=144))
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            for name, figure in figures.items():
                logger.experiment.add_figure(f"sweep/{sweep['name']}/{name}", figure, close=False)
            for number, row in enumerate(sweep["runs"]):
                _log_hparams(logger, sweep["name"], number, row)


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
        for number, (name, rows) in enumerate(_lines(sweep).items()):
            color = PALETTE[number] if number < _COLORED else PALE
            style: Json = {"color": color, "marker": MARKERS[number % len(MARKERS)], "markersize": 5, "linewidth": 1}
            axes.plot(*zip(*(_point(row, quality) for row in rows), strict=True), **style, label=name, zorder=2)
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
    """The front as a line, with α and intervals at its points."""
    front = sorted(rows, key=lambda row: _point(row, quality))
    axes.plot(*zip(*(_point(row, quality) for row in front), strict=True), "--", color=SOFT, linewidth=1,
              label="Pareto front", zorder=1)  # fmt: skip
    for row in front:
        if row["kind"] == "steered":
            x, y = _point(row, quality)
            for key, across in (("target", True), (quality, False)):
                low, high = row["intervals"][key]
                ends = ([low, high], [y, y]) if across else ([x, x], [low, high])
                axes.plot(*ends, color=SOFT, linewidth=0.7, zorder=1)
            axes.annotate(f"α {row['alpha']:g}", (x, y), (4, 5), textcoords="offset points", fontsize=7, color=SOFT)


def map_figure(sweep: Json) -> Figure:
    """Site × α: how far the target rises, and how far the quality falls, from the unsteered run."""
    steered = [row for row in sweep["runs"] if row["kind"] == "steered"]
    groups: dict[str, list[Row]] = {}
    for row in steered:
        groups.setdefault(f"{row['vector']}, {row['mode']}, {row['positions']}", []).append(row)
    sites = list(dict.fromkeys(row["site"] for row in steered))
    alphas = sorted({row["alpha"] for row in steered})
    measures = {"target": _target_name(sweep), sweep["quality"]: _quality_name(sweep)}
    with rc_context(STYLE):
        size = (1.6 + 2.2 + 0.62 * len(alphas) * 2, 0.9 + len(groups) * (0.75 + 0.32 * len(sites)))
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(len(groups), 2, squeeze=False)
        for axes_row, (group, rows) in zip(grid, groups.items(), strict=True):
            for axes, (measure, name) in zip(axes_row, measures.items(), strict=True):
                _draw_map(axes, rows, measure, sites, alphas)
                axes.set_title(
                    f"{group}\nchange of {name}" if len(groups) > 1 else f"change of {name}", parse_math=False
                )
    return figure


def _draw_map(axes: Axes, rows: Sequence[Row], measure: str, sites: Sequence[str], alphas: Sequence[float]) -> None:
    values = np.full((len(sites), len(alphas)), np.nan)
    for row in rows:
        values[sites.index(row["site"]), alphas.index(row["alpha"])] = row["changes"][measure]["difference"]
    limit = max(float(np.nanmax(np.abs(values))), 1e-9)
    axes.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    for (y, x), value in np.ndenumerate(values):
        if not np.isnan(value):
            color = "white" if abs(value) > 0.6 * limit else INK
            axes.text(x, y, f"{value:+.2f}", ha="center", va="center", fontsize=7, color=color)
    axes.set_xticks(range(len(alphas)), [f"{alpha:g}" for alpha in alphas])
    axes.set_yticks(range(len(sites)), list(sites), parse_math=False)
    axes.set_xlabel("α")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _lines(sweep: Json) -> dict[str, list[Row]]:
    """Steered runs that differ in α only, in its order; named by what tells them from the others."""
    steered = [row for row in sweep["runs"] if row["kind"] == "steered"]
    keys = [key for key in ("vector", "site", "positions", "mode") if len({row[key] for row in steered}) > 1]
    lines: dict[str, list[Row]] = {}
    for row in sorted(steered, key=lambda row: row["alpha"]):
        lines.setdefault(", ".join(row[key] for key in keys) or "steered", []).append(row)
    return lines


def _point(row: Row, quality: str) -> tuple[float, float]:
    return row["scores"]["target"], row["scores"][quality]


def _quality_name(sweep: Json) -> str:
    return "VQA accuracy" if sweep["task"] == "vqa" else str(sweep["quality"])


def _target_name(sweep: Json) -> str:
    return f"answers “{sweep['target']}”" if sweep["task"] == "vqa" else "captions with a word of the class"
