"""Figures and tables of ablation and knockout, one panel for each variant and setting; they read the result files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ...records.files import write_whole
from .figure_style import BLUE, GRAY, INK, MARKERS, PALETTE, STYLE
from .figures import tensorboard

Json = dict[str, Any]


def show_figures(figures: Mapping[str, Figure], folder: Path, trainer: L.Trainer) -> None:
    """Write figures as `figures/*.png` and `*.svg`, and to TensorBoard.

    Args:
        figures: Name → figure.
        folder: Takes the folder.
        trainer: Its logger takes the figures.
    """
    writer = tensorboard(trainer)
    for name, figure in figures.items():
        for kind in ("png", "svg"):
            write_whole(folder / "figures" / f"{name}.{kind}", partial(figure.savefig, format=kind, dpi=144))
        if writer is not None:
            writer.add_figure(f"{name}/{folder.name}", figure, close=False)


def ablation_figure(summary: Json) -> Figure:
    """Share of right answers that become wrong, a bar for each set, above that of as many random tokens."""
    sets = list(dict.fromkeys(row["set"] for found in summary["variants"].values() for row in found["rows"]))
    with rc_context(STYLE):
        figure, panels = _panels(summary, height=0.9 + 0.26 * max(len(sets), 1))
        for axes, rows in panels:
            for row in rows:
                if row["became_wrong"] is not None:
                    y = sets.index(row["set"])
                    _bar(axes, y - 0.2, row, PALETTE[5] if row["set"].startswith("random") else BLUE)
                    if row["control"] is not None:
                        _bar(axes, y + 0.2, row["control"], GRAY)
            axes.set_xlim(0, 1)
            axes.set_ylim(len(sets) - 0.4, -0.6)
            axes.set_yticks(range(len(sets)), sets)
            axes.set_xlabel("share that becomes wrong")
        colors = {"set of tokens": BLUE, "random tokens": PALETTE[5], "as many random tokens as the set has": GRAY}
        patches = [Patch(color=color, label=name) for name, color in colors.items()]
        figure.legend(handles=patches, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def knockout_figure(summary: Json) -> Figure:
    """Share of right answers that stay right over windows of blocks, a line for each pair of sources and targets."""
    everything = [row for found in summary["variants"].values() for row in found["rows"]]
    windows = {row["window"]: row["blocks"] for row in everything}
    order = sorted(windows, key=lambda name: (len(windows[name]) == max(map(len, windows.values())), windows[name]))
    lines = list(dict.fromkeys(f"{row['sources']} → {row['targets']}" for row in everything))
    with rc_context(STYLE):
        figure, panels = _panels(summary, height=2.6)
        for axes, rows in panels:
            for number, line in enumerate(lines):
                mine = [row for row in rows if f"{row['sources']} → {row['targets']}" == line]
                points = sorted(((order.index(row["window"]), row) for row in mine), key=lambda point: point[0])
                x = [at + 0.06 * (number - len(lines) / 2) for at, _ in points]
                y = [row["relative_accuracy"] for _, row in points]
                ends = np.array([row["interval"] for _, row in points]).reshape(-1, 2)
                color, marker = PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)]
                axes.plot(x, y, color=color, marker=marker, markersize=4, linewidth=1, label=line)
                axes.vlines(x, *ends.T, color=color, linewidth=0.8)
            axes.set_ylim(-0.03, 1.03)
            axes.set_xticks(range(len(order)), [f"{name}\n{_span(windows[name])}" for name in order], fontsize=7)
            axes.set_ylabel("relative accuracy")
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def ablation_table(summary: Json) -> str:
    """Percent of right answers that become wrong, a line for each variant and set, beside what is published."""
    settings, published = _settings(summary), summary["published"]
    lines = [["variant", "set", "tokens", *(f"{name} (control)" for name in settings)]]
    for variant, found in summary["variants"].items():
        for name in dict.fromkeys(row["set"] for row in found["rows"]):
            rows = {row["setting"]: row for row in found["rows"] if row["set"] == name}
            tokens = np.mean([row["tokens"] for row in rows.values()])
            cells = [_cell(rows.get(setting), "became_wrong") for setting in settings]
            lines.append([variant, name, f"{tokens:.1f}", *cells])
        for name in dict.fromkeys(row["direction"] for row in found["project_away"]):
            rows = {row["setting"]: row for row in found["project_away"] if row["direction"] == name}
            cells = [_cell(rows.get(setting), "became_wrong") for setting in settings]
            lines.append([variant, f"{name} projected away", "", *cells])
    for name, shares in published["became_wrong"].items():
        lines.append(["(published)", name, "", *(f"{100 * shares[setting]:.1f}" for setting in settings)])
    note = f"percent of right answers that become wrong; (published): {published['source']}"
    return "\n".join([_aligned(lines), *_counts(summary), note, *_nowhere(summary)])


def knockout_table(summary: Json) -> str:
    """Share of right answers that stay right, a line for each variant and knockout, beside what is published."""
    settings, published = _settings(summary), summary["published"]
    lines = [["variant", "knockout", "blocks", *settings, "(published)"]]
    for variant, found in summary["variants"].items():
        for name in dict.fromkeys(row["knockout"] for row in found["rows"]):
            rows = {row["setting"]: row for row in found["rows"] if row["knockout"] == name}
            cells = [f"{rows[s]['relative_accuracy']:.2f}" if s in rows else "–" for s in settings]
            known = published["relative_accuracy"].get(name)
            blocks = _span(next(iter(rows.values()))["blocks"])
            lines.append([variant, name, blocks, *cells, "" if known is None else f"{known:.2f}"])
    note = f"share of right answers that stay right; (published): {published['source']}"
    return "\n".join([_aligned(lines), *_counts(summary), note, *_nowhere(summary)])


def _panels(summary: Json, height: float) -> tuple[Figure, list[tuple[Axes, list[Json]]]]:
    """A figure with a row for each variant and a column for each setting, and the rows of numbers of each panel."""
    variants, settings = summary["variants"], _settings(summary)
    size = (3.0 * len(settings) + 1.2, height * len(variants) + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(variants), len(settings), squeeze=False, sharex=True, sharey=True)
    panels = []
    for axes_row, (variant, found) in zip(grid, variants.items(), strict=True):
        for axes, setting in zip(axes_row, settings, strict=True):
            right = found["settings"][setting].get("kept", found["settings"][setting]["right"])
            axes.set_title(f"{variant}, {setting} (n = {right})", parse_math=False)
            panels.append((axes, [row for row in found["rows"] if row["setting"] == setting]))
    return figure, panels


def _settings(summary: Json) -> list[str]:
    return list(dict.fromkeys(setting for found in summary["variants"].values() for setting in found["settings"]))


def _bar(axes: Axes, y: float, row: Json, color: str) -> None:
    axes.barh(y, row["became_wrong"], height=0.38, color=color)
    axes.hlines(y, *row["interval"], color=INK, linewidth=0.9)


def _cell(row: Json | None, key: str) -> str:
    """A share in percent, with that of its control in brackets."""
    if row is None or row[key] is None:
        return "–"
    control = "" if row.get("control") is None else f" ({100 * row['control'][key]:.1f})"
    return f"{100 * row[key]:.1f}{control}"


def _counts(summary: Json) -> list[str]:
    """How many answers the shares are of, a line for each variant."""
    lines = []
    for variant, found in summary["variants"].items():
        told = [
            f"{setting} {counts['right']} of {counts['samples']} right"
            + (f", {counts['kept']} not with noise" if counts.get("hallucinated") is not None else "")
            for setting, counts in found["settings"].items()
        ]
        lines.append(f"{variant}: {'; '.join(told)}")
    return lines


def _nowhere(summary: Json) -> list[str]:
    if not any(counts["right"] for found in summary["variants"].values() for counts in found["settings"].values()):
        return ["no answer was right, so that none could become wrong"]
    names = ", ".join(summary["nowhere"])
    return [f"left out, as no picture has it: {names}"] if names else []


def _span(blocks: Sequence[int]) -> str:
    return f"{blocks[0]}–{blocks[-1]}" if len(blocks) > 1 else str(blocks[0])


def _aligned(table: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
    )
